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
from fasfx.ops.codes import CODES, FINEST, LEVELS, THETA, T
from fasfx.ops.functions import FUNCTIONS, Function, X, numeric
from fasfx.ops.group import neurons_of

_SAMPLES = 33
QUARTER = 0.25
MOST_LEVELS = 24


@dataclass(frozen=True)
class Group:
    """A function's group for one code.

    edges, values: float64 [K + 1], the breakpoints and what the group gives there.
    unit:   the input that one count stands for; every neuron's threshold is unit * 2^j.
    rest:   the breakpoint where no neuron spikes; those left of it fire for what is missing to it.
    code, steps, levels: the neurons'.
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

    @cached_property
    def table(self) -> Tensor:
        """What the group gives for every half count of its input, float64 [2 (edges[-1] - edges[0]) / unit + 1]."""
        return self._closed_form()[0]

    @cached_property
    def spikes(self) -> Tensor:
        """How many spikes all neurons send together for every half count of the input, int32, like `table`."""
        return self._closed_form()[1]

    def _closed_form(self) -> tuple[Tensor, Tensor]:
        middle = self._middles()
        place = (torch.searchsorted(self.edges, middle, right=True) - 1).clamp(0, self.size - 1)
        weights, sizes, full, forward = self._neurons
        start = torch.where(forward, self.edges[:-1], self.edges[1:])
        u = ((middle - start[place]).abs() / self.unit).minimum(sizes[place])
        counts, active = torch.zeros_like(u), torch.zeros(len(u), dtype=torch.int64)
        for size in sizes.unique():
            here = sizes[place] == size
            levels = int(size).bit_length()
            events = CODES[self.code].spikes(u[here], self.steps, levels, False)
            counts[here] = CODES[self.code].decode(events, levels).to(u.dtype)
            active[here] = (events != 0).sum(0)
        at_start = torch.where(forward, self.values[:-1], self.values[1:])
        # Neurons between rest and this one are full.
        from_rest = torch.where(
            forward, full.where(forward, 0).cumsum(0), full.where(~forward, 0).flip(0).cumsum(0).flip(0)
        )
        return at_start[place] + weights[place] * counts, (from_rest - full)[place] + active

    def _middles(self) -> Tensor:
        """The middle of every half count of the input; the last is the end of the range."""
        half = self.unit / 2
        cells = round(float(self.edges[-1] - self.edges[0]) / half)
        middles = self.edges[0] + (torch.arange(cells + 1, dtype=torch.float64) + 0.5) * half
        middles[-1] = self.edges[-1]
        return middles

    @property
    def _neurons(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per neuron [K]: weight of a count, counts of a threshold, spikes when full, whether it fires upwards."""
        neurons = list(neurons_of(self.edges, self.values, self.unit, self.rest))
        sizes = torch.tensor([2.0 ** (n.levels - 1) for n in neurons], dtype=torch.float64)
        full = [
            CODES[self.code].spikes(size[None], self.steps, n.levels, False)
            for n, size in zip(neurons, sizes, strict=True)
        ]
        spikes = torch.tensor([int((events != 0).sum()) for events in full])
        weights = torch.tensor([n.weight for n in neurons], dtype=torch.float64)
        return weights, sizes, spikes, torch.tensor([n.direction > 0 for n in neurons])


@lru_cache(maxsize=256)
def group(
    name: str, code: str, steps: int, levels: int, size: int | None = None, span: tuple[float, float] | None = None
) -> Group:
    """The group of a function: of `size` neurons, or of the fewest (a power of two) that are exact enough.

    One neuron of the code with threshold 1 errs by at most code.bound(T), about as often up as down. A group's error
    is the same for equal inputs and adds up, so it may be a QUARTER of that; it need not go below FINEST.
    span: the calibrated range, for functions without tails. Computed once, then cached.
    """
    function = FUNCTIONS[name]
    tolerance = max(QUARTER * CODES[code].error_bound(1.0, steps, levels), FINEST[code])
    if function.needs_range:
        assert span is not None, f"{name} needs a calibrated range"
        low, high = _dyadic(span)
    else:
        low, high = function.interval or _where_tails_begin(function, tolerance / 4)
        span = None
    scale = _largest(function, low, high) if function.needs_range else 1.0
    curve = _Curve(function, low, high)
    unit = _unit(curve, tolerance * scale / 2)
    widest = unit * 2 ** _most_doublings(code, steps, levels)
    k = size or 2
    while True:
        found = _fit(curve, k, unit, widest, code, steps)
        if size is not None or found.bound <= tolerance * scale:
            return found
        k = max(2 * k, found.size)


class _Curve:
    """A core on its interval without the ramps of its tails: what the neurons have to bend to."""

    def __init__(self, function: Function, low: float, high: float) -> None:
        self.function, self.low, self.high = function, low, high
        self._value = numeric(function.core)

    def ramp(self, x: Tensor) -> Tensor:
        left, right = self.function.left or (0.0, 0.0), self.function.right or (0.0, 0.0)
        return left[0] * x.clamp(max=0) + right[0] * x.clamp(min=0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._value(x) - self.ramp(x)

    def error(self, low: float, high: float) -> float:
        """The signed deviation of the chord from the curve, where it is largest."""
        x = torch.linspace(low, high, _SAMPLES, dtype=torch.float64)
        y = self(x)
        gap = torch.lerp(y[0], y[-1], torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)) - y
        return float(gap[gap.abs().argmax()])

    @property
    def steepest(self) -> float:
        y = self(x := torch.linspace(self.low, self.high, 4097, dtype=torch.float64))
        return float((y.diff() / x.diff()).abs().max())


