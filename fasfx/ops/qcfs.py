"""`fasfx::qcfs`: quantise, clip, floor, shift; the trainable stand-in of a spiking neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from fasfx.ops.codes import CODES, with_potential
from fasfx.ops.library import LIBRARY, implement, per_threshold, straight_through

LIBRARY.define(
    "qcfs(Tensor x, Tensor theta, str code, int steps, int levels, bool signed, Tensor? initial=None) -> Tensor"
)


def qcfs(
    x: Tensor, theta: Tensor, code: str, steps: int, levels: int, signed: bool, initial: Tensor | None = None
) -> Tensor:
    """The value a neuron of threshold theta transmits for a constant input x.

    For the rate code this is QCFS with L = steps: theta * clip(floor(x L / theta + 1/2) / L, -1 or 0, 1); for
    the other codes it is their own closed form.

    initial: membrane potential before the first step, on top of theta / 2; None is 0 (fasfx.tune finds it).

    Shape:  x any, theta and initial broadcastable to x; result like x.   Unit: that of x.
    Error:  at most the code's bound for |x| <= theta.
    Grad:   straight-through inside the range; d/dtheta is the rounding error inside, +-1 outside (LSQ).
    Source: Bu et al., ICLR 2022, eq. 5; FAS stage I.
    """
    row = CODES[code]
    low, top = row.limits(steps, levels, signed)
    # In count units a gradient flows through x and theta both, so the learnable theta comes for free.
    wide = x.float() if x.dtype.itemsize < 4 else x  # counts are not exact in half precision (autocast)
    u = with_potential(wide, initial, row, steps) * per_threshold(top, theta)
    count = straight_through(row.count(u.detach(), steps, levels, signed), u, low, top)
    return (count * (theta / top)).to(x.dtype)


implement("qcfs", qcfs)
op = torch.ops.fasfx.qcfs.default
