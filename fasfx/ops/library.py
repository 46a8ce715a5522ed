"""The `fasfx` operator namespace.

Operators are registered as CompositeImplicitAutograd: one Python function is the eager kernel, the fake kernel
and the autograd formula; torch.export keeps it as one node, torch.compile looks inside and fuses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fasfx", "DEF")


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` forward, the gradient of `surrogate` backward. Shapes equal."""
    if torch.is_grad_enabled() and surrogate.requires_grad:
        return surrogate + (value - surrogate).detach()
    return value
