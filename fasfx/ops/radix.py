"""Radix code: few-spikes neuron; step t weighs 2^(T-t), sign and magnitude."""

import torch
from torch import Tensor

from fasfx.ops.precision import working


def capacity(steps: int, levels: int) -> int:
    """N: all binary digits 1."""
    return int(2**steps - 1)


def spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """v = u + 1/2 ends in [0, 1): what has been sent is then floor(u + 1/2)."""
    top = capacity(steps, levels)
    v = working(u, top).clamp(-top if signed else 0, top) + 0.5
    negative = v < 0
    events = []
    for weight in (2.0**k for k in reversed(range(steps))):
        spike = torch.where(negative, -(v < 1 - weight).to(v.dtype), (v >= weight).to(v.dtype))
        v = v - weight * spike
        events.append(spike.to(torch.int8))
    return torch.stack(events)


def decode(events: Tensor, levels: int) -> Tensor:
    """The binary number the spikes write, int32."""
    steps = events.shape[0]
    weights = 2 ** torch.arange(steps - 1, -1, -1, dtype=torch.int32, device=events.device)
    return (events * weights.view(-1, *[1] * (events.dim() - 1))).sum(0, dtype=torch.int32)


def activity(u: Tensor, steps: int) -> Tensor:
    """A smooth number of spikes: half of the digits that u has."""
    return u.abs().add(1).log2().clamp(max=steps) / 2
