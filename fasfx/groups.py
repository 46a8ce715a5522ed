"""Neuron groups: K neurons that share one input and together send a function of it.

A group is piecewise linear. Breakpoints lie where halving the segment with the largest error puts them, so that the
errors of all segments come close to each other; every threshold is a power of two times the smallest spike `unit`,
so that one look-up of the input's count gives the sum of all neurons' spikes. Bounds are certified, not sampled.
Source of the form: universal group operators, Jiang et al., STA, ICLR 2024; theirs are trained, these are computed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import sympy
import torch
from torch import Tensor

from fasfx.errors import ConfigError
from fasfx.intervals import Enclosure
from fasfx.ops.codes import CODES, LEVELS, THETA, T
from fasfx.ops.functions import FUNCTIONS, Function, X, numeric

QUARTER = 0.25  # of a neuron's bound; docs/decisions/0009-neuron-groups.md has the figures
MOST_LEVELS = 24  # more than any code has: what is left is what T steps leave unsent
_SAMPLES = 33
Piece = tuple[float, float]  # both ends of a segment


@dataclass(frozen=True, eq=False)
class Group:
    """A function's group for one code; equal only to itself.

    edges, values: float64 [K + 1], the breakpoints and what the group gives there, ramps of the tails aside.
    unit:   the input that one count stands for; every neuron's threshold is unit * 2^j.
    rest:   the breakpoint where no neuron spikes; those left of it fire for what is missing to it.
    code, steps: the neurons'.
    shape:  certified sup |f - piecewise linear|, tails and all.   sent: bound of what T spikes cost on top.
    """

    function: str
    edges: Tensor
    values: Tensor
    unit: float
    rest: float
    code: str
    steps: int
    shape: float
    sent: float

    @property
    def size(self) -> int:
        """K."""
        return len(self.edges) - 1

    @property
    def bound(self) -> float:
        """sup |f - what the group gives| over the core's interval and the tails, but for float rounding."""
        return self.shape + self.sent


@lru_cache(maxsize=256)
def group(
    name: str, code: str, steps: int, levels: int, size: int | None = None, span: tuple[float, float] | None = None
) -> Group:
    """The group of a function: of `size` neurons, or of the fewest (a power of two) that are exact enough.

    Rate and radix neurons of few steps can only be so wide: they may be more, then not a power of two.

    One neuron of the code with threshold 1 errs by at most code.bound(T), about as often up as down. A group's error
    is the same for equal inputs and adds up, so it may be a QUARTER of that; it need not go below the bound of the
    code's settled neuron.
    span: the calibrated range, for functions without tails. Computed once, then cached.
    Raises ConfigError for a function that is not finite on its range, or a size that the range has no room for.
    """
    row, function = CODES[code], FUNCTIONS[name]
    tolerance = max(QUARTER * row.error_bound(1.0, steps, levels), row.error_bound(1.0, row.settled, MOST_LEVELS))
    if function.needs_range:
        assert span is not None, f"{name} needs a calibrated range"
        curve = _Curve(function, *_on_grid(*span))
        tolerance *= curve.largest
    else:
        curve = _Curve(function, *(function.interval or _where_tails_begin(function, tolerance / 4)))
    # Half a count is worth a quarter of the tolerance, and a flat curve still has room for its neurons.
    room = (curve.high - curve.low) / (2 * (size or 2))
    unit = 2.0 ** math.floor(math.log2(min(tolerance / 2 / curve.steepest, room)))
    widest = unit * 2 ** (row.capacity(steps, levels).bit_length() - 1)
    k, pieces = size or 2, [*_powers_of_two(curve.rest, curve.low), *_powers_of_two(curve.rest, curve.high)]
    while True:
        pieces = _split(curve, pieces, k, unit, widest)
        found = _fit(curve, pieces, unit, code, steps)
        if size is not None or found.bound <= tolerance:
            return found
        k = max(2 * k, found.size)


