"""Certified bounds of a function on intervals: its sympy expression in interval arithmetic, many intervals at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from fasfx.errors import ConfigError
from fasfx.ops.functions import X

# torch's functions err by one unit in the last place of float64, 2^-52, and its sums and products by half a unit.
_ROUNDING, _SMALLEST = 2.0**-50, torch.finfo(torch.float64).tiny
_PARTS, _MOST_PARTS = 4, 256


@dataclass(frozen=True, eq=False)
class Interval:
    """What lies between low and high, float64 tensors [...] that broadcast; results hold every exact result."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest absolute value; infinite where nothing is known."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def __add__(self, other: Any) -> Interval:
        other = _interval(other)
        return _widened(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Any) -> Interval:
        return self + -_interval(other)

    def __rsub__(self, other: Any) -> Interval:
        return -self + _interval(other)

    def __mul__(self, other: Any) -> Interval:
        other = _interval(other)
        return _around(*(one * two for one in (self.low, self.high) for two in (other.low, other.high)))

    def __truediv__(self, other: Any) -> Interval:
        other = _interval(other)
        below, above = other.low.reciprocal(), other.high.reciprocal()
        crosses = (other.low <= 0) & (other.high >= 0)
        return self * _around(below.masked_fill(crosses, -math.inf), above.masked_fill(crosses, math.inf))

    def __rtruediv__(self, other: Any) -> Interval:
        return _interval(other) / self

    def __pow__(self, exponent: Any) -> Interval:
        if not isinstance(exponent, int):
            return _FUNCTIONS["exp"](_FUNCTIONS["log"](self) * exponent)
        if exponent < 0:
            return 1 / self**-exponent
        ends = self.low**exponent, self.high**exponent
        turns = (self.low < 0) & (self.high > 0) & (exponent % 2 == 0)
        return _around(*ends, torch.where(turns, 0.0, ends[0]))

    def __rpow__(self, base: Any) -> Interval:
        return _FUNCTIONS["exp"](self * _FUNCTIONS["log"](base))

    __radd__, __rmul__ = __add__, __mul__


def _interval(value: Any) -> Interval:
    """An interval as it is; a number as one that is as wide as its float64 may be wrong."""
    if isinstance(value, Interval):
        return value
    return _widened(number := torch.tensor(float(value), dtype=torch.float64), number)


def _widened(low: Tensor, high: Tensor) -> Interval:
    low, high = low - low.abs() * _ROUNDING - _SMALLEST, high + high.abs() * _ROUNDING + _SMALLEST
    # NaN, such as the logarithm of a negative number or infinity less infinity, says nothing
    return Interval(low.nan_to_num(-math.inf, math.inf, -math.inf), high.nan_to_num(math.inf, math.inf, -math.inf))


def _around(*values: Tensor) -> Interval:
    stacked = torch.stack(torch.broadcast_tensors(*values))
    return _widened(stacked.amin(0), stacked.amax(0))


def _increasing(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Interval]:
    def enclose(x: Any) -> Interval:
        x = _interval(x)
        return _widened(function(x.low), function(x.high))

    return enclose


def _sin(x: Any) -> Interval:
    x = _interval(x)
    ends = torch.sin(x.low), torch.sin(x.high)
    top, bottom = (torch.where(_holds(x, sign * _PI / 2), float(sign), ends[0]) for sign in (1, -1))
    return _around(*ends, top, bottom)


def _holds(x: Interval, angle: Interval) -> Tensor:
    """Whether x may hold the angle plus whole turns."""
    turns = (x - angle) / (2 * _PI)
    return turns.low.ceil() <= turns.high.floor()


_PI = _interval(math.pi)
_FUNCTIONS: dict[str, Callable[[Any], Interval]] = {
    name: _increasing(getattr(torch, name)) for name in ("exp", "log", "sqrt", "erf", "tanh", "atan", "sinh", "asinh")
}
_FUNCTIONS |= {
    "sin": _sin,
    "cos": lambda x: _sin(x + _PI / 2),
    "cosh": lambda x: (_FUNCTIONS["exp"](x) + _FUNCTIONS["exp"](-x)) / 2,
}


def interval_function(expression: sympy.Expr) -> Callable[[Interval], Interval]:
    """A sympy expression of X on intervals. Raises ConfigError for a function that has no enclosure here."""
    names = {type(part).__name__ for part in expression.atoms(sympy.Function)}
    if unknown := sorted(names - set(_FUNCTIONS)):
        known = ", ".join(sorted(_FUNCTIONS))
        raise ConfigError(f"{', '.join(unknown)} in {expression} cannot be bounded: write it with {known}")
    exact = expression.xreplace({number: sympy.Rational(number) for number in expression.atoms(sympy.Float)})
    # sympy writes fractions for mpmath as mpf(1) / mpf(3), not as a rounded quotient
    function = sympy.lambdify(X, exact, modules=[{**_FUNCTIONS, "pi": _PI, "mpf": _interval}, "mpmath"])
    return lambda x: _interval(function(x))


class Enclosure:
    """Bounds of |f - line| for one expression f and any number of lines."""

    def __init__(self, expression: sympy.Expr) -> None:
        self._value = interval_function(expression)
        self._curvature = interval_function(sympy.diff(expression, X, 2))

    def deviation(self, points: Tensor, values: Tensor) -> float:
        """A bound of |f - the line through (points, values)| from the first point to the last, both float64 [K + 1].

        Between two points, f is within h^2/8 sup |f''| of its chord; a segment is divided until that is small beside
        the deviation where it is divided.
        """
        segments, parts, found = torch.stack([points[:-1], points.diff(), values[:-1], values.diff()]), _PARTS, 0.0
        while segments.numel():
            low, width, start, rise = segments.unsqueeze(-1)
            share = torch.arange(parts + 1, dtype=torch.float64) / parts
            x, line = low + width * share, start + rise * share
            at = (self._value(Interval(x, x)) - Interval(line, line)).largest.amax(1)
            bent = self._curvature(Interval(x[:, :-1], x[:, 1:])).largest.expand(len(x), parts).amax(1)
            between = (width.squeeze(1) / parts) ** 2 / 8 * bent
            done = (between <= at / 8) | (between < 2.0**-40) | (parts == _MOST_PARTS)
            found = max([found, *(at + between)[done].tolist()])
            segments, parts = segments[:, ~done], 2 * parts
        return found
