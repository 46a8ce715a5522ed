"""Rate code: integrate and fire with soft reset; every spike weighs the same."""

import torch
from torch import Tensor


def capacity(steps: int, levels: int) -> int:
    """N: a spike in every step."""
    return steps


def spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """v starts at half a threshold; scaled by T so that each step adds u and a spike takes T."""
    v = torch.full_like(u, steps / 2)
    events = []
    for _ in range(steps):
        v = v + u
        spike = (v >= steps).to(u.dtype)
        if signed:
            spike = spike - (v < 0).to(u.dtype)
        v = v - steps * spike
        events.append(spike.to(torch.int8))
    return torch.stack(events)


def decode(events: Tensor, levels: int) -> Tensor:
    """The number of spikes, int32."""
    return events.sum(0, dtype=torch.int32)


def unit(levels: int) -> int:
    """The threshold in a step graph: u = x / theta, so that nothing in it depends on T."""
    return 1


def tick(u: Tensor, sent: Tensor, number: Tensor, levels: int, signed: bool) -> Tensor:
    """N_t from N_(t-1): the neuron integrates t * u_t - N_(t-1), so that N_t / t follows u_t.

    A spike of -1 takes back what an earlier input had called for, also where the value itself is never negative.
    """
    return (u if signed else u.clamp(min=0)).mul(number).sub_(sent).add_(0.5).floor_().clamp_(-1, 1).add_(sent)


def reach(u: Tensor, sent: Tensor, number: Tensor, levels: int, signed: bool) -> Tensor:
    """What tick would send without rounding, for its gradient."""
    return ((u if signed else u.clamp(min=0)) * number - sent).clamp(-1, 1)


def event(spike: Tensor, levels: int) -> Tensor:
    """-1, 0, 1 from N_t - N_(t-1)."""
    return spike.to(torch.int8)


def activity(u: Tensor, steps: int) -> Tensor:
    """A smooth number of spikes: one for every count."""
    return u.abs().clamp(max=steps)
