"""`fasfx::lookup`: the closed form of a neuron group, one look-up of its input's half count."""

from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.group import like_function, with_ramps
from fasfx.ops.library import LIBRARY
from fasfx.ops.reductions import REDUCTIONS, onnx_join, onnx_split, onnx_take

LIBRARY.define(
    "lookup(Tensor x, Tensor table, str function, float low, float high, float left, float right, float scale) "
    "-> Tensor"
)


def lookup(
    x: Tensor, table: Tensor, function: str, low: float, high: float, left: float, right: float, scale: float
) -> Tensor:
    """What `fasfx::group` gives, from a table over the half counts of [low, high]: ties apart, the same numbers.

    Shape:  x any, table [cells + 1]; result like x.   Grad: that of the function itself.
    """
    reduction = REDUCTIONS[FUNCTIONS[function].reduction]
    z, k = reduction.split(x.detach().to(table.dtype))
    cells = table.numel() - 1
    index = ((z - low) * (cells / (high - low))).clamp_(0, cells)
    y = torch.nn.functional.embedding(index.to(torch.int32), table.unsqueeze(1)).squeeze(-1)
    return like_function(reduction.join(with_ramps(y, z, left, right), k).to(x.dtype), x, function, scale)


LIBRARY.impl("lookup", lookup, "CompositeImplicitAutograd")
op = torch.ops.fasfx.lookup.default


@torch_op("fasfx::lookup", trace_only=True)
def onnx_lookup(
    x: TReal, table: TReal, function: str, low: float, high: float, left: float, right: float, scale: float
) -> TReal:
    """The same in ONNX: Mul, Add, Clip, Cast and Gather, and what the reduction needs."""
    source: Any = x
    rows: Any = table
    given, wide = np.dtype(source.dtype.numpy()), np.dtype(rows.dtype.numpy())
    value = source if given == wide else onnx.Cast(source, to=rows.dtype)
    reduction = FUNCTIONS[function].reduction
    z, k = onnx_split(reduction, value, wide)
    cells = int(rows.shape[0]) - 1

    def number(value: float) -> Any:
        constant: Any = onnx_ir.tensor(np.array(value, wide))
        return onnx.Constant(value=constant)

    position = onnx.Mul(onnx.Sub(z, number(low)) if low else z, number(cells / (high - low)))
    y: Any = onnx_take(rows, onnx.Clip(position, number(0), number(cells)))
    if right:
        y = onnx.Add(y, onnx.Mul(onnx.Relu(z), number(right)) if right != 1 else onnx.Relu(z))
    if left:
        y = onnx.Sub(y, onnx.Mul(onnx.Relu(onnx.Neg(z)), number(left)))
    y = onnx_join(reduction, y, k, wide)
    out: TReal = y if given == wide else onnx.CastLike(y, source)
    return out
