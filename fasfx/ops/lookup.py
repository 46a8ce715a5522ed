"""`fasfx::lookup`: the closed form of a neuron group, one look-up of its input's half count."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from onnxscript import INT32
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.codes import CODES
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.group import like_function, neurons_of, with_ramps
from fasfx.ops.library import LIBRARY, implement, onnx_number
from fasfx.ops.reductions import REDUCTIONS, onnx_join, onnx_split, onnx_take

LIBRARY.define(
    "lookup(Tensor x, Tensor table, Tensor spikes, str function, int neurons, float low, float high, float left, "
    "float right, float scale) -> Tensor"
)


def lookup(
    x: Tensor, table: Tensor, spikes: Tensor, function: str, neurons: int, low: float, high: float, left: float,
    right: float, scale: float,
) -> Tensor:  # fmt: skip
    """What `fasfx::group` gives, from a table over the half counts of [low, high]: ties apart, the same numbers.

    spikes, neurons: how many spikes all K neurons send together for each half count, and K; for reports.

    Shape:  x any, table and spikes [cells + 1]; result like x.   Unit: that of scale * f(x).
    Error:  the group's bound (fasfx.groups), certified on the core's interval and the tails.
    Grad:   that of the function itself.
    Source: universal group operators, Jiang et al., STA, ICLR 2024; the table is fasfx's (decision 9).
    """
    cell, z, k = cell_of(x, table, function, low, high)
    y = torch.nn.functional.embedding(cell, table.unsqueeze(1)).squeeze(-1)
    y = REDUCTIONS[FUNCTIONS[function].reduction].join(with_ramps(y, z, left, right), k)
    return like_function(y.to(x.dtype), x, function, scale)


def cell_of(x: Tensor, table: Tensor, function: str, low: float, high: float) -> tuple[Tensor, Tensor, Any]:
    """The half count of x, int32, and what the reduction needs to go back."""
    z, k = REDUCTIONS[FUNCTIONS[function].reduction].split(x.detach().to(table.dtype))
    cells = table.numel() - 1
    return ((z - low) * (cells / (high - low))).clamp_(0, cells).to(torch.int32), z, k


class Cells(NamedTuple):
    """For every half count of the input, [cells + 1]: segment, count of that neuron, spikes of all together."""

    segment: Tensor
    counts: Tensor
    spikes: Tensor


def cells_of(edges: Tensor, unit: float, rest: float, code: str, steps: int) -> Cells:
    """From breakpoints [K + 1] in float64. The last half count is the end of the range."""
    neurons = neurons_of(edges, unit, rest)
    cells = round(float(edges[-1] - edges[0]) / (unit / 2))
    middle = edges[0] + (torch.arange(cells + 1, dtype=edges.dtype, device=edges.device) + 0.5) * (unit / 2)
    middle[-1] = edges[-1]
    segment = (torch.searchsorted(edges, middle, right=True) - 1).clamp(0, len(edges) - 2)
    u = ((middle - neurons.start[segment]).abs() / unit).minimum(neurons.counts[segment])
    half = (4 * u).round().long() // 2  # u is the middle of a half count, or the threshold
    counts, active, full = torch.zeros_like(u), torch.zeros_like(segment), torch.zeros_like(neurons.counts).long()
    for top in neurons.counts.unique():
        here, (count, spikes) = neurons.counts[segment] == top, _simulated(code, steps, int(top))
        counts[here] = count.to(u)[half[here]]
        active[here] = spikes.to(active)[half[here]]
        full[neurons.counts == top] = spikes[-1].to(full)
    upwards = neurons.direction > 0  # neurons between rest and this one are full
    between = torch.where(upwards, (full * upwards).cumsum(0), (full * ~upwards).flip(0).cumsum(0).flip(0)) - full
    return Cells(segment, counts, (between[segment] + active).to(torch.int32))


@cache
def _simulated(code: str, steps: int, top: int) -> tuple[Tensor, Tensor]:
    """Count and spikes of a neuron with a threshold of `top` counts, for every half count of its input, [2 top + 1]."""
    row, levels = CODES[code], top.bit_length()
    u = (torch.arange(2 * top + 1, dtype=torch.float64, device="cpu") / 2 + 0.25).clamp(max=top)
    events = row.spikes(u, steps, levels, False)
    return row.decode(events, levels), (events != 0).sum(0)


def table_of(cells: Cells, edges: Tensor, values: Tensor, unit: float, rest: float) -> Tensor:
    """What a group with these values gives for every half count."""
    neurons = neurons_of(edges, unit, rest)
    at_start = torch.where(neurons.direction > 0, values[:-1], values[1:])
    return at_start[cells.segment] + neurons.weights(values)[cells.segment] * cells.counts


implement("lookup", lookup)
op = torch.ops.fasfx.lookup.default


@torch_op("fasfx::lookup", trace_only=True)
def onnx_lookup(
    x: TReal, table: TReal, spikes: INT32, function: str, neurons: int, low: float, high: float, left: float,
    right: float, scale: float,
) -> TReal:  # fmt: skip
    """The same in ONNX: Mul, Sub, Clip if z may lie outside, Cast and GatherElements, and what the reduction needs."""
    source: Any = x
    rows: Any = table
    given, wide = np.dtype(source.dtype.numpy()), np.dtype(rows.dtype.numpy())
    value = source if given == wide else onnx.Cast(source, to=rows.dtype)
    reduction = FUNCTIONS[function].reduction
    z, k = onnx_split(reduction, value, wide)
    cells = int(rows.shape[0]) - 1
    position = onnx.Mul(onnx.Sub(z, onnx_number(low, wide)) if low else z, onnx_number(cells / (high - low), wide))
    if not REDUCTIONS[reduction].relative:  # else z lies in the core's interval
        position = onnx.Clip(position, onnx_number(0, wide), onnx_number(cells, wide))
    y: Any = onnx_take(rows, position)
    if right:
        y = onnx.Add(y, onnx.Mul(onnx.Relu(z), onnx_number(right, wide)))
    if left:
        y = onnx.Sub(y, onnx.Mul(onnx.Relu(onnx.Neg(z)), onnx_number(left, wide)))
    y = onnx_join(reduction, y, k, wide)
    out: TReal = y if given == wide else onnx.CastLike(y, source)
    return out
