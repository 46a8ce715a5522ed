"""`fasfx::integer_embedding`: looked-up rows of int8 weights."""

from typing import Any

import torch
from onnxscript import INT8, INT64
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor
from torch.nn import functional as F

from fasfx.ops.library import LIBRARY

LIBRARY.define("integer_embedding(Tensor weight, Tensor scale, Tensor indices) -> Tensor")


def integer_embedding(weight: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    """weight[indices] * scale[indices].

    Shape:  weight [V, D] int8, scale [V, 1], indices any, int; result [..., D] like scale.   Unit: that of scale.
    Error:  none.   Grad: none.
    """
    return F.embedding(indices, weight).to(scale.dtype) * F.embedding(indices, scale)


LIBRARY.impl("integer_embedding", integer_embedding, "CompositeImplicitAutograd")
op = torch.ops.fasfx.integer_embedding.default


@torch_op("fasfx::integer_embedding", trace_only=True)
def onnx_integer_embedding(weight: INT8, scale: TReal, indices: INT64) -> TReal:
    """Two Gathers and a product."""
    rows: Any = weight
    scales: Any = scale
    factor = onnx.Gather(scales, indices)
    values = onnx.Cast(onnx.Gather(rows, indices), to=scales.dtype)
    out: TReal = onnx.Mul(values, factor)
    return out