def _fit(curve: _Curve, size: int, unit: float, widest: float, code: str, steps: int) -> Group:
    """At least `size` segments by halving the worst, until none is wider than `widest`."""
    function = curve.function
    rest = 0.0 if curve.low < 0 < curve.high else curve.low
    pieces = [*_powers_of_two(rest, curve.low), *_powers_of_two(rest, curve.high)]
    heap = [(-_badness(curve, *piece, widest), piece) for piece in pieces]
    heapq.heapify(heap)
    while len(heap) < size or heap[0][0] == -math.inf:
        _, (a, b) = heapq.heappop(heap)
        if b - a <= unit:
            raise ConfigError(f"a group of {size} neurons for {function.name} is more than its input can tell apart")
        for piece in ((a, (a + b) / 2), ((a + b) / 2, b)):
            heapq.heappush(heap, (-_badness(curve, *piece, widest), piece))
    pieces = sorted(piece for _, piece in heap)
    edges = torch.tensor([a for a, _ in pieces] + [pieces[-1][1]], dtype=torch.float64)
    errors = torch.tensor([curve.error(a, b) for a, b in pieces], dtype=torch.float64)
    # Each segment's chord lies on one side of the curve: half its error moves it to the middle.
    padded = torch.cat([errors[:1], errors, errors[-1:]])
    values = curve(edges) - (padded[:-1] + padded[1:]) / 4
    for tail, place in ((function.left, 0), (function.right, -1)):
        if tail is not None:
            values[place] = tail[1]
    widths, rises = edges.diff(), values.diff().abs()
    levels = torch.log2(widths / unit) + 1
    bounds = [CODES[code].error_bound(1.0, steps, int(n)) for n in levels] if code == "multi" else unit / 2 / widths
    sent = float((rises * torch.as_tensor(bounds)).max())
    return Group(function.name, edges, values, unit, rest, code, steps, _certified(curve, edges, values), sent)


def _powers_of_two(start: float, end: float) -> Iterator[tuple[float, float]]:
    """The way from start to end in pieces whose widths are powers of two, the widest first; each as (low, high)."""
    sign = 1 if end > start else -1
    while start != end:
        step = start + sign * 2.0 ** math.floor(math.log2(abs(end - start)))
        yield min(start, step), max(start, step)
        start = step


def _badness(curve: _Curve, low: float, high: float, widest: float) -> float:
    return math.inf if high - low > widest else abs(curve.error(low, high))


def _certified(curve: _Curve, edges: Tensor, values: Tensor) -> float:
    """sup |f - piecewise linear| over the whole line."""
    enclosure = Enclosure(curve.function.core)
    lines = (values + curve.ramp(edges)).tolist()
    points = edges.tolist()
    segments = zip(points, points[1:], lines, lines[1:], strict=False)
    inside = max(enclosure.deviation(*segment) for segment in segments)
    decay = curve.function.decay
    return inside if decay is None else max(inside, float(decay.subs(X, curve.high)))


def _where_tails_begin(function: Function, tolerance: float) -> tuple[float, float]:
    """The smallest power of two beyond which the function is its tails."""
    assert function.decay is not None
    reach = 1.0
    while float(function.decay.subs(X, reach)) > tolerance:
        reach *= 2
    return -reach, reach


def _dyadic(span: tuple[float, float]) -> tuple[float, float]:
    """The range, widened to multiples of a power of two of a sixteenth of its width at least."""
    grid = 2.0 ** math.floor(math.log2(max(span[1] - span[0], 2.0**-20) / 16))
    low, high = math.floor(span[0] / grid), math.ceil(span[1] / grid)
    return low * grid, max(high, low + 1) * grid


def _largest(function: Function, low: float, high: float) -> float:
    return float(numeric(function.core)(torch.linspace(low, high, 4097, dtype=torch.float64)).abs().max())


def _unit(curve: _Curve, tolerance: float) -> float:
    """The largest power of two of which half, times the steepest slope, is within half the tolerance."""
    return 2.0 ** math.floor(math.log2(tolerance / curve.steepest))


def _most_doublings(code: str, steps: int, levels: int) -> int:
    """j of the widest neuron, 2^j counts: as many as the code can send in so many steps."""
    top = CODES[code].capacity(steps, levels)
    return int(math.log2(top + (code == "radix"))) if code != "radix" else max(steps - 1, 0)


def bound_formula(found: Group) -> sympy.Expr:
    """C / K^2 + D * (bound of a neuron at T): how the bound falls with K and T, exact at the group's own K and T."""
    k = sympy.Symbol("K", positive=True)
    neuron = CODES[found.code].bound.subs({THETA: 1, LEVELS: MOST_LEVELS})
    shape, rise = found.shape * found.size**2, found.sent / float(neuron.subs(T, found.steps))
    return sympy.Float(shape, 4) / k**2 + sympy.Float(rise, 4) * neuron
