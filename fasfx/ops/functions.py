"""Functions of one variable that neuron groups stand for, as data; `register` adds one of the user's.

A group approximates the *core* on a bounded interval. What lies outside is known exactly: a tail of the function
(a straight line), or the core again after a shift of the exponent or a whole period (`fasfx.ops.reductions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

X = sympy.Symbol("x", real=True)
aten = torch.ops.aten


@dataclass(frozen=True)
class Function:
    """One row.

    core:      what the group approximates, a smooth sympy expression of `X`.
    reduction: how an input comes into the core's interval, a row of fasfx.ops.reductions.
    interval:  the core's; None: as wide as the tails ask for, or else the range seen in calibration.
    left, right: (slope, intercept) of the straight line the function becomes there; None if it does not.
    decay:     a bound of |function - line| at distance X from 0, falling for X >= 1; None: the lines begin at once.
    exact:     the float function, for gradients.
    """

    name: str
    core: sympy.Expr
    exact: Callable[[Tensor], Tensor]
    reduction: str = "none"
    interval: tuple[float, float] | None = None
    left: tuple[float, float] | None = None
    right: tuple[float, float] | None = None
    decay: sympy.Expr | None = None

    @property
    def needs_range(self) -> bool:
        """Whether the group's interval is the range seen in calibration, beyond which values clip."""
        return self.interval is None and self.left is None


def _sigmoid(x: sympy.Expr) -> sympy.Expr:
    return 1 / (1 + sympy.exp(-x))


_E, _ROOT = sympy.exp(-X), sympy.sqrt(2)
_TANH = sympy.tanh(sympy.sqrt(2 / sympy.pi) * (X + sympy.Float("0.044715") * X**3))
_ZERO, _ONE, _LINE = (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)
# The bounds of what is left of a tail: Mills' ratio for the normal distribution, else the leading exponential.
_ROWS = (
    Function("exp", 2**X, torch.exp, "exp", (0, 1)),
    Function("reciprocal", 1 / X, torch.reciprocal, "reciprocal", (1, 2)),
    Function("rsqrt", 1 / sympy.sqrt(X), torch.rsqrt, "rsqrt", (1, 4)),
    Function("sqrt", sympy.sqrt(X), torch.sqrt, "sqrt", (1, 4)),
    Function("log", sympy.log(X), torch.log, "log", (1, 2)),
    Function("sin", sympy.sin(2 * sympy.pi * X), torch.sin, "period", (0, 1)),
    Function("cos", sympy.cos(2 * sympy.pi * X), torch.cos, "period", (0, 1)),
    Function("sigmoid", _sigmoid(X), torch.sigmoid, left=_ZERO, right=_ONE, decay=_E),
    Function("tanh", sympy.tanh(X), torch.tanh, left=(0.0, -1.0), right=_ONE, decay=2 * sympy.exp(-2 * X)),
    Function("erf", sympy.erf(X), torch.erf, left=(0.0, -1.0), right=_ONE, decay=sympy.exp(-(X**2))),
    Function(
        "gelu",
        X * (1 + sympy.erf(X / _ROOT)) / 2,
        torch.nn.functional.gelu,
        left=_ZERO,
        right=_LINE,
        decay=sympy.exp(-(X**2) / 2) / sympy.sqrt(2 * sympy.pi),
    ),
    Function(
        "gelu_tanh",
        X * (1 + _TANH) / 2,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        left=_ZERO,
        right=_LINE,
        decay=X * sympy.exp(-2 * sympy.sqrt(2 / sympy.pi) * (X + sympy.Float("0.044715") * X**3)),
    ),
    Function("silu", X * _sigmoid(X), torch.nn.functional.silu, left=_ZERO, right=_LINE, decay=X * _E),
    Function(
        "softplus",
        sympy.log(1 + sympy.exp(X)),
        torch.nn.functional.softplus,
        left=_ZERO,
        right=_LINE,
        decay=_E,
    ),
    Function(
        "mish",
        X * (1 - 2 / (1 + (1 + sympy.exp(X)) ** 2)),
        torch.nn.functional.mish,
        left=_ZERO,
        right=_LINE,
        decay=2 * X * _E,
    ),
    Function(
        "hardswish",
        X * (X + 3) / 6,
        torch.nn.functional.hardswish,
        interval=(-3, 3),
        left=_ZERO,
        right=_LINE,
    ),
    Function("atan", sympy.atan(X), torch.atan),
    Function("sinh", sympy.sinh(X), torch.sinh),
    Function("cosh", sympy.cosh(X), torch.cosh),
    Function("asinh", sympy.asinh(X), torch.asinh),
)
FUNCTIONS: dict[str, Function] = {row.name: row for row in _ROWS}
# Operator -> its function; those with arguments of their own are read by `function_of`.
OPERATORS: dict[Any, str] = {getattr(aten, row.name).default: row.name for row in _ROWS if hasattr(aten, row.name)}


def register(operator: Any, function: Function) -> None:
    """Let groups stand for an operator of one argument; see fasfx.register_function."""
    FUNCTIONS[function.name] = function
    OPERATORS[operator] = function.name


def function_of(operator: Any, arguments: dict[str, Any]) -> str | None:
    """The name of the function that an operator computes with these arguments, by name; None if there is none."""
    name = OPERATORS.get(operator)
    if name == "gelu" and arguments["approximate"] == "tanh":
        return "gelu_tanh"
    if name == "softplus" and (arguments["beta"], arguments["threshold"]) != (1, 20):
        return None
    return name


def _number(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


_NAMES = ("exp", "log", "sqrt", "tanh", "erf", "sin", "cos", "atan", "sinh", "cosh", "asinh")
_TORCH: dict[str, Any] = {name: lambda value, name=name: getattr(torch, name)(_number(value)) for name in _NAMES}
_TORCH["pi"] = math.pi


def numeric(expression: sympy.Expr) -> Callable[[Tensor], Tensor]:
    """A sympy expression of X as a function of a float64 tensor."""
    function = sympy.lambdify(X, expression, modules=[_TORCH])
    return lambda x: _number(function(x)).expand_as(x)
