"""`fasfx::byte_lookup`: a group of exponentials and the neuron that sends its value, as one table of bytes."""

from typing import Any

import numpy as np
import torch
from onnxscript import UINT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.library import LIBRARY, implement, onnx_number
from fasfx.ops.reductions import onnx_take

LIBRARY.define("byte_lookup(Tensor x, Tensor table, float rate, int low, int high) -> Tensor")


def byte_lookup(x: Tensor, table: Tensor, rate: float, low: int, high: int) -> Tensor:
    """The byte that `fasfx::byte_count` makes of a value of `fasfx::lookup`, ties apart.

    table: the byte of every cell of width 1/rate, from `low` <= 0 to `high` >= 0; beyond them bytes stay what they are
           there. Cells from 0 on come first, then those from `low` to -1: a negative index counts from the end.

    Shape:  x any, table [high - low + 1], uint8; result like x.   Unit: spike counts.
    Error:  that of the group and its neuron.
    Grad:   none.
    Source: decision 12.
    """
    return table[(x * rate).clamp(low, high).floor().to(torch.int64)]


implement("byte_lookup", byte_lookup, torch.uint8)
op = torch.ops.fasfx.byte_lookup.default


@torch_op("fasfx::byte_lookup", trace_only=True)
def onnx_byte_lookup(x: TReal, table: UINT8, rate: float, low: int, high: int) -> UINT8:
    """Mul, Clip, Floor, Cast and GatherElements."""
    source: Any = x
    kind = np.dtype(source.dtype.numpy())
    cell = onnx.Mul(source, onnx_number(rate, kind))
    out: UINT8 = onnx_take(table, onnx.Floor(onnx.Clip(cell, onnx_number(low, kind), onnx_number(high, kind))))
    return out
