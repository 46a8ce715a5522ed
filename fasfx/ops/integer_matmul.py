"""`fasfx::integer_matmul`: spike counts meet spike counts."""

from typing import Any

import torch
from onnxscript import FLOAT, UINT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from torch import Tensor

from fasfx.ops.byte_count import LARGEST
from fasfx.ops.byte_value import onnx_byte_value
from fasfx.ops.library import LIBRARY

EXACT = 2**24 // LARGEST**2  # summands whose sum is exact in float32

LIBRARY.define("integer_matmul(Tensor a, Tensor b, int zero_a, int zero_b) -> Tensor")


def integer_matmul(a: Tensor, b: Tensor, zero_a: int, zero_b: int) -> Tensor:
    """(a - zero_a) @ (b - zero_b).

    Shape:  a [..., N, K], b [..., K, M] uint8; result [..., N, M] float32.   Unit: products of spike counts.
    Error:  none: the product is in integers, or in floats wide enough for them.   Grad: none.
    """
    kind = torch.float32 if a.shape[-1] <= EXACT else torch.float64
    return ((a.to(kind) - zero_a) @ (b.to(kind) - zero_b)).to(torch.float32)


def like_product(a: Tensor, b: Tensor, zero_a: int, zero_b: int) -> Tensor:
    """The shape rule of integer_matmul."""
    return torch.matmul(a.to(torch.float32), b.to(torch.float32))


LIBRARY.impl("integer_matmul", integer_matmul, "CompositeExplicitAutograd")
torch.library.register_fake("fasfx::integer_matmul", like_product, lib=LIBRARY)
op = torch.ops.fasfx.integer_matmul.default


@torch_op("fasfx::integer_matmul", trace_only=True)
def onnx_integer_matmul(a: UINT8, b: UINT8, zero_a: int, zero_b: int) -> FLOAT:
    """MatMul of dequantised bytes, which ONNX Runtime fuses into an integer product."""
    left: Any = onnx_byte_value(a, zero_a)
    right: Any = onnx_byte_value(b, zero_b)
    out: FLOAT = onnx.MatMul(left, right)
    return out
