"""The `fasfx` operator namespace.

Operators are registered as CompositeImplicitAutograd: one Python function is the eager kernel, the fake kernel
and the autograd formula; torch.export keeps it as one node, torch.compile looks inside and fuses it.
"""

from __future__ import annotations

import torch
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
