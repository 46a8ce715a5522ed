"""The `fasfx` operator namespace.

Operators are registered as CompositeImplicitAutograd: one Python function is the eager kernel, the fake kernel
and the autograd formula; torch.export keeps it as one node, torch.compile looks inside and fuses it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18 as onnx
from torch import Tensor

LIBRARY = torch.library.Library("fasfx", "DEF")


def per_threshold(top: int, theta: Tensor) -> Tensor:
    """N / theta, correctly rounded: torch computes number / tensor as a reciprocal times the number."""
    return torch.full_like(theta, top) / theta


def straight_through(count: Tensor, u: Tensor, low: int, top: int) -> Tensor:
    """`count` forward, the gradient of clip(u, low, top) backward. Shapes equal."""
    if torch.is_grad_enabled() and u.requires_grad:
        clipped = u.clamp(low, top)
        return clipped + (count - clipped).detach()
    return count


def onnx_number(value: float, kind: Any) -> Any:
    """A constant of an ONNX graph, [], of a numpy dtype."""
    return onnx_tensor(np.array(value, kind))


def onnx_tensor(value: Any) -> Any:
    """A numpy array as a constant of an ONNX graph."""
    constant: Any = onnx_ir.tensor(value)
    return onnx.Constant(value=constant)
