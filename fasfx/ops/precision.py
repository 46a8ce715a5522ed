"""Whether a float format holds the counts of a neuron exactly, and the wider one where it does not."""

import math

import torch
from torch import Tensor


def mantissa_bits(dtype: torch.dtype) -> int:
    """Stored bits of the significand: 23 for float32."""
    return -int(math.log2(torch.finfo(dtype).eps))


def needs_double(bits: int, top: int) -> bool:
    """Whether half a count next to `top` has no place in a significand of so many stored bits."""
    return 2 * top >= 1 << bits


def working(u: Tensor, top: int) -> Tensor:
    """u itself, or in float64 where counts up to `top` and a half do not fit its significand."""
    return u.double() if needs_double(mantissa_bits(u.dtype), top) else u
