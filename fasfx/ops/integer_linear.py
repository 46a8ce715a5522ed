"""`fasfx::integer_linear`: spike counts meet int8 weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxscript import INT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TInt, TReal
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fasfx.ops.byte_value import onnx_byte_value
from fasfx.ops.library import LIBRARY, onnx_tensor

_PACKED = WeakIdKeyDictionary()  # weight -> the same in oneDNN's layout, made when first used

LIBRARY.define("integer_linear(Tensor n, Tensor weight, Tensor scale, Tensor? bias, int zero) -> Tensor")


def integer_linear(n: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, zero: int) -> Tensor:
    """((n - zero) @ weight + bias) * scale.

    Shape:  n [..., I] uint8, or counts in float with zero = 0; weight [I, O] int8; scale [O]; bias [O] int32;
            result [..., O] like scale.
    Unit:   weight * scale is what one spike count adds to the current.
    Error:  none for bytes: the sum is in integers (int32 on a CPU), up to 2^24 in float. For counts in float, rounding
            of the sums.
    Grad:   none for bytes.
    """
    if n.dtype != torch.uint8:
        return F.linear(n, (weight.to(scale.dtype) * scale).t(), None if bias is None else bias * scale)
    if n.is_cpu and scale.dtype == torch.float32:
        if bias is None:
            return _onednn(n, weight, scale, None, zero)
        return _onednn(n, weight, torch.ones_like(scale), bias.to(scale.dtype), zero).mul_(scale)
    product = (n.to(torch.float64) - zero) @ weight.to(torch.float64)
    return (product if bias is None else product + bias).to(scale.dtype) * scale


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
def onnx_integer_linear(n: TReal, weight: INT8, scale: TReal, bias: TInt | None, zero: int) -> TReal:
    """MatMul of dequantised bytes and weights, or Gemm where a bias meets rows: ONNX Runtime does both in integers."""
    counts: Any = n
    factor: Any = scale
    added: Any = bias
    sent, matrix = counts.dtype.numpy() == np.uint8, len(counts.shape) == 2
    if sent:
        counts = onnx_byte_value(counts, zero)
    if sent and matrix and bias is not None:
        none = onnx_tensor(np.zeros(factor.shape, np.int8))  # without it ONNX Runtime multiplies in float
        weights = onnx.DequantizeLinear(weight, factor, none, axis=1)
        gemm: TReal = onnx.Gemm(counts, weights, onnx.DequantizeLinear(added, factor, axis=0))
        return gemm
    product: Any = onnx.MatMul(counts, onnx.DequantizeLinear(weight, factor, axis=1))
    out: TReal = product if bias is None else onnx.Add(product, onnx.Mul(onnx.CastLike(added, factor), factor))
    return out
