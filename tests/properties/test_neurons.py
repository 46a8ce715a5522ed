"""One neuron, four forms: closed form, T single steps, decoded spikes, ONNX; its bounds, its gradients."""

import operator
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    Neuron,
    corners,
    count_values,
    nearest_power,
    neurons,
    powers_of_two,
    thresholds,
    values_in_range,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fasfx.config import MAX_LEVELS, MAX_RADIX_STEPS, SpikeConfig
from fasfx.ops import CODES, byte_count, count, fire, qcfs, tick

ROUNDING = 4 * torch.finfo(torch.float64).eps  # of x N / theta and back, relative to theta
# Exported together: every code at few and many steps, both signs.
EXPORTED = [
    Neuron(code, steps, levels, signed)
    for code, steps, levels in [
        ("rate", 1, 1),
        ("rate", 8, 1),
        ("rate", 256, 1),
        ("radix", 1, 1),
        ("radix", 7, 1),
        ("radix", 16, 1),
        ("multi", 1, 4),
        ("multi", 3, 20),
        ("multi", 5, 1),
        ("multi", 12, 20),
    ]
    for signed in (False, True)
]
ONE_PER_CODE = [Neuron("rate", 8, 1, True), Neuron("radix", 7, 1, True), Neuron("multi", 4, 20, True)]


def closed_form(neuron: Neuron, u: Tensor) -> Tensor:
    return count.op(u, *neuron.args)


def quantised(neuron: Neuron, x: Tensor, theta: float | Tensor) -> Tensor:
    return qcfs.op(x, torch.as_tensor(theta, dtype=x.dtype), *neuron.args)


def fired(neuron: Neuron, x: Tensor, theta: float | Tensor) -> Tensor:
    return fire.op(x, torch.as_tensor(theta, dtype=x.dtype), *neuron.args)


# --- forms -----------------------------------------------------------------------------------------------


@given(st.data(), neurons(), st.sampled_from(DTYPES))
@settings(max_examples=150)
def test_all_forms_give_the_same_count(data: st.DataObject, neuron: Neuron, dtype: torch.dtype) -> None:
    u = data.draw(count_values(neuron, dtype))
    counts = closed_form(neuron, u)
    assert counts.dtype == dtype
    events = neuron.row.spikes(u, *neuron.numbers)
    decoded = neuron.row.decode(events, neuron.levels)
    assert counts.tolist() == decoded.tolist()
    assert counts.tolist() == fired(neuron, u, float(neuron.top)).tolist()
    assert counts.tolist() == quantised(neuron, u, float(neuron.top)).tolist()
    assert counts.tolist() == [neuron.reference(value) for value in u.tolist()]


@given(st.data(), neurons(), st.sampled_from(DTYPES))
def test_events_are_small_integers(data: st.DataObject, neuron: Neuron, dtype: torch.dtype) -> None:
    u = data.draw(count_values(neuron, dtype))
    events = neuron.row.spikes(u, *neuron.numbers)
    assert events.dtype == torch.int8 and events.shape == (neuron.steps, *u.shape)
    largest = neuron.levels if neuron.code == "multi" else 1
    assert int(events.abs().max()) <= largest
    if not neuron.signed and neuron.code != "multi":
        assert int(events.min()) >= 0
    decoded = neuron.row.decode(events, neuron.levels)
    assert int(decoded.min()) >= neuron.low and int(decoded.max()) <= neuron.top


@given(neurons(("radix", "multi")), st.sampled_from(DTYPES), st.sampled_from((-np.inf, np.inf)))
def test_neighbours_of_ties_agree(neuron: Neuron, dtype: torch.dtype, towards: float) -> None:
    """The floats next to every corner: no rounding may put them on the other side in one form only."""
    kind = np.float32 if dtype == torch.float32 else np.float64
    u = torch.from_numpy(np.nextafter(np.array(corners(neuron), kind), kind(towards)))
    events = neuron.row.spikes(u, *neuron.numbers)
    assert closed_form(neuron, u).tolist() == neuron.row.decode(events, neuron.levels).tolist()


