"""`fasfx::fire`: a spiking neuron, simulated step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from fasfx.ops.codes import CODES, with_potential
from fasfx.ops.library import LIBRARY, implement, per_threshold, straight_through

LIBRARY.define(
    "fire(Tensor x, Tensor theta, str code, int steps, int levels, bool signed, Tensor? initial=None) -> Tensor"
)


def fire(
    x: Tensor, theta: Tensor, code: str, steps: int, levels: int, signed: bool, initial: Tensor | None = None
) -> Tensor:
    """Send x as `steps` spikes and return their decoded sum, theta * n / N.

    With theta = N (the code's capacity) the result is the spike count n itself: that is how `fold` writes it.

    initial: membrane potential before the first step, on top of theta / 2; None is 0 (fasfx.tune finds it).

    Shape:  x any, theta and initial broadcastable to x; result like x.   Unit: that of x.
    Error:  at most the code's bound for constant input, |x| <= theta, initial potential theta / 2.
    Grad:   surrogate: that of clip(x, -theta or 0, theta) for x; what was rounded off for theta, as in qcfs.
    Source: the code's row in fasfx.ops.codes.
    """
    row = CODES[code]
    low, top = row.limits(steps, levels, signed)
    x = with_potential(x, initial, row, steps)
    u = x * per_threshold(top, theta)
    events = row.spikes(u.detach(), steps, levels, signed)
    count = straight_through(row.decode(events, levels).to(u.dtype), u, low, top)
    return count * (theta / top)


implement("fire", fire)
op = torch.ops.fasfx.fire.default
