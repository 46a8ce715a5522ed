"""Interval arithmetic: results hold every exact value, which sympy computes to 40 digits."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasfx.intervals import Enclosure, Interval, interval_function
from fasfx.ops.functions import FUNCTIONS, X

POSITIVE = {"reciprocal", "rsqrt", "sqrt", "log"}
# What no built-in function has: powers, quotients by an interval, numbers that float64 does not hold.
WRITTEN = {
    "third": (X - sympy.Rational(1, 3)) ** 3,
    "even power": (X - 1) ** 4 - X**2,
    "power of a power": sympy.exp(X) ** sympy.Rational(3, 2),
    "quotient": (1 - X) / (2 + X**2) ** 2,
    "base": sympy.Integer(3) ** (X / 7),
    "turns": sympy.sin(5 * X) - sympy.cos(3 * X) / 2,
}
CORES = WRITTEN | {name: row.core for name, row in FUNCTIONS.items()}
WITH_CURVATURE = {f"{name}, {order}": sympy.diff(f, X, order) for name, f in CORES.items() for order in (0, 2)}


@pytest.mark.parametrize("name", WITH_CURVATURE)
@given(
    low=st.floats(0.0625, 4), width=st.floats(0, 2), shares=st.lists(st.floats(0, 1), max_size=3), left=st.booleans()
)
def test_results_hold_every_exact_value(name: str, low: float, width: float, shares: list[float], left: bool) -> None:
    expression = WITH_CURVATURE[name]
    if left and name.split(",")[0] not in POSITIVE:
        low = -low
    high = low + width
    found = interval_function(expression)(Interval(*(torch.tensor(end, dtype=torch.float64) for end in (low, high))))
    for point in [low, high, *(min(low + share * width, high) for share in shares)]:
        exact = expression.xreplace({X: sympy.Rational(point)}).evalf(40)
        assert sympy.Rational(float(found.low)) <= exact <= sympy.Rational(float(found.high))


@pytest.mark.parametrize("name", WITH_CURVATURE)
def test_points_cost_rounding_only(name: str) -> None:
    point = torch.linspace(1, 3, 9, dtype=torch.float64)
    found = interval_function(WITH_CURVATURE[name])(Interval(point, point))
    assert bool(((found.high - found.low) <= 1e-11 * found.largest.clamp(min=1)).all())


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    across = Interval(torch.tensor([-1.0, 0.0, -1.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double())
    for expression in (1 / X, 1 / X**3, sympy.log(X), sympy.sqrt(X) * sympy.log(X)):
        assert interval_function(expression)(across).largest[0] == math.inf
    assert interval_function(1 / X)(across).largest.tolist() == [math.inf] * 3


def test_a_lines_deviation_is_found_between_its_points() -> None:
    """x^2 deviates from its chord by a quarter of the squared width; what the points see is divided until it is so."""
    points = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    found = Enclosure(X**2).deviation(points, points**2)
    assert 1 <= found <= 1.2
    shifted = Enclosure(X**2).deviation(points, points**2 - 0.5)
    assert 0.5 <= shifted <= 0.6