@given(st.data(), neurons(("multi",)))
def test_multi_neuron_sends_the_nearest_power(data: st.DataObject, neuron: Neuron) -> None:
    """Event by event, against a search over all signed powers of two."""
    u = data.draw(count_values(neuron))
    events = neuron.row.spikes(u, *neuron.numbers)
    for value, train in zip(u.tolist(), events.T.tolist(), strict=True):
        unsent = min(max(Fraction(value), Fraction(neuron.low)), Fraction(neuron.top))
        for event in train:
            sign = (event > 0) - (event < 0)
            sent = sign * 2 ** (neuron.levels - abs(event)) if event else 0
            assert sent == nearest_power(unsent, neuron.levels)
            unsent -= sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize(
    ("code", "steps", "levels"),
    [
        ("multi", 12, MAX_LEVELS),
        ("multi", 1, MAX_LEVELS),
        ("multi", 4, MAX_LEVELS - 1),
        ("radix", MAX_RADIX_STEPS, 1),
    ],
)
def test_counts_are_exact_at_the_limits_of_the_configuration(
    code: str, steps: int, levels: int, signed: bool, dtype: torch.dtype
) -> None:
    SpikeConfig(code=code, timesteps=steps, levels=levels)  # accepted, so it must be right
    neuron = Neuron(code, steps, levels, signed)
    whole = torch.tensor([n for n in corners(neuron) if n == int(n)], dtype=dtype)
    u = torch.cat([whole, whole - 1, whole + 1, whole / 2, whole / 2 + 1])
    wanted = [neuron.reference(value) for value in u.tolist()]
    events = neuron.row.spikes(u, *neuron.numbers)
    assert neuron.row.decode(events, neuron.levels).tolist() == wanted
    assert closed_form(neuron, u).tolist() == wanted


