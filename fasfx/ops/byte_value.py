"""`fasfx::byte_value`: spike counts that travel as bytes, for readers that compute in float."""

import numpy as np
import torch
from onnxscript import FLOAT, UINT8
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from torch import Tensor

from fasfx.ops.library import LIBRARY, implement, onnx_number

LIBRARY.define("byte_value(Tensor n, int zero) -> Tensor")


def byte_value(n: Tensor, zero: int) -> Tensor:
    """n - zero.   Shape: any, uint8; result float32.   Unit: spike counts.   Error: none.   Grad: none."""
    return n.to(torch.float32) - zero


implement("byte_value", byte_value, torch.float32)
op = torch.ops.fasfx.byte_value.default


@torch_op("fasfx::byte_value", trace_only=True)
def onnx_byte_value(n: UINT8, zero: int) -> FLOAT:
    """DequantizeLinear of scale 1."""
    out: FLOAT = onnx.DequantizeLinear(n, onnx_number(1, np.float32), onnx_number(zero, np.uint8))
    return out
