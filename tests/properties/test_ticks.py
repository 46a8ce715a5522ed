"""The synchronous schedule: one neuron and whole networks, tick by tick, in torch and ONNX Runtime."""

import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Attention, Net, Neuron, count_values, exact_net, round_peaks
from torch import Tensor, nn
from torch.nn import functional as F

import fasfx
from fasfx.config import MAX_LEVELS, SpikeConfig
from fasfx.difference import Difference, main_output
from fasfx.ops import CODES, count, tick
from fasfx.program import copy_program, facts

TICKING = tuple(name for name, code in CODES.items() if code.ticking)
FLOOR = 1e-4  # relative error of a network below which its levels matter and not its ticks


def run(code: str, inputs: list[Tensor], levels: int, signed: bool) -> list[Tensor]:
    """What a neuron has sent after each tick; inputs in the unit of the tick."""
    sent, found = torch.zeros_like(inputs[0]), []
    for number, u in enumerate(inputs, 1):
        sent = tick.op(u, sent, torch.tensor(number), code, levels, signed)
        found.append(sent)
    return found


# --- one neuron ------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, MAX_LEVELS), st.integers(1, 9), st.booleans(), st.sampled_from([32, 64]))
def test_constant_input_gives_the_sequential_count(
    data: st.DataObject, levels: int, steps: int, signed: bool, bits: int
) -> None:
    dtype = torch.float32 if bits == 32 else torch.float64
    u = data.draw(count_values(Neuron("multi", steps, levels, signed), dtype))
    expected = count.op(u, "multi", steps, levels, signed)
    assert torch.equal(run("multi", [2 * u] * steps, levels, signed)[-1], 2 * expected)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(1, 200))
def test_rate_follows_a_constant_within_half_a_threshold_over_t(values: list[float], steps: int) -> None:
    u = torch.tensor(values, dtype=torch.float64)
    for number, sent in enumerate(run("rate", [u] * steps, 1, True), 1):
        assert bool((number * (sent / number - u).abs() <= 0.5 + 1e-9).all())


@given(st.integers(1, 12), st.booleans(), st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_a_changing_input_is_sent_in_legal_spikes(levels: int, signed: bool, inputs: list[float]) -> None:
    """One power of two per tick, none above the threshold, also when the input jumps; then it settles."""
    top = 2.0**levels
    sequence = [torch.tensor([top * x]) for x in inputs]
    sent = [torch.zeros(1), *run("multi", sequence, levels, signed)]
    for before, after in zip(sent, sent[1:], strict=False):
        event = CODES["multi"].ticking.event(after - before, levels)
        assert abs(int(event)) <= levels
        weight = 0.0 if event == 0 else float(event.sign()) * 2.0 ** (levels + 1 - abs(int(event)))
        assert float(after - before) == weight
    settled = sent[-1]
    for _ in range(levels + 3):
        settled = tick.op(sequence[-1], settled, torch.tensor(99), "multi", levels, signed)
    inside = sequence[-1].clamp(-top if signed else 0, top)
    assert float((settled - inside).abs()) <= 1.0  # half a count


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_rate_spikes_are_minus_one_zero_or_one_and_take_back_what_was_wrong(inputs: list[float]) -> None:
    sequence = [torch.tensor([x]) for x in inputs]
    sent = torch.cat([torch.zeros(1), *run("rate", sequence, 1, False)])
    assert bool(((sent[1:] - sent[:-1]).abs() <= 1).all())
    assert float(run("rate", [torch.ones(1)] * 5 + [torch.zeros(1)] * 9, 1, False)[-1]) == 0


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def onnx_tick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    class Ticks(nn.Module):
        def forward(self, u: Tensor, sent: Tensor, number: Tensor) -> list[Tensor]:
            return [tick.op(u, sent, number, *neuron) for neuron in NEURONS]

    path = tmp_path_factory.mktemp("onnx") / "ticks.onnx"
    zeros = torch.zeros(3, dtype=request.param)
    size = {0: torch.export.Dim("size")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Ticks(),
            (zeros, zeros.clone(), torch.tensor(1)),
            path,
            dynamo=True,
            dynamic_shapes={"u": size, "sent": size, "number": {}},
            opset_version=18,
            verbose=False,
        )
    return request.param, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


NEURONS = [("multi", levels, signed) for levels in (1, 4, 20, 24) for signed in (True, False)] + [("rate", 1, True)]


@given(st.integers(0, 2**16), st.integers(1, 50))
@settings(max_examples=30)
def test_onnx_sends_the_same(onnx_tick: Any, seed: int, number: int) -> None:
    dtype, session = onnx_tick
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(0, 24, (400,), generator=generator)
    u = (scale * torch.randn(400, generator=generator)).to(dtype)
    u[::2] = (u[::2] * 2).round() / 2  # rounding ties
    sent = (scale * torch.randn(400, generator=generator) / 2).round().to(dtype) * 2
    found = session.run(None, {"u": u.numpy(), "sent": sent.numpy(), "number": np.array(number)})
    for neuron, value in zip(NEURONS, found, strict=True):
        assert torch.equal(torch.from_numpy(value), tick.op(u, sent, torch.tensor(number), *neuron)), neuron


@pytest.mark.parametrize("code", TICKING)
def test_gradient_is_that_of_sending_without_rounding(code: str) -> None:
    """Within reach everything is sent, so the state drops out; beyond, a spike is constant and the state stays."""
    unit = CODES[code].ticking.unit(4)
    reach = unit if code == "multi" else 1
    u = torch.tensor([0.3 * reach, 0.3 * reach], dtype=torch.float64, requires_grad=True)
    sent = torch.tensor([0.0, 9.0 * reach], dtype=torch.float64, requires_grad=True)
    number = torch.tensor(3)
    tick.op(u, sent, number, code, 4, True).sum().backward()
    factor = 3.0 if code == "rate" else 1.0
    assert u.grad.tolist() == [factor, 0.0]
    assert sent.grad.tolist() == [0.0, 1.0]


# --- networks --------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks of the kinds named, one after the other, each behind a residual path."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.parts = nn.ModuleList(
            Attention(16, 2, 2)
            if kind == "attention"
            else nn.ModuleList([nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)])
            for kind in kinds
        )

    def forward(self, x: Tensor) -> Tensor:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            x = x + (part(x) if kind == "attention" else self.block(kind, part, x))
        return x

    @staticmethod
    def block(kind: str, part: Any, x: Tensor) -> Tensor:
        norm, a, b = part
        if kind == "gate":
            return F.silu(a(x)) * b(x)
        return b(F.gelu(a(norm(x) if kind == "norm" else x)))


