"""Spike codes as data: how a neuron turns a value into T spikes, and the closed form of their sum.

Everything here is in *count units*: `u = x * N / theta` goes in, an integer `n` comes out, and the decoded
value is `theta * n / N` with `N = capacity(steps, levels)`. Rounding is floor(u + 1/2) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

T, LEVELS, THETA = sympy.symbols("T levels theta", positive=True)


@dataclass(frozen=True)
class Code:
    """One row of the table of codes.

    capacity: (steps, levels) -> N, the count that stands for the threshold.
    count:    closed form, u -> n for constant input; shapes equal, dtype kept.
    spikes:   the neuron itself, u -> int8 events [steps, ...], one step at a time.
    decode:   events -> n, the weighted sum of the spikes.
    bound:    largest |x - decoded x| for |x| <= theta and constant input, a sympy expression.
    source:   paper the neuron is from.
    """

    name: str
    capacity: Callable[[int, int], int]
    count: Callable[[Tensor, int, int, bool], Tensor]
    spikes: Callable[[Tensor, int, int, bool], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    bound: sympy.Expr
    source: str

    def limits(self, steps: int, levels: int, signed: bool) -> tuple[int, int]:
        """Smallest and largest count."""
        top = self.capacity(steps, levels)
        return (-top if signed else 0), top

    def error_bound(self, theta: float, steps: int, levels: int) -> float:
        """`bound` in the unit of theta."""
        return float(self.bound.subs({THETA: theta, T: steps, LEVELS: levels}))


# --- rate: integrate and fire with soft reset; every spike weighs the same --------------------------------


def _rate_spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
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


def _rate_decode(events: Tensor, levels: int) -> Tensor:
    return events.sum(0, dtype=torch.int32)


# --- radix: few-spikes neuron; step t weighs 2^(T-t), sign and magnitude ----------------------------------


def _radix_spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """v = u + 1/2 ends in [0, 1): what has been sent is then floor(u + 1/2)."""
    low, top = RADIX.limits(steps, levels, signed)
    v = working(u, top).clamp(low, top) + 0.5
    negative = v < 0
    events = []
    for weight in (2.0**k for k in reversed(range(steps))):
        spike = torch.where(negative, -(v < 1 - weight).to(v.dtype), (v >= weight).to(v.dtype))
        v = v - weight * spike
        events.append(spike.to(torch.int8))
    return torch.stack(events)


def _radix_decode(events: Tensor, levels: int) -> Tensor:
    steps = events.shape[0]
    weights = 2 ** torch.arange(steps - 1, -1, -1, dtype=torch.int32, device=events.device)
    return (events * weights.view(-1, *[1] * (events.dim() - 1))).sum(0, dtype=torch.int32)


def _round_and_clip(capacity: Callable[[int, int], int]) -> Callable[[Tensor, int, int, bool], Tensor]:
    def count(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
        top = capacity(steps, levels)
        rounded = working(u, top).add(0.5).floor_().clamp_(-top if signed else 0, top)
        return rounded.to(u.dtype)

    return count


def mantissa_bits(dtype: torch.dtype) -> int:
    """Stored bits of the significand: 23 for float32."""
    return -int(math.log2(torch.finfo(dtype).eps))


def needs_double(bits: int, top: int) -> bool:
    """Whether half a count next to `top` has no place in a significand of so many stored bits."""
    return 2 * top >= 1 << bits


def working(u: Tensor, top: int) -> Tensor:
    """u itself, or in float64 where counts up to `top` and a half do not fit its significand."""
    return u.double() if needs_double(mantissa_bits(u.dtype), top) else u


# --- multi: multi-threshold neuron; each step sends the signed power of two nearest to what is unsent ------


def _multi_spikes(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """Thresholds 1/2, 3/2, 3, 6, ... part silence, 1, 2, 4, 8, ...: one comparison ladder per step.

    An event is +-(i + 1) with i the level, whose spike weighs theta * 2^-i, that is 2^(levels - 1 - i) counts.
    """
    low, top = MULTI.limits(steps, levels, signed)
    u = working(u, top).clamp(low, top)
    ladder = torch.tensor([0.5] + [1.5 * 2.0**k for k in range(levels - 1)], dtype=u.dtype, device=u.device)
    sent = torch.zeros_like(u)
    events = []
    for _ in range(steps):
        unsent = (u - sent).contiguous()
        up = torch.bucketize(unsent, ladder, right=True)
        down = torch.bucketize(-unsent, ladder)
        rank = up + down  # 0 is silence, k sends 2^(k - 1) counts
        sign = (up > 0).to(torch.int8) - (down > 0).to(torch.int8)
        sent = sent + sign * torch.where(rank > 0, 2.0 ** (rank - 1), 0.0).to(u.dtype)
        events.append(torch.where(rank > 0, levels + 1 - rank, 0).to(torch.int8) * sign)
    return torch.stack(events)


def _multi_decode(events: Tensor, levels: int) -> Tensor:
    size = torch.where(events == 0, 0, 2 ** (levels - events.abs().to(torch.int32)))
    return (size * events.sign()).sum(0, dtype=torch.int32)


def _multi_count(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
    """The same spikes without a ladder.

    Comparisons with the ladder only need the half of a count that u lies in, so u is replaced by the middle of
    that half: r = floor(2u) + 1/2, in half counts, never a tie. The nearest power of two (3 * 2^k divides
    2^(k+1) from 2^(k+2)) is r rounded to one significant bit, which is Veltkamp's splitting
    c - (c - r), c = (2^p + 1) r, p = mantissa bits: three exact float operations in every backend.
    r = +-1/2 means silence; it is sent here as +-1/2 and the last floor takes it away.
    """
    low, top = MULTI.limits(steps, levels, signed)
    wide = working(u, top)
    split = 2.0 ** mantissa_bits(wide.dtype) + 1
    halves = wide.mul(2).clamp_(2 * low, 2 * top).floor_()
    unsent = halves.add(0.5)
    for _ in range(steps):
        spike = unsent.mul(split)
        spike = spike.sub_(spike.sub(unsent))
        unsent = unsent.sub_(spike)
    return halves.sub_(unsent).mul_(0.5).add_(0.75).floor_().to(u.dtype)


RATE = Code(
    name="rate",
    capacity=lambda steps, levels: steps,
    count=_round_and_clip(lambda steps, levels: steps),
    spikes=_rate_spikes,
    decode=_rate_decode,
    bound=THETA / (2 * T),
    source="Bu et al., ICLR 2022 (QCFS), eq. 9; FAS, arXiv 2502.04405",
)
RADIX = Code(
    name="radix",
    capacity=lambda steps, levels: 2**steps - 1,
    count=_round_and_clip(lambda steps, levels: 2**steps - 1),
    spikes=_radix_spikes,
    decode=_radix_decode,
    bound=THETA / (2 * (2**T - 1)),
    source="Stoeckl & Maass, Nature Machine Intelligence 2021; LAS, arXiv 2505.09659",
)
MULTI = Code(
    name="multi",
    capacity=lambda steps, levels: 2 ** (levels - 1),
    count=_multi_count,
    spikes=_multi_spikes,
    decode=_multi_decode,
    bound=THETA * sympy.Max(sympy.Integer(4) ** (-T), sympy.Integer(2) ** (-LEVELS)),
    source="ECMT, arXiv 2502.21193; the nearest power of two in the linear sense quarters the worst case",
)
CODES: dict[str, Code] = {code.name: code for code in (MULTI, RADIX, RATE)}