class EveryCount(torch.nn.Module):
    """One output per exported neuron."""

    def forward(self, u: Tensor) -> list[Tensor]:
        return [closed_form(neuron, u) for neuron in EXPORTED]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def onnx_session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("onnx") / "counts.onnx"
    example = torch.zeros(3, dtype=request.param)
    shapes = {"u": {0: torch.export.Dim("size")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            EveryCount(),
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=18,
            verbose=False,
        )
    return request.param, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@given(st.data())
@settings(max_examples=30)
def test_onnx_gives_the_same_count(onnx_session: Any, data: st.DataObject) -> None:
    dtype, session = onnx_session
    u = torch.cat([data.draw(count_values(neuron, dtype)) for neuron in EXPORTED])
    u = torch.cat([u, u / 3, u * (1 + 1e-7)])  # single operators agree on any float, not on exact grids only
    found = session.run(None, {session.get_inputs()[0].name: u.numpy()})
    for neuron, counts in zip(EXPORTED, found, strict=True):
        assert torch.equal(torch.from_numpy(counts), closed_form(neuron, u)), neuron


def test_onnx_uses_only_operators_with_gpu_kernels(onnx_session: Any) -> None:
    import onnx

    model = onnx.load(onnx_session[1]._model_path)
    assert {node.op_type for node in model.graph.node} <= {
        "Floor",
        "Clip",
        "Add",
        "Mul",
        "Sub",
        "Constant",
        "Identity",
    }
    assert not model.functions and {o.domain for o in model.opset_import} <= {"", "ai.onnx"}


def test_compiled_counts_are_the_same() -> None:
    def every(u: Tensor) -> list[Tensor]:
        return [count.op(u, *n.args) for n in ONE_PER_CODE]

    u = torch.cat([torch.tensor(corners(n)) for n in ONE_PER_CODE] + [3 * torch.randn(1000)])
    compiled = torch.compile(every, fullgraph=True)
    for found, wanted in zip(compiled(u), every(u), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", [count.op, fire.op, qcfs.op], ids=str)
@pytest.mark.parametrize("neuron", ONE_PER_CODE, ids=lambda n: n.code)
def test_exported_operator_stays_one_node(op: Any, neuron: Neuron) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            theta = () if op is count.op else (x.new_tensor(2.0),)
            return op(x, *theta, *neuron.args)

    exported = torch.export.export(Module(), (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert [n.target for n in exported.graph.nodes].count(op) == 1
    x = torch.randn(5, 4)
    assert torch.equal(exported.module()(x), Module()(x))


class Called(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("op", [count.op, byte_count.op], ids=str)
def test_a_fake_tensor_takes_no_step(op: Any) -> None:
    neuron = Neuron("radix", 7, 1, True)
    with FakeTensorMode(), Called() as called:
        found = op(torch.empty(3, 4), *neuron.args)
    assert (found.shape, found.dtype) == ((3, 4), op(torch.empty(1), *neuron.args).dtype)
    assert called.names == ["aten.empty.memory_format", "aten.empty_like.default"]


def test_a_fake_tensor_knows_that_it_learns() -> None:
    with FakeTensorMode():
        theta = torch.ones(4, requires_grad=True)
        assert qcfs.op(torch.empty(3, 4), theta, *Neuron("rate", 8, 1, True).args).requires_grad
        assert not qcfs.op(torch.empty(3, 4), theta.detach(), *Neuron("rate", 8, 1, True).args).requires_grad


@pytest.mark.parametrize("neuron", ONE_PER_CODE, ids=lambda n: n.code)
def test_a_traced_fake_tensor_takes_every_step(neuron: Neuron) -> None:
    def counted(u: Tensor) -> Tensor:
        return count.op(u, *neuron.args)

    u = torch.tensor(corners(neuron))
    traced = make_fx(counted, tracing_mode="fake")(u)
    assert torch.equal(traced(u), counted(u))


# --- bounds ----------------------------------------------------------------------------------------------


def promised(neuron: Neuron, theta: float) -> float:
    """The bounds written down once more, independently of the table of codes."""
    steps = neuron.steps
    share = {
        "rate": 1 / (2 * steps),
        "radix": 1 / (2 * (2**steps - 1)),
        "multi": max(4.0**-steps, 2.0**-neuron.levels),
    }
    return theta * share[neuron.code]


@given(st.data(), neurons(), thresholds())
@settings(max_examples=150)
def test_error_is_within_the_bound(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    x = data.draw(values_in_range(neuron, theta))
    bound = promised(neuron, theta)
    assert np.isclose(neuron.row.error_bound(theta, neuron.steps, neuron.levels), bound, rtol=ROUNDING)
    if neuron.code == "multi":
        assert bound <= theta * max(3.0**-neuron.steps, 2.0**-neuron.levels)
    for form in (fired, quantised):
        error = float((form(neuron, x, theta) - x).abs().max())
        assert error <= bound + ROUNDING * theta


@given(st.data(), neurons(), powers_of_two())
def test_values_outside_are_clipped(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    x = theta * torch.tensor(data.draw(st.lists(st.floats(1.0, 1e6), min_size=1)), dtype=torch.float64)
    low = -theta if neuron.signed else 0.0
    for form in (fired, quantised):
        assert form(neuron, x, theta).tolist() == [theta] * len(x)
        assert form(neuron, -x, theta).tolist() == [low] * len(x)


@given(neurons(), thresholds())
def test_doubling_the_steps_halves_the_bound(neuron: Neuron, theta: float) -> None:
    """Down to the last level of a multi neuron, which no further step can halve."""
    once, twice = (neuron.row.error_bound(theta, steps, neuron.levels) for steps in (neuron.steps, 2 * neuron.steps))
    floor = theta * 2.0**-neuron.levels if neuron.code == "multi" else 0.0
    assert twice <= max(once / 2, floor) * (1 + ROUNDING)


def test_bounds_name_known_symbols() -> None:
    for code in CODES.values():
        assert {s.name for s in code.bound.free_symbols} <= {"theta", "T", "levels"}
        assert isinstance(code.bound, sympy.Expr) and code.source


@given(st.data(), neurons(("rate",)), thresholds())
def test_qcfs_has_the_count_of_the_rate_neuron(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    """QCFS written from its formula, L = T: equal to the neuron's decoded spikes away from ties."""
    x = data.draw(values_in_range(neuron, theta)) * 1.5
    scaled = x * neuron.steps / theta
    clear = ((scaled - scaled.floor()) - 0.5).abs() > 1e-6
    assume(bool(clear.any()))
    low = -1.0 if neuron.signed else 0.0
    formula = theta * torch.clip(torch.floor(scaled + 0.5) / neuron.steps, low, 1.0)
    wanted = (formula * neuron.steps / theta).round()[clear].tolist()
    events = neuron.row.spikes(x[clear] * (neuron.steps / theta), *neuron.numbers)
    assert neuron.row.decode(events, 1).tolist() == wanted
    for form in (fired, quantised):
        assert torch.allclose(form(neuron, x, theta)[clear], formula[clear], rtol=ROUNDING, atol=ROUNDING * theta)


@given(st.data(), neurons(), thresholds(), powers_of_two(), st.sampled_from(DTYPES))
def test_scaling_x_and_theta_scales_y(
    data: st.DataObject, neuron: Neuron, theta: float, factor: float, dtype: torch.dtype
) -> None:
    x = data.draw(values_in_range(neuron, theta)).to(dtype)
    threshold = torch.tensor(theta, dtype=dtype)
    for form in (fired, quantised):
        assert torch.equal(form(neuron, x * factor, threshold * factor), form(neuron, x, threshold) * factor)


@given(st.data(), neurons(("radix", "multi")), powers_of_two())
def test_what_was_sent_is_sent_again_unchanged(data: st.DataObject, neuron: Neuron, factor: float) -> None:
    """A transmitted radix value is on the grid; a multi value costs no more steps than it did."""
    theta = neuron.top * factor
    x = data.draw(values_in_range(neuron, theta))
    once = fired(neuron, x, theta)
    assert torch.equal(fired(neuron, once, theta), once)


@given(st.data(), neurons(), thresholds())
def test_threshold_per_channel_broadcasts(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    x = data.draw(values_in_range(neuron, theta)).repeat(3, 1).T  # [values, 3]
    theta_3 = torch.tensor([theta, theta / 2, theta * 4], dtype=torch.float64)
    for form in (fired, quantised):
        together = form(neuron, x, theta_3)
        for channel in range(3):
            assert torch.equal(together[:, channel], form(neuron, x[:, channel], theta_3[channel]))


# --- initial potential -----------------------------------------------------------------------------------


def potentials(neuron: Neuron) -> st.SearchStrategy[float]:
    """In counts of the value sent, eighths: a rate neuron spreads its potential over its steps."""
    return st.integers(-16, 16).map(lambda eighths: eighths / 8)


def spread(neuron: Neuron) -> int:
    """Potential that amounts to one unit of constant input."""
    return neuron.steps if neuron.code == "rate" else 1


@given(st.data(), neurons(), st.sampled_from(DTYPES), powers_of_two())
def test_a_potential_is_added_before_rounding(
    data: st.DataObject, neuron: Neuron, dtype: torch.dtype, unit: float
) -> None:
    """Stepwise and closed form give the same counts, those of an input that is larger by the potential's share."""
    u, added = data.draw(count_values(neuron, dtype)), data.draw(potentials(neuron))
    initial, theta = (torch.tensor(x * unit, dtype=dtype) for x in (added * spread(neuron), neuron.top))
    wanted = [neuron.reference(value) * unit for value in (u + added).tolist()]
    for form in (fire.op, qcfs.op):
        assert form(u * unit, theta, *neuron.args, initial).tolist() == wanted
        assert form(u * unit, theta, *neuron.args, 0 * initial).tolist() == form(u * unit, theta, *neuron.args).tolist()


@given(st.data(), neurons(("rate",)), powers_of_two())
def test_a_rate_neuron_sends_initial_over_theta_spikes_more(data: st.DataObject, neuron: Neuron, unit: float) -> None:
    """n = clip(floor(x T / theta + initial / theta + 1/2), -T or 0, T)"""
    u, added = data.draw(count_values(neuron)), data.draw(potentials(neuron))
    x, theta = u * unit, neuron.steps * unit
    n = (u + added + 0.5).floor().clamp(neuron.low, neuron.steps)
    for form in (fire.op, qcfs.op):
        sent = form(x, torch.tensor(theta).double(), *neuron.args, torch.tensor(added * theta).double())
        assert (sent * neuron.steps / theta).tolist() == n.tolist()


@given(st.data(), st.sampled_from(("multi", "rate")), st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_a_tick_neuron_has_sent_the_same_after_t_ticks(
    data: st.DataObject, code: str, steps: int, levels: int, signed: bool
) -> None:
    """A rate neuron adds initial / theta / t to its input in tick t. Its values are never negative where unsigned."""
    neuron, rate = Neuron(code, steps, levels, signed), code == "rate"
    added = data.draw(potentials(neuron))
    if rate:
        low = -64 if signed else 0
        values = [i / 64 for i in data.draw(st.lists(st.integers(low, 64), min_size=1))]
        u = torch.tensor(values, dtype=torch.float64) * steps
        added = added if signed else max(added, -0.5)
    else:
        u = data.draw(count_values(neuron))
    sent = torch.zeros_like(u)
    for number in range(1, steps + 1):
        given_now = u / steps + added / number if rate else 2 * (u + added)
        sent = tick.op(given_now, sent, torch.tensor(number), code, levels, signed)
    theta, initial = torch.tensor(float(neuron.top)).double(), torch.tensor(added * spread(neuron)).double()
    assert (sent / (1 if rate else 2)).tolist() == fire.op(u, theta, *neuron.args, initial).tolist()


@given(st.data(), neurons())
def test_a_potential_per_channel_broadcasts(data: st.DataObject, neuron: Neuron) -> None:
    x = data.draw(count_values(neuron)).repeat(3, 1).T  # [values, 3]
    theta = torch.tensor(float(neuron.top), dtype=torch.float64)
    initial = torch.tensor([data.draw(potentials(neuron)) * spread(neuron) for _ in range(3)], dtype=torch.float64)
    for form in (fire.op, qcfs.op):
        together = form(x, theta, *neuron.args, initial)
        for channel in range(3):
            assert torch.equal(together[:, channel], form(x[:, channel], theta, *neuron.args, initial[channel]))


# --- gradients -------------------------------------------------------------------------------------------


@given(st.data(), neurons(), powers_of_two())
def test_qcfs_gradients_are_those_of_lsq(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    """Straight-through: d/dx is 1 inside, 0 outside; d/dtheta is (y - x) / theta inside, y / theta outside.

    Source: Esser et al. 2020 (LSQ), eq. 3 and 5, before their gradient scale.
    """
    x = data.draw(values_in_range(neuron, theta)) * 1.75
    x = x[(x - theta).abs() > 0][: len(x)]  # the ends themselves may be counted either way
    x = x[x != (-theta if neuron.signed else 0.0)].requires_grad_()
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    weight = torch.arange(1, len(x) + 1, dtype=torch.float64)
    y = quantised(neuron, x, parameter)
    assert torch.equal(y.detach(), quantised(neuron, x.detach(), theta))  # gradients change no value
    (y * weight).sum().backward()
    inside = (x.detach() < theta) & (x.detach() > (-theta if neuron.signed else 0.0))
    wanted = (y.detach() - torch.where(inside, x.detach(), 0.0)) / theta
    assert x.grad is not None and parameter.grad is not None
    assert torch.allclose(x.grad, weight * inside, rtol=ROUNDING, atol=0)
    scale = float((weight * (y.detach().abs() + x.detach().abs())).sum()) / theta
    assert abs(float(parameter.grad - (weight * wanted).sum())) <= len(x) * ROUNDING * scale


@pytest.mark.parametrize("form", [qcfs.op, fire.op], ids=["qcfs", "fire"])
@pytest.mark.parametrize("neuron", ONE_PER_CODE, ids=lambda n: n.code)
def test_below_the_range_of_an_unsigned_neuron_there_is_nothing_to_learn(form: Any, neuron: Neuron) -> None:
    x = torch.tensor([-2.0, -0.1], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    unsigned = Neuron(neuron.code, neuron.steps, neuron.levels, False)
    form(x, theta, *unsigned.args).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0]
    assert theta.grad is not None and float(theta.grad) == 0.0


@pytest.mark.parametrize("form", [qcfs.op, fire.op], ids=["qcfs", "fire"])
@pytest.mark.parametrize("neuron", ONE_PER_CODE, ids=lambda n: n.code)
def test_gradient_of_a_potential_is_its_share_inside_the_range(form: Any, neuron: Neuron) -> None:
    theta, weight = torch.tensor(1.0).double().requires_grad_(), torch.tensor([1.0, 2.0, 4.0, 8.0]).double()
    x = torch.tensor([-2.0, -0.4, 0.3, 2.0], dtype=torch.float64)
    initial = torch.tensor(0.1 * spread(neuron), dtype=torch.float64, requires_grad=True)
    y = form(x, theta, *neuron.args, initial)
    (y * weight).sum().backward()
    assert initial.grad is not None and theta.grad is not None
    assert float(initial.grad) == pytest.approx(6.0 / spread(neuron), rel=ROUNDING)
    rounding = y.detach() - torch.where(x.abs() < 1, x + 0.1, 0.0)
    assert float(theta.grad) == pytest.approx(float((weight * rounding).sum()), rel=1e-12)


@given(st.data(), neurons(), powers_of_two())
def test_fire_surrogate_gradient_is_that_of_clip(data: st.DataObject, neuron: Neuron, theta: float) -> None:
    x = (data.draw(values_in_range(neuron, theta)) * 1.75).requires_grad_()
    y = fired(neuron, x, theta)
    assert torch.equal(y.detach(), fired(neuron, x.detach(), theta))
    y.sum().backward()
    wanted = torch.autograd.grad(x.clamp(-theta if neuron.signed else 0.0, theta).sum(), x)[0]
    assert x.grad is not None and torch.allclose(x.grad, wanted, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("neuron", ONE_PER_CODE, ids=lambda n: n.code)
def test_count_passes_gradients_straight_through(neuron: Neuron) -> None:
    u = torch.tensor([-2.0 * neuron.top, -0.3, 0.4, 2.0 * neuron.top], dtype=torch.float64, requires_grad=True)
    closed_form(neuron, u).sum().backward()
    assert u.grad is not None and u.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@given(neurons())
def test_unsigned_neurons_are_the_positive_half(neuron: Neuron) -> None:
    u = torch.tensor(corners(neuron), dtype=torch.float64).abs()
    signed = Neuron(neuron.code, neuron.steps, neuron.levels, True)
    assert operator.eq(closed_form(neuron, u).tolist(), closed_form(signed, u).tolist())
