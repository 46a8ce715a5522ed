"""`fasfx::hadamard`: sums and differences of adjacent channels, which spread a large one over its block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxscript import opset18 as onnx
from onnxscript.function_libs.torch_lib.registration import torch_op
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from torch import Tensor

from fasfx.ops.library import LIBRARY, implement, onnx_tensor

LIBRARY.define("hadamard(Tensor x, int size) -> Tensor")


def sylvester(size: int) -> Tensor:
    """Hadamard matrix [size, size] of ones and minus ones, for a power of two, in float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(size.bit_length() - 1):
        found = torch.kron(found, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return found


def hadamard(x: Tensor, size: int) -> Tensor:
    """Every block of `size` adjacent channels times `sylvester(size)`.

    Shape:  x [..., D], size a power of two that divides D; result like x.   Unit: that of x.
    Error:  rounding of the sums.   Twice the same is `size` times x.   Grad: the same of the gradient.
    Source: Sylvester's matrix; QuaRot, Ashkboos et al., NeurIPS 2024, section 3.
    """
    out: Tensor = (x.unflatten(-1, (-1, size)) @ sylvester(size).to(x)).flatten(-2)
    return out


implement("hadamard", hadamard)
op = torch.ops.fasfx.hadamard.default


@torch_op("fasfx::hadamard", trace_only=True)
def onnx_hadamard(x: TReal, size: int) -> TReal:
    """A MatMul of blocks."""
    value: Any = x
    rows = [0] * (len(value.shape) - 1)
    matrix = sylvester(size).numpy().astype(value.dtype.numpy())
    blocks: Any = onnx.Reshape(value, onnx_tensor(np.array([*rows, -1, size])))
    product: Any = onnx.MatMul(blocks, onnx_tensor(matrix))
    out: TReal = onnx.Reshape(product, onnx_tensor(np.array([*rows, value.shape[-1]])))
    return out
