"""Neuron groups: certified bounds hold everywhere, and every form of a group gives the same spikes."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import flint
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fasfx
from fasfx import ops
from fasfx.errors import ConfigError
from fasfx.groups import QUARTER, Group, bound_formula, group
from fasfx.intervals import interval_function
from fasfx.ledger import Bound
from fasfx.ops import lookup
from fasfx.ops.functions import FUNCTIONS, Function, X
from fasfx.ops.group import neurons_of
from fasfx.ops.lookup import cells_of, table_of
from fasfx.ops.reductions import REDUCTIONS

BUILT_IN = tuple(FUNCTIONS)
POSITIVE = {"reciprocal", "rsqrt", "sqrt", "log"}
SPAN = (-3.0, 5.0)
ROUNDING = 2.0**-20  # what float32 arithmetic adds, relative to the value and to the input


def made(name: str, code: str = "multi", steps: int = 4, size: int | None = None) -> Group:
    return group(name, code, steps, 20, size, SPAN if FUNCTIONS[name].needs_range else None)


def slopes(name: str) -> tuple[float, float]:
    left, right = (tail[0] if tail else 0.0 for tail in (FUNCTIONS[name].left, FUNCTIONS[name].right))
    return left, right


@cache
def tables(found: Group) -> tuple[Tensor, Tensor]:
    cells = cells_of(found.edges, found.unit, found.rest, found.code, found.steps)
    return table_of(cells, found.edges, found.values, found.unit, found.rest), cells.spikes


def looked_up(found: Group, x: Tensor) -> Tensor:
    table, spikes = tables(found)
    ends = (float(found.edges[end]) for end in (0, -1))
    place = (found.function, found.size, *ends, *slopes(found.function), 1.0)
    return ops.lookup.op(x, table.to(x.dtype), spikes, *place)


def stepwise(found: Group, x: Tensor) -> Tensor:
    place = (found.function, found.unit, found.rest, *slopes(found.function), 1.0, found.code, found.steps)
    return ops.group.op(x, found.edges.to(x.dtype), found.values.to(x.dtype), *place)


def errors(found: Group, x: Tensor) -> tuple[Tensor, Tensor]:
    """|group - f| in the unit of the core, and what float rounding may have added to it."""
    function, wide = FUNCTIONS[found.function], x.double()
    exact = function.exact(wide)
    wrong = (looked_up(found, x).double() - exact).abs()
    spare = ROUNDING * (1 + exact.abs() + wide.abs())
    if REDUCTIONS[function.reduction].relative:
        shift = torch.ones_like(wide)
        z, k = REDUCTIONS[function.reduction].split(wide)
        shift = REDUCTIONS[function.reduction].join(shift, k).abs()
        wrong, spare = wrong / shift, ROUNDING * (2 + wide.abs().clamp(max=100))
    return wrong, spare


def inputs(name: str, count: int) -> Tensor:
    """Random points over the core's interval and far beyond it, or over the calibrated range."""
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    if function.needs_range:
        return torch.empty(count).uniform_(*SPAN)
    if name == "exp":
        return torch.empty(count).uniform_(-87, 88)
    if name in POSITIVE:
        return torch.exp2(torch.empty(count, dtype=torch.float64).uniform_(-126, 126)).float()
    far = torch.randn(count // 4) * 50
    return torch.cat([torch.empty(count - len(far)).uniform_(-10, 10), far])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("code", "steps"), [("multi", 2), ("multi", 4), ("radix", 6), ("rate", 16)])
def test_bounds_hold_and_are_tight(name: str, code: str, steps: int) -> None:
    found = made(name, code, steps)
    row = ops.CODES[code]
    whole = 1.0
    if FUNCTIONS[name].needs_range:  # relative to the largest value on the range, which is widened a little
        whole = 1.1 * float(FUNCTIONS[name].exact(torch.tensor(SPAN).double()).abs().max())
    assert found.bound <= whole * max(QUARTER * row.error_bound(1.0, steps, 20), row.error_bound(1.0, row.settled, 24))
    widest = (found.edges.diff() / found.unit).max()
    assert found.size & (found.size - 1) == 0 or widest == 2 ** (row.capacity(steps, 20).bit_length() - 1)
    wrong, spare = errors(found, inputs(name, 10**6))
    assert bool((wrong <= found.bound + spare).all())
    assert found.bound <= 4 * float(wrong.max()), "no bound is more than four times what is seen"