class _Curve:
    """A core on its interval without the ramps of its tails: what the neurons have to bend to."""

    def __init__(self, function: Function, low: float, high: float) -> None:
        self.function, self.low, self.high = function, low, high
        self.rest = 0.0 if low < 0 < high else low
        self._value, self.enclosure = numeric(function.core), Enclosure(function.core)

    def ramp(self, x: Tensor) -> Tensor:
        left, right = self.function.left or (0.0, 0.0), self.function.right or (0.0, 0.0)
        return left[0] * x.clamp(max=0) + right[0] * x.clamp(min=0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._value(x) - self.ramp(x)

    def error(self, low: Tensor, high: Tensor) -> Tensor:
        """The signed deviation of every chord from the curve, where it is largest; low, high and result [K]."""
        share = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
        y = self(low[:, None] + (high - low)[:, None] * share)
        gap = torch.lerp(y[:, :1], y[:, -1:], share) - y
        return gap.gather(1, gap.abs().argmax(1, keepdim=True)).squeeze(1)

    @property
    def steepest(self) -> float:
        """The largest slope between sampled points; not 0."""
        x, y = self._sampled
        return max(float((y.diff() / x.diff()).abs().max()), 2.0**-40)

    @property
    def largest(self) -> float:
        """The largest sampled |value|; not 0."""
        return max(float(self._sampled[1].abs().max()), 2.0**-40)

    @cached_property
    def _sampled(self) -> tuple[Tensor, Tensor]:
        y = self(x := torch.linspace(self.low, self.high, 4097, dtype=torch.float64))
        if not bool(y.isfinite().all()):
            raise ConfigError(
                f"{self.function.name} is not finite on the range of its input, [{self.low}, {self.high}]"
            )
        return x, y


def _split(curve: _Curve, pieces: list[Piece], size: int, unit: float, widest: float) -> list[Piece]:
    """At least `size` segments by halving the worst of these, and more until none is wider than `widest`."""
    heap = [*_ranked(curve, pieces, widest)]
    heapq.heapify(heap)
    while len(heap) < size or heap[0][0] == -math.inf:
        _, (a, b) = heapq.heappop(heap)
        if b - a <= unit:
            raise ConfigError(f"{size} neurons for {curve.function.name} are more than its input can tell apart")
        for half in _ranked(curve, [(a, (a + b) / 2), ((a + b) / 2, b)], widest):
            heapq.heappush(heap, half)
    return sorted(piece for _, piece in heap)


def _ranked(curve: _Curve, pieces: list[Piece], widest: float) -> Iterator[tuple[float, Piece]]:
    """Segments behind what sorts the worst first."""
    low, high = torch.tensor(pieces, dtype=torch.float64).T
    badness = curve.error(low, high).abs().masked_fill(high - low > widest, math.inf)
    return zip((-badness).tolist(), pieces, strict=True)


def _fit(curve: _Curve, pieces: list[Piece], unit: float, code: str, steps: int) -> Group:
    """The group with these segments."""
    function = curve.function
    edges = torch.tensor([a for a, _ in pieces] + [pieces[-1][1]], dtype=torch.float64)
    errors = curve.error(edges[:-1], edges[1:])
    # Each segment's chord lies on one side of the curve: half its error moves it to the middle.
    padded = torch.cat([errors[:1], errors, errors[-1:]])
    values = curve(edges) - (padded[:-1] + padded[1:]) / 4
    for tail, place in ((function.left, 0), (function.right, -1)):
        if tail is not None:
            values[place] = tail[1]
    # Of its threshold a neuron loses half a count, or what its code leaves unsent after T steps.
    lost = (unit / 2 / edges.diff()).clamp(min=CODES[code].error_bound(1.0, steps, MOST_LEVELS))
    sent = float((values.diff().abs() * lost).max())
    return Group(function.name, edges, values, unit, curve.rest, code, steps, _certified(curve, edges, values), sent)


def _powers_of_two(start: float, end: float) -> Iterator[Piece]:
    """The way from start to end in pieces whose widths are powers of two, the widest first; each as (low, high)."""
    sign = 1 if end > start else -1
    while start != end:
        step = start + sign * 2.0 ** math.floor(math.log2(abs(end - start)))
        yield min(start, step), max(start, step)
        start = step


def _certified(curve: _Curve, edges: Tensor, values: Tensor) -> float:
    """sup |f - piecewise linear| over the whole line."""
    inside = curve.enclosure.deviation(edges, values + curve.ramp(edges))
    decay = curve.function.decay
    return inside if decay is None else max(inside, float(decay.subs(X, curve.high)))


def _where_tails_begin(function: Function, tolerance: float) -> tuple[float, float]:
    """The smallest power of two beyond which the function is its tails."""
    assert function.decay is not None
    reach = 1.0
    while float(function.decay.subs(X, reach)) > tolerance:
        reach *= 2
    return -reach, reach


def _on_grid(low: float, high: float) -> tuple[float, float]:
    """The range, widened to multiples of a power of two that is a sixteenth of its width or less."""
    grid = 2.0 ** math.floor(math.log2(max(high - low, 2.0**-20) / 16))
    first = math.floor(low / grid)
    return first * grid, max(math.ceil(high / grid), first + 1) * grid


def bound_formula(found: Group) -> sympy.Expr:
    """C / K^2 + D * (bound of a neuron at T): how the bound falls with K and T, exact at the group's own K and T."""
    k = sympy.Symbol("K", positive=True)
    neuron = CODES[found.code].bound.subs({THETA: 1, LEVELS: MOST_LEVELS})
    shape, rise = found.shape * found.size**2, found.sent / float(neuron.subs(T, found.steps))
    return sympy.Float(shape, 4) / k**2 + sympy.Float(rise, 4) * neuron
