"""Orthogonal matrices that spread a vector's large entries over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasfx.ops.hadamard import sylvester


def rotation(size: int) -> Tensor:
    """[size, size] in float64: a Hadamard matrix, its rows with random signs; sizes that are no power of two times
    an odd number take a cosine transform for the odd part.

    Source: QuaRot, Ashkboos et al., NeurIPS 2024, section 3.
    """
    power = size & -size
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * torch.kron(sylvester(power) / math.sqrt(power), cosines(size // power).contiguous())


def blockwise(size: int) -> Tensor:
    """[size, size] in float64: a Hadamard matrix for every block of the largest power of two that divides the size."""
    power = size & -size
    return torch.kron(torch.eye(size // power, dtype=torch.float64), sylvester(power) / math.sqrt(power))


def cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II)."""
    k, n = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    found = torch.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
    found[0] /= math.sqrt(2)
    return found


def without_mean(size: int) -> Tensor:
    """x @ this is x - mean(x): what a layer norm does first."""
    return torch.eye(size, dtype=torch.float64) - 1 / size