@pytest.mark.parametrize("name", BUILT_IN)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_float_is_beyond_a_group(name: str, x: float) -> None:
    function, found = FUNCTIONS[name], made(name)
    value = torch.tensor([x])
    assert not bool(looked_up(found, value).isnan())
    if function.needs_range:
        inside = SPAN[0] <= x <= SPAN[1]
    elif name in POSITIVE:
        inside = x >= 2.0**-126
    else:  # where exp is a normal number, and where an angle still says something in float32
        inside = {"exp": -87.3 < x < 88, "sin": abs(x) < 1e4, "cos": abs(x) < 1e4}.get(name, True)
    if inside:
        wrong, spare = errors(found, value)
        assert float(wrong) <= found.bound + float(spare)


def test_masked_scores_underflow_to_zero() -> None:
    found = made("exp")
    low = torch.tensor([-math.inf, torch.finfo(torch.float32).min, -104.0, -0.0, 0.0, 5e-324])
    result = looked_up(found, low)
    assert result[:3].tolist() == [0, 0, 0] and bool(((result[3:] - 1).abs() <= found.bound).all())
    assert float(looked_up(made("reciprocal"), torch.zeros(1))) > 1e37  # the largest a neuron's threshold then clips


_ARB = {"exp": "exp", "log": "log", "sqrt": "sqrt", "tanh": "tanh", "erf": "erf", "sin": "sin", "cos": "cos",
        "atan": "atan", "sinh": "sinh", "cosh": "cosh", "asinh": "asinh"}  # fmt: skip


def ball(expression: sympy.Expr, x: flint.arb) -> flint.arb:
    """The expression in Arb's ball arithmetic: an evaluation that shares no code with the package's."""
    if expression == X:
        return x
    if expression.is_Rational or expression.is_Float:
        exact = sympy.Rational(expression)
        return flint.arb(int(exact.p)) / flint.arb(int(exact.q))
    if expression == sympy.pi:
        return flint.arb.pi()
    parts = [ball(part, x) for part in expression.args]
    if expression.is_Add:
        return sum(parts, flint.arb(0))
    if expression.is_Mul:
        return math.prod(parts, start=flint.arb(1))
    if expression.is_Pow:
        return parts[0] ** parts[1] if not expression.exp.is_Integer else parts[0] ** int(expression.exp)
    return getattr(parts[0], _ARB[type(expression).__name__])()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_independent_interval_evaluation_confirms_the_shape(name: str) -> None:
    found, function = made(name), FUNCTIONS[name]
    left, right = slopes(name)
    edges, values = found.edges.tolist(), found.values.tolist()
    slope_of_f = sympy.diff(function.core, X)
    for a, b, at_a, at_b in zip(edges, edges[1:], values, values[1:], strict=False):
        ramp = left if b <= 0 else right
        rise = (flint.arb(at_b) - at_a) / (flint.arb(b) - a)
        waiting = [(a, b)]
        while waiting:  # mean value form of the difference, on halves and halves of halves until it is sharp
            low, high = waiting.pop()
            middle, radius = (low + high) / 2, (high - low) / 2
            there = ball(function.core, flint.arb(middle)) - ramp * middle - at_a - rise * (middle - a)
            turning = ball(slope_of_f, flint.arb(middle, radius)) - ramp - rise
            if float((abs(there) + abs(turning) * radius).abs_upper()) > 1.001 * found.shape:
                assert radius > (b - a) / 2**14, (low, high)
                waiting += [(low, middle), (middle, high)]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("code", "steps"), [("multi", 1), ("multi", 4), ("radix", 5), ("rate", 9)])
def test_stepwise_is_closed_form(name: str, code: str, steps: int) -> None:
    found = made(name, code, steps)
    x = inputs(name, 2000).double()
    x = x * (1 + 1e-9 * torch.rand(len(x), dtype=torch.float64))  # off the ties, which float32 numbers can sit on
    assert torch.allclose(stepwise(found, x), looked_up(found, x), rtol=1e-9, atol=1e-9)


def spikes_sent(found: Group, z: Tensor) -> int:
    """Every neuron simulated on its own."""
    neurons, total = neurons_of(found.edges, found.unit, found.rest), 0
    for start, direction, counts, levels in zip(*neurons, neurons.levels, strict=True):
        current = ((z - start) * direction / found.unit).clamp(min=0).minimum(counts)
        total += int((ops.CODES[found.code].spikes(current[None], found.steps, levels, False) != 0).sum())
    return total


