"""Certified bounds of a function on an interval: its sympy expression in interval arithmetic (mpmath.iv)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import sympy

from fasfx.errors import ConfigError
from fasfx.ops.functions import X

iv = mpmath.iv
_PARTS, _MOST_PARTS = 4, 256


def _monotone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An increasing function on intervals: its values at the ends, widened by the error of their evaluation."""

    def enclose(x: Any) -> Any:
        x = iv.mpf(x)
        slack = iv.mpf([-1, 1]) * mpmath.mpf(2) ** (8 - mpmath.mp.prec)
        low, high = (iv.mpf(function(mpmath.mpf(end))) * (1 + slack) + slack * 2**-40 for end in (x.a, x.b))
        return iv.mpf([low.a, high.b])

    return enclose


_INTERVAL = {name: getattr(iv, name) for name in ("exp", "log", "sqrt", "sin", "cos", "pi", "mpf")}
_INTERVAL |= {name: _monotone(getattr(mpmath, name)) for name in ("erf", "tanh", "atan", "sinh", "asinh")}
_INTERVAL["cosh"] = lambda x: (iv.exp(x) + iv.exp(-x)) / 2


def interval_function(expression: sympy.Expr) -> Callable[[Any], Any]:
    """A sympy expression of X on mpmath intervals. Raises ConfigError for a function that has no enclosure here."""
    names = {type(part).__name__ for part in expression.atoms(sympy.Function)}
    if unknown := sorted(names - set(_INTERVAL)):
        known = ", ".join(sorted(set(_INTERVAL) - {"pi", "mpf"}))
        raise ConfigError(f"{', '.join(unknown)} in {expression} cannot be bounded: write it with {known}")
    exact = expression.xreplace({number: sympy.Rational(number) for number in expression.atoms(sympy.Float)})
    return sympy.lambdify(X, exact, modules=[_INTERVAL, "mpmath"])  # type: ignore[no-any-return]


class Enclosure:
    """sup |f - line| over an interval, for one expression f and any number of lines."""

    def __init__(self, expression: sympy.Expr) -> None:
        self._value = interval_function(expression)
        self._curvature = interval_function(sympy.diff(expression, X, 2))

    def deviation(self, low: float, high: float, at_low: float, at_high: float) -> float:
        """A bound of |f - line| on [low, high], where the line runs from (low, at_low) to (high, at_high).

        Between two points, f is within h^2/8 sup |f''| of its chord; the points come closer until that is small
        beside the deviation at the points themselves.
        """
        parts = _PARTS
        while True:
            width = (high - low) / parts
            points = [low + width * i for i in range(parts + 1)]
            at = max(self._at(p, at_low + (at_high - at_low) * ((p - low) / (high - low))) for p in points)
            between = width**2 / 8 * max(_largest(self._curvature(iv.mpf([p, p + width]))) for p in points[:-1])
            if between <= at / 8 or between < 2**-40 or parts == _MOST_PARTS:
                return at + between
            parts *= 2

    def _at(self, point: float, line: float) -> float:
        return _largest(self._value(iv.mpf(point)) - iv.mpf(line))


def _largest(interval: Any) -> float:
    """The largest absolute value of an interval, rounded up."""
    interval = iv.mpf(interval)
    return float(mpmath.mpf(max(abs(interval.a), abs(interval.b)))) * (1 + 2**-50)
