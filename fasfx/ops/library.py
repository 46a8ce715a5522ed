"""The `fasfx` operator namespace.

Operators are registered as CompositeImplicitAutograd: one Python function is the eager kernel and the autograd
formula; torch.export keeps it as one node, torch.compile looks inside and fuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18 as onnx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

LIBRARY = torch.library.Library("fasfx", "DEF")


def implement(name: str, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> None:
    """Registers an operator whose result is like its first argument, or like that in another dtype.

    A fake tensor that nobody traces or differentiates asks for the shape only. torch takes no fake kernel for a
    composite operator, and would go through every step of the function: half the time of an export.
    """

    def kernel(x: Tensor, *given: Any) -> Tensor:
        if isinstance(x, FakeTensor) and get_proxy_mode() is None and not _learns(x, *given):
            return torch.empty_like(x, dtype=dtype)
        return function(x, *given)

    LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")


def _learns(*given: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in given)


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
