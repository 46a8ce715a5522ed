"""fasfx.register_function: a user's function of one variable becomes a row of the table of neuron groups."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from fasfx.errors import ConfigError
from fasfx.groups import group
from fasfx.intervals import interval_function
from fasfx.ops.functions import Function, X, numeric, register

Line = tuple[float, float]


def register_function(
    operator: torch._ops.OpOverload,
    expression: sympy.Expr | str,
    left: Line | None = None,
    right: Line | None = None,
    decay: sympy.Expr | str | None = None,
) -> Function:
    """Let neuron groups stand for an operator in all later conversions.

    operator:    an operator of one tensor, element by element, as torch.export writes it: `torch.ops.my.act.default`.
    expression:  what it computes, a sympy expression of the symbol x, twice differentiable, written with exp, log,
                 sqrt, sin, cos, tanh, erf, atan, sinh, cosh, asinh and arithmetic.
    left, right: (slope, intercept) of the straight lines the function becomes far from 0, both or neither; without
                 them a group covers the range seen in calibration, half as wide again at both ends, and clips.
    decay:       with lines, a bound of |function - line| at distance x from 0 that falls for x >= 1.
    Error:       certified by interval arithmetic on the expression, and in `snn.ledger`. That the operator computes
                 the expression is checked at 257 points in [-4, 4] where both are finite.
    Raises ConfigError for an expression that cannot be bounded or is not the operator's, or lines without decay.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        raise ConfigError(f"{operator!r} is no operator of torch.export: pass torch.ops.<library>.<name>.default")
    core, bound = _of_x(expression), None if decay is None else _of_x(decay)
    if (left is None) != (right is None) or (left is None) != (bound is None):
        raise ConfigError("left, right and decay belong together: give all three or none")
    interval_function(core), interval_function(sympy.diff(core, X, 2))
    _require_same(operator, core)
    name = f"{operator.namespace}_{operator._opname}".replace("aten_", "")
    row = Function(name, core, operator, left=left, right=right, decay=bound)
    register(operator, row)
    group.cache_clear()
    return row


def _of_x(expression: sympy.Expr | str) -> sympy.Expr:
    """The expression with its one symbol replaced by the table's."""
    found = sympy.sympify(expression)
    symbols = found.free_symbols
    if len(symbols) > 1 or (symbols and {s.name for s in symbols} != {"x"}):
        raise ConfigError(f"{expression} has the symbols {', '.join(sorted(map(str, symbols)))}: write it in x")
    return found.xreplace(dict.fromkeys(symbols, X))


def _require_same(operator: Any, core: sympy.Expr) -> None:
    x = torch.linspace(-4, 4, 257, dtype=torch.float64)
    given, expected = operator(x), numeric(core)(x)
    both = given.isfinite() & expected.isfinite()
    if not torch.allclose(given[both], expected[both], rtol=1e-4, atol=1e-6) or not bool(both.any()):
        at = float(x[both][(given - expected)[both].abs().argmax()]) if bool(both.any()) else 0.0
        raise ConfigError(f"{operator} is not {core}: they differ at x = {at}")