def error(snn: fasfx.SpikingModel, reference: Tensor, batch: dict[str, Tensor], steps: int) -> list[float]:
    snn.timesteps = steps
    found = []
    for output in snn.ticks(**batch):
        difference = Difference()
        difference.add(reference, main_output(output))
        found.append(difference.relative_l2)
    return found


@given(
    st.lists(st.sampled_from(["linear", "attention", "norm", "gate"]), min_size=1, max_size=8), st.integers(0, 2**16)
)
@settings(max_examples=8, deadline=None)
def test_four_ticks_more_quarter_the_error(kinds: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    module, batch = Deep(kinds).double().eval(), {"x": torch.randn(4, 6, 16, dtype=torch.float64)}
    snn = fasfx.convert(module, [batch], SpikeConfig.low_latency())
    with torch.no_grad():
        found = error(snn, module(**batch), batch, 12)
    for before, after in zip(found, found[4:], strict=False):
        assert after <= max(before / 4, FLOOR), found


def exact(name: str, code: str, ticks: int) -> tuple[Net, fasfx.SpikingModel]:
    """A network whose sums are exact in float64, so that every form must agree on every count."""
    made = exact_net(name)
    config = SpikeConfig(
        nonlinear="exact",
        code=code,
        schedule="synchronous",
        timesteps=ticks,
        levels=8,
        margin=1.0,
        granularity="tensor",
    )
    snn = fasfx.convert(made.module, [made.batch], config)
    ranged = copy_program(snn.ranged)
    facts(ranged).sites = dict(facts(ranged).sites)
    round_peaks(ranged)
    return made, fasfx.SpikingModel(ranged)


@pytest.mark.parametrize("code", TICKING)
@pytest.mark.parametrize("name", ["mlp", "views", "matmul", "attention", "permute"])
def test_all_ways_to_run_agree_on_counts(name: str, code: str, tmp_path: Any) -> None:
    """forward = last tick = sum of decoded spikes = Loop = step graph by hand."""
    made, snn = exact(name, code, 4)
    with torch.no_grad():
        expected = main_output(snn(**made.batch))
        outputs = [main_output(output) for output in snn.ticks(**made.batch)]
        state = snn.state(**made.batch)
        for _ in range(4):
            by_hand, state = snn.step(state, **made.batch)
    assert len(outputs) == 4 and torch.equal(outputs[-1], expected) and torch.equal(main_output(by_hand), expected)
    for site, train in snn.spikes(**made.batch).items():
        counts = state.sent[site] / (2 if code == "multi" else 1)
        assert train.events.shape == (4, *counts.shape)
        assert torch.equal(train.counts().to(counts.dtype), counts)
    for form in ("loop", "step"):
        snn.to_onnx(tmp_path / form, form=form)
        found = main_output(fasfx.runtime.OnnxModel(tmp_path / form)(**made.batch))
        tolerance = 0 if name in ("mlp", "views", "matmul", "permute") and code == "multi" else 1e-12  # exp, 1/t: float
        assert torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max())), form


def test_constant_input_makes_both_schedules_agree() -> None:
    """One layer of neurons sees constant input: the schedules must give the same counts."""
    made, snn = exact("linear", "multi", 5)
    synchronous = snn(**made.batch)
    snn.schedule = "sequential"
    assert torch.equal(main_output(synchronous), main_output(snn(**made.batch)))


@pytest.mark.parametrize("code", TICKING)
def test_a_changed_t_is_a_fresh_conversion(code: str, tmp_path: Any) -> None:
    made, snn = exact("mlp", code, 3)
    snn.to_onnx(tmp_path)
    model = fasfx.runtime.OnnxModel(tmp_path)
    for steps in (1, 3, 7):
        _, fresh = exact("mlp", code, steps)
        expected = main_output(fresh(**made.batch))
        snn.timesteps = steps
        assert torch.equal(main_output(snn(**made.batch)), expected)
        assert torch.allclose(main_output(model(timesteps=steps, **made.batch)), expected, rtol=1e-12)
