"""`fasfx::count`: the closed form of a unit-threshold neuron; what a lowered sequential network runs."""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.codes import CODES
from fasfx.ops.library import LIBRARY, implement, onnx_number, straight_through
from fasfx.ops.precision import needs_double

LIBRARY.define("count(Tensor u, str code, int steps, int levels, bool signed) -> Tensor")


def count(u: Tensor, code: str, steps: int, levels: int, signed: bool) -> Tensor:
    """The signed sum n of the spikes that a neuron sends for constant input u, in count units.

    Shape:  any; dtype of u.   Unit: spike counts, integers in [-N or 0, N].
    Error:  none: equal to `fasfx::fire` with theta = N.
    Grad:   straight-through inside the range.
    Source: the code's row in fasfx.ops.codes.
    """
    row = CODES[code]
    low, top = row.limits(steps, levels, signed)
    return straight_through(row.count(u.detach(), steps, levels, signed), u, low, top)


implement("count", count)
op = torch.ops.fasfx.count.default


@torch_op("fasfx::count", trace_only=True)
def onnx_count(u: TReal, code: str, steps: int, levels: int, signed: bool) -> TReal:
    """The same float operations in ONNX: Floor, Clip, Mul, Sub only (all of them have GPU kernels at opset 18)."""
    low, top = CODES[code].limits(steps, levels, signed)
    source: Any = u
    kind = np.dtype(u.dtype.numpy())
    if not needs_double(np.finfo(kind).nmant, top):
        out: TReal = _onnx_count(source, code, steps, low, top, kind)
        return out
    wide = onnx.Cast(source, to=onnx_ir.DataType.DOUBLE)
    out = onnx.CastLike(_onnx_count(wide, code, steps, low, top, np.float64), source)
    return out


def _onnx_count(u: Any, code: str, steps: int, low: int, top: int, kind: Any) -> Any:
    number = partial(onnx_number, kind=kind)
    if code != "multi":
        return onnx.Clip(onnx.Floor(onnx.Add(u, number(0.5))), number(low), number(top))
    split = number(2.0 ** np.finfo(kind).nmant + 1)
    halves = onnx.Floor(onnx.Clip(onnx.Mul(u, number(2)), number(2 * low), number(2 * top)))
    unsent = onnx.Add(halves, number(0.5))
    for _ in range(steps):
        scaled = onnx.Mul(unsent, split)
        spike = onnx.Sub(scaled, onnx.Sub(scaled, unsent))
        unsent = onnx.Sub(unsent, spike)
    return onnx.Floor(onnx.Add(onnx.Mul(onnx.Sub(halves, unsent), number(0.5)), number(0.75)))
