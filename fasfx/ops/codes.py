"""Spike codes as data: how a neuron turns a value into T spikes, and the closed form of their sum.

Everything here is in *count units*: `u = x * N / theta` goes in, an integer `n` comes out, and the decoded
value is `theta * n / N` with `N = capacity(steps, levels)`. Rounding is floor(u + 1/2) everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from torch import Tensor

from fasfx.ops import multi, radix, rate
from fasfx.ops.precision import working

T, LEVELS, THETA = sympy.symbols("T levels theta", positive=True)


@dataclass(frozen=True)
class Ticking:
    """One tick of a neuron whose input may change from tick to tick: its running estimate follows the input.

    unit:     levels -> the u that stands for the threshold; it does not depend on T.
    tick:     (u, sent, number of the tick from 1 on, levels, signed) -> what has been sent after it.
    reach:    the same arguments -> the spike without rounding, whose gradient stands in for the spike's.
    averages: whether the running estimate is what has been sent divided by the number of ticks, or just that.
    event:    (change of sent in a tick, levels) -> int8 event.
    """

    unit: Callable[[int], int]
    tick: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]
    reach: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]
    averages: bool
    event: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Code:
    """One row of the table of codes.

    capacity: (steps, levels) -> N, the count that stands for the threshold.
    count:    closed form, u -> n for constant input; shapes equal, dtype kept.
    spikes:   the neuron itself, u -> int8 events [steps, ...], one step at a time.
    decode:   events -> n, the weighted sum of the spikes.
    ticking:  one tick of the synchronous schedule; None if the code has none.
    settled:  steps after which a neuron group need not become more exact: those of a bound of about 2^-14 (rate 2^-12).
    rounds:   whether the closed form is round and clip, so that every count in between can be sent.
    activity: (u, steps) -> a smooth number of spikes, for losses that ask for fewer; no bound is claimed for it.
    bound:    largest |x - decoded x| for |x| <= theta and constant input, a sympy expression.
    source:   paper the neuron is from.
    """

    name: str
    capacity: Callable[[int, int], int]
    count: Callable[[Tensor, int, int, bool], Tensor]
    spikes: Callable[[Tensor, int, int, bool], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    ticking: Ticking | None
    settled: int
    rounds: bool
    activity: Callable[[Tensor, int], Tensor]
    bound: sympy.Expr
    source: str

    def limits(self, steps: int, levels: int, signed: bool) -> tuple[int, int]:
        """Smallest and largest count."""
        top = self.capacity(steps, levels)
        return (-top if signed else 0), top

    def error_bound(self, theta: float, steps: int, levels: int) -> float:
        """`bound` in the unit of theta."""
        return float(self.bound.subs({THETA: theta, T: steps, LEVELS: levels}))


def _round_and_clip(capacity: Callable[[int, int], int]) -> Callable[[Tensor, int, int, bool], Tensor]:
    def count(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
        top = capacity(steps, levels)
        rounded = working(u, top).add(0.5).floor_().clamp_(-top if signed else 0, top)
        return rounded.to(u.dtype)

    return count


RATE = Code(
    name="rate",
    capacity=rate.capacity,
    count=_round_and_clip(rate.capacity),
    spikes=rate.spikes,
    decode=rate.decode,
    ticking=Ticking(rate.unit, rate.tick, rate.reach, True, rate.event),
    settled=2048,
    rounds=True,
    activity=rate.activity,
    bound=THETA / (2 * T),
    source="Bu et al., ICLR 2022 (QCFS), eq. 9; FAS, arXiv 2502.04405",
)
RADIX = Code(
    name="radix",
    capacity=radix.capacity,
    count=_round_and_clip(radix.capacity),
    spikes=radix.spikes,
    decode=radix.decode,
    ticking=None,
    settled=14,
    rounds=True,
    activity=radix.activity,
    bound=THETA / (2 * (2**T - 1)),
    source="Stoeckl & Maass, Nature Machine Intelligence 2021; LAS, arXiv 2505.09659",
)
MULTI = Code(
    name="multi",
    capacity=multi.capacity,
    count=multi.count,
    spikes=multi.spikes,
    decode=multi.decode,
    ticking=Ticking(multi.unit, multi.tick, multi.reach, False, multi.event),
    settled=7,
    rounds=False,
    activity=multi.activity,
    bound=THETA * sympy.Max(sympy.Integer(4) ** (-T), sympy.Integer(2) ** (-LEVELS)),
    source="ECMT, arXiv 2502.21193; the nearest power of two in the linear sense quarters the worst case",
)
CODES: dict[str, Code] = {code.name: code for code in (MULTI, RADIX, RATE)}


def with_potential(x: Tensor, initial: Tensor | None, code: Code, steps: int) -> Tensor:
    """x plus what an initial potential amounts to for constant input: a rate neuron spreads it over its steps."""
    if initial is None:
        return x
    averages = code.ticking is not None and code.ticking.averages
    return x + (initial / steps if averages else initial)
