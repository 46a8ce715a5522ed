"""`fasfx::byte_count`: a unit-threshold neuron in closed form whose spike count travels as one byte."""

from typing import Any

import numpy as np
import torch
from onnxscript import UINT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.codes import CODES
from fasfx.ops.library import LIBRARY, implement, onnx_number

LARGEST = 127  # count or weight of a byte, whatever its sign
WIDEST = 2**15 - 1  # a signed number of 16 bits

LIBRARY.define("byte_count(Tensor u, str code, int steps, int levels, bool signed) -> Tensor")


def byte_count(u: Tensor, code: str, steps: int, levels: int, signed: bool) -> Tensor:
    """The spike count n that `fasfx::count` gives, plus `zero_of` it, as uint8.

    Shape:  any.   Unit: spike counts; for codes that round (radix, rate) with N of at most 127.
    Error:  none, but for u half way between two counts: here the even one wins, as in ONNX Runtime's QuantizeLinear,
            where floor(u + 1/2) takes the upper one.
    Grad:   none.
    Source: the code's row in fasfx.ops.codes.
    """
    low, top = CODES[code].limits(steps, levels, signed)
    return u.round().clamp(low, top).add(zero_of(code, steps, levels, signed)).to(torch.uint8)


def zero_of(code: str, steps: int, levels: int, signed: bool) -> int:
    """The byte that stands for no spikes: N + 1 for a signed neuron, so that 0 is never sent, else 0."""
    low, top = CODES[code].limits(steps, levels, signed)
    return top + 1 if low < 0 else 0


def fits(code: str, steps: int, levels: int) -> bool:
    """Whether every count of a neuron is a byte."""
    row = CODES[code]
    return row.rounds and row.capacity(steps, levels) <= LARGEST


def pair_limit(code: str, steps: int, levels: int, signed: bool) -> int:
    """The largest sum of two adjacent weights' magnitudes whose products with this neuron's counts nothing saturates.

    A processor without VNNI adds the products of two adjacent bytes in 16 bits. Counts in float have no such limit.
    """
    if not fits(code, steps, levels):
        return 2 * LARGEST
    _, top = CODES[code].limits(steps, levels, signed)
    return min(2 * LARGEST, WIDEST // (top + zero_of(code, steps, levels, signed)))


implement("byte_count", byte_count, torch.uint8)
op = torch.ops.fasfx.byte_count.default


@torch_op("fasfx::byte_count", trace_only=True)
def onnx_byte_count(u: TReal, code: str, steps: int, levels: int, signed: bool) -> UINT8:
    """QuantizeLinear of scale 1, then a Clip of bytes."""
    low, top = CODES[code].limits(steps, levels, signed)
    source: Any = u
    zero = zero_of(code, steps, levels, signed)
    ends = (onnx_number(end + zero, np.uint8) for end in (low, top))
    one = onnx_number(1, np.dtype(source.dtype.numpy()))
    out: UINT8 = onnx.Clip(onnx.QuantizeLinear(source, one, onnx_number(zero, np.uint8)), *ends)
    return out