@pytest.mark.parametrize("code", ["multi", "radix", "rate"])
@given(data=st.data())
def test_the_table_counts_every_spike(code: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["gelu", "tanh", "exp", "rsqrt"]))
    found = made(name, code, data.draw(st.integers(1, 4)))
    _, spikes = tables(found)
    cell = data.draw(st.integers(0, len(spikes) - 2))
    z = found.edges[0] + (cell + 0.5) * found.unit / 2
    assert int(spikes[cell]) == spikes_sent(found, z)


@pytest.mark.parametrize("code", ops.CODES)
def test_a_neuron_is_simulated_once_for_every_threshold_and_half_count(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, simulated = ops.CODES[code], list[int]()

    def spikes(u: Tensor, *how: Any) -> Tensor:
        simulated.append(u.numel())
        return row.spikes(u, *how)

    monkeypatch.setitem(ops.CODES, code, replace(row, spikes=spikes))
    lookup._simulated.cache_clear()
    found = made("erf", code, size=64)
    for _ in range(2):
        cells_of(found.edges, found.unit, found.rest, found.code, found.steps)
    thresholds = neurons_of(found.edges, found.unit, found.rest).counts
    assert len(thresholds) == found.size > len(thresholds.unique())
    assert sorted(simulated) == [2 * int(top) + 1 for top in thresholds.unique()]


def test_a_given_size_is_kept_and_more_neurons_err_less() -> None:
    sizes = [made("gelu", size=size) for size in (4, 8, 16, 32)]
    assert [found.size for found in sizes] == [4, 8, 16, 32]
    shapes = [found.shape for found in sizes]
    assert all(b < a / 2 for a, b in zip(shapes, shapes[1:], strict=False))
    formula = Bound(bound_formula(sizes[1]), "")
    assert formula.at(K=8, T=4) == pytest.approx(sizes[1].bound, rel=1e-3)
    assert formula.at(K=16, T=4) < formula.at(K=8, T=4) > formula.at(K=8, T=5)


def test_gradient_is_that_of_the_function() -> None:
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    looked_up(made("gelu"), x).sum().backward()
    expected = torch.func.vmap(torch.func.grad(torch.nn.functional.gelu))(x.detach())
    assert torch.allclose(x.grad, expected, atol=1e-5)


def test_an_expression_without_enclosure_is_refused() -> None:
    with pytest.raises(ConfigError, match="zeta"):
        interval_function(sympy.zeta(X))


def test_a_pole_in_the_range_is_refused() -> None:
    FUNCTIONS["pole"] = Function("pole", 1 / X, torch.reciprocal)
    with pytest.raises(ConfigError, match="not finite"):
        group("pole", "multi", 4, 20, None, (-1.0, 1.0))
    del FUNCTIONS["pole"]


def test_a_flat_range_has_a_group() -> None:
    assert group("cosh", "multi", 4, 20, None, (0.0, 0.0)).bound < 1e-2


@pytest.mark.usefixtures("functions_of_its_own")
def test_a_users_function_becomes_a_group() -> None:
    library = torch.library.Library("fasfx_test", "FRAGMENT")
    library.define("bump(Tensor x) -> Tensor")
    library.impl("bump", lambda x: torch.exp(-x * x), "CompositeImplicitAutograd")
    operator = torch.ops.fasfx_test.bump.default
    with pytest.raises(ConfigError, match="differ"):
        fasfx.register_function(operator, "exp(-x)")
    with pytest.raises(ConfigError, match="belong together"):
        fasfx.register_function(operator, "exp(-x**2)", left=(0.0, 0.0))
    with pytest.raises(ConfigError, match="write it in x"):
        fasfx.register_function(operator, "exp(-y**2)")
    fasfx.register_function(operator, "exp(-x**2)", (0.0, 0.0), (0.0, 0.0), "exp(-x**2)")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(operator(self.layer(x)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 8)
    snn = fasfx.convert(model, [{"x": x}], fasfx.SpikeConfig(nonlinear="spiking", timesteps=6, strict=True))
    assert snn.coverage.float_operators == [] and "group_fasfx_test_bump" in set(snn.ledger.table.rule)
    assert float((snn(x) - model(x)).norm() / model(x).norm()) < 1e-2
