"""Error feedback: int8 weights chosen for the inputs that a layer sees, not one by one.

Source: GPTQ, Frantar et al., ICLR 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasfx.integer import step
from fasfx.ops.byte_count import LARGEST

WIDEST_BLOCK = 1024  # channels whose second moments are kept together: memory and time grow with it
COLUMNS = 64  # rounded before the columns after them are brought up to date
UP = 0.501  # rounds a half up, also one that float arithmetic has made a little less
DAMPING = 0.01  # what every channel is taken to have of its own, as a share of the mean square


def block_of(width: int) -> int:
    """The largest even divisor of a width that is at most WIDEST_BLOCK, or a small width itself."""
    if width <= WIDEST_BLOCK:
        return width
    return next((size for size in range(WIDEST_BLOCK, 1, -2) if width % size == 0), 1)


def fed_back(weight: Tensor, pair: int, moment: Tensor) -> Tensor:
    """Weights [O, I] near the given ones that `rounded` keeps as they are, for inputs of moment [K, I / K, I / K].

    Column by column: what rounding one changes in the output, those of its block that are still to come make up for,
    by least squares. The columns that give a row its step are rounded to the nearest, so that it stays the step.
    """
    scale = step(weight.float(), pair)[:, None]
    blocks, size = moment.shape[:2]
    exact = (weight.float() / scale).t().unflatten(0, (blocks, size)).contiguous()  # [K, I / K, O]
    keeps = exact.abs() >= exact.abs().amax((0, 1))
    pairs = F.pad(exact.abs(), (0, 0, 0, size % 2)).unflatten(1, (-1, 2)).sum(2)
    keeps |= (pairs >= pairs.amax((0, 1))).repeat_interleave(2, 1)[:, :size]
    factor = feedback(moment.to(exact))
    left, found = exact.clone(), torch.zeros_like(exact)
    for first in range(0, size, COLUMNS):
        last = min(first + COLUMNS, size)
        errors = torch.zeros_like(exact[:, first:last])
        for at in range(first, last):
            room = pair - 1 - found[:, at - 1].abs() if at % 2 else torch.full_like(found[:, at], LARGEST)
            wanted = torch.where(keeps[:, at], exact[:, at], left[:, at])
            whole = torch.where(keeps[:, at], (wanted.abs() + UP).floor(), wanted.abs().round())
            found[:, at] = whole.minimum(room).clamp(max=LARGEST).copysign(wanted)
            errors[:, at - first] = (left[:, at] - found[:, at]) / factor[:, at, at, None]
            left[:, at + 1 : last] -= factor[:, at, at + 1 : last, None] * errors[:, at - first, None]
        left[:, last:] -= factor[:, first:last, last:].mT @ errors
    return (found.flatten(0, 1).t() * scale).to(weight)


def feedback(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of moments [K, D, D]: row d says what column d leaves to those after it."""
    own = moment.diagonal(dim1=-2, dim2=-1)
    least = DAMPING * own.mean(-1, keepdim=True) + torch.finfo(moment.dtype).tiny
    damped = moment + torch.diag_embed(least.expand_as(own))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
