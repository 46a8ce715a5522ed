"""`fasfx::integer_linear`: spike counts meet int8 weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxscript import INT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fasfx.ops.library import LIBRARY, onnx_number, onnx_tensor

_PACKED = WeakIdKeyDictionary()  # weight -> the same in oneDNN's layout, made when first used

LIBRARY.define("integer_linear(Tensor n, Tensor weight, Tensor scale, Tensor? bias, int zero) -> Tensor")


def integer_linear(n: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, zero: int) -> Tensor:
    """(n - zero) @ weight * scale + bias.

    Shape:  n [..., I] uint8, or counts in float with zero = 0; weight [I, O] int8; scale and bias [O]; result [..., O]
            like scale.
    Unit:   weight * scale is what one spike count adds to the current.
    Error:  none for bytes: the product is in integers (int32 on a CPU). For counts in float, rounding of the sums.
    Grad:   none for bytes.
    """
    if n.dtype != torch.uint8:
        return F.linear(n, (weight.to(scale.dtype) * scale).t(), bias)
    if n.is_cpu and scale.dtype == torch.float32:
        return _onednn(n, weight, scale, bias, zero)
    product = (n.to(torch.float64) - zero) @ weight.to(torch.float64)
    current = product.to(scale.dtype) * scale
    return current if bias is None else current + bias


def _onednn(n: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, zero: int) -> Tensor:
    if weight not in _PACKED:
        _PACKED[weight] = (
            torch.ops.onednn.qlinear_prepack(weight.t().contiguous(), None),
            torch.zeros(len(scale), dtype=torch.int64),
        )
    packed, zeros = _PACKED[weight]
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        n.contiguous(), 1.0, zero, packed, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def like(n: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, zero: int) -> Tensor:
    """The shape rule."""
    return scale.new_empty(*n.shape[:-1], weight.shape[-1])


LIBRARY.impl("integer_linear", integer_linear, "CompositeExplicitAutograd")
torch.library.register_fake("fasfx::integer_linear", like, lib=LIBRARY)
op = torch.ops.fasfx.integer_linear.default


@torch_op("fasfx::integer_linear", trace_only=True)
def onnx_integer_linear(n: TReal, weight: INT8, scale: TReal, bias: TReal | None, zero: int) -> TReal:
    """MatMul of dequantised bytes and weights, which ONNX Runtime fuses into an integer product."""
    shape: Any = n.shape
    factor: Any = scale
    counts: Any = n
    flat = len(shape) == 2  # a MatMul of matrices and its bias would become a Gemm, which is not fused
    if flat:
        counts = onnx.Unsqueeze(counts, onnx_tensor(np.array([0])))
    if n.dtype.numpy() == np.uint8:
        one = onnx_number(1, np.dtype(factor.dtype.numpy()))
        counts = onnx.DequantizeLinear(counts, one, onnx_number(zero, np.uint8))
    product: Any = onnx.MatMul(counts, onnx.DequantizeLinear(weight, factor, axis=1))
    current = product if bias is None else onnx.Add(product, bias)
    out: TReal = onnx.Squeeze(current, onnx_tensor(np.array([0]))) if flat else current
    return out
