"""SpikingModel keeps the calling convention of its original and does what its methods promise."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter

import fasfx
from fasfx import ops
from fasfx.capture import evaluating
from fasfx.errors import CheckpointError, ConfigError, CoverageError, InputError
from fasfx.passes.clip import thresholds
from fasfx.program import facts
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

Batch = dict[str, Any]
NUM_STEPS = 12  # of the multi code: a neuron errs by at most theta * 3^-12
CLOSE = 1e-3  # relative L2 of the whole two-layer network at NUM_STEPS
SIZES = ((1, 2), (1, 9), (3, 12), (5, 40))  # batch, length; captured was (4, 12)


def constants(family: str) -> Batch:
    return {"use_cache": False} if family in ("gpt2", "llama", "opt", "t5") else {}


def calibration(family: str) -> list[Batch]:
    return [tiny_inputs(family, 4, 12, seed) | constants(family) for seed in range(3)]


def first(outputs: Any) -> Tensor:
    value: Tensor = outputs[0]
    return value


def convert(family: str, **fields: Any) -> fasfx.SpikingModel:
    return fasfx.convert(tiny(family), calibration(family), fasfx.SpikeConfig(**fields))


@pytest.fixture(scope="module", params=sorted(TINY))
def pair(request: Any) -> tuple[str, nn.Module, fasfx.SpikingModel]:
    """(family, original, spiking network at NUM_STEPS)"""
    return request.param, tiny(request.param), convert(request.param, timesteps=NUM_STEPS)


@pytest.fixture(scope="module")
def bert() -> fasfx.SpikingModel:
    return convert("bert")


# --- outputs and inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_are_the_originals(pair: tuple[str, nn.Module, fasfx.SpikingModel], size: tuple[int, int]) -> None:
    family, model, snn = pair
    inputs = tiny_inputs(family, *size, seed=7)
    with torch.no_grad(), evaluating(model):
        expected, found = model(**inputs, **constants(family)), snn(**inputs, **constants(family))
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    assert [v.shape for v in found.values()] == [v.shape for v in expected.values()]
    assert (first(found) - first(expected)).norm() < CLOSE * first(expected).norm()


def test_constants_of_the_capture(pair: tuple[str, nn.Module, fasfx.SpikingModel]) -> None:
    family, _, snn = pair
    inputs = tiny_inputs(family)
    expected = first(snn(**inputs))
    for name, value in constants(family).items():
        assert torch.equal(first(snn(**inputs, **{name: value})), expected)
        with pytest.raises(InputError, match=f"captured with {name}={value!r}"):
            snn(**inputs, **{name: not value})
    assert torch.equal(first(snn(**inputs, labels=None)), expected)  # None is what the original's default is


def test_positional_arguments_are_those_of_the_original(bert: fasfx.SpikingModel) -> None:
    inputs = tiny_inputs("bert")
    expected = first(bert(**inputs))
    assert bert.input_names == ["input_ids", "attention_mask"]
    assert torch.equal(first(bert(inputs["input_ids"], inputs["attention_mask"])), expected)
    assert torch.equal(first(bert(inputs["input_ids"], attention_mask=inputs["attention_mask"])), expected)


def test_positional_order_does_not_depend_on_the_calibration_dict() -> None:
    batch = tiny_inputs("bert", 4)
    shuffled = {name: batch[name] for name in ("attention_mask", "input_ids")}
    snn = fasfx.convert(tiny("bert"), [shuffled])
    expected = first(snn(**batch))
    assert torch.equal(first(snn(batch["input_ids"], batch["attention_mask"])), expected)
    again = fasfx.convert(tiny("bert"), [batch, shuffled])
    assert torch.equal(first(again(**shuffled)), first(again(**batch)))


def test_calibration_batches_are_bound_by_name() -> None:
    batch = tiny_inputs("bert", 4)
    backwards = dict(reversed(batch.items()))
    peaks = [
        [site.peak for site in facts(fasfx.convert(tiny("bert"), [batch, other]).ranged).sites.values()]
        for other in (batch, backwards)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*peaks, strict=True))


BAD_CALLS: dict[str, tuple[tuple[Any, ...], Batch, str]] = {
    "nothing": ((), {}, "missing input input_ids, attention_mask"),
    "missing": ((), {"input_ids": "ok"}, "missing input attention_mask"),
    "unknown": ((), {"input_ids": "ok", "attention_mask": "ok", "colour": "ok"}, "unknown input colour"),
    "unknown flag": ((), {"input_ids": "ok", "attention_mask": "ok", "output_attentions": True}, "output_attentions"),
    "too many": (("ok", "ok", "ok"), {}, "3"),
    "twice": (("ok", "ok"), {"input_ids": "ok"}, "input_ids"),
    "dtype": ((), {"input_ids": "float", "attention_mask": "ok"}, "input_ids is torch.float32"),
    "rank": ((), {"input_ids": "row", "attention_mask": "ok"}, "rank 1"),
    "no tensor": ((), {"input_ids": [[3, 4]], "attention_mask": "ok"}, "input_ids is a list"),
    "batch sizes": ((), {"input_ids": "ok", "attention_mask": "longer"}, "attention_mask"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case: str, bert: fasfx.SpikingModel) -> None:
    args, kwargs, words = BAD_CALLS[case]
    good = torch.ones(2, 5, dtype=torch.long)
    values = {"ok": good, "float": good.float(), "row": good[0], "longer": torch.ones(3, 5, dtype=torch.long)}

    def value(given: Any) -> Any:
        return values[given] if isinstance(given, str) else given

    with pytest.raises(InputError, match=words):
        bert(*(value(a) for a in args), **{k: value(v) for k, v in kwargs.items()})


def test_image_of_another_size() -> None:
    snn = convert("vit")
    with pytest.raises(InputError, match="pixel_values has size 32 in dim 2: the model takes 16"):
        snn(pixel_values=torch.randn(2, 3, 32, 32))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.first(x))
        return {"logits": self.second(hidden) * scale, "hidden": (hidden, [x])}


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_plain_module(kind: type) -> None:
    model = TwoOutputs()
    batches = [(torch.randn(4, 6), torch.rand(4, 1)) for _ in range(2)]
    given = [dict(zip(("x", "scale"), b, strict=True)) for b in batches] if kind is dict else [kind(b) for b in batches]
    snn = fasfx.convert(model, given, fasfx.SpikeConfig(timesteps=NUM_STEPS))
    assert model.training  # as it was
    x, scale = torch.randn(3, 6).clamp(-1, 1), torch.rand(3, 1)
    with torch.no_grad():
        expected, found = model(x, scale), snn(x, scale)
    assert found["logits"].shape == (3, 3)
    assert torch.equal(found["hidden"][1][0], x)
    assert (found["logits"] - expected["logits"]).norm() < CLOSE * expected["logits"].norm()


def test_module_with_one_tensor_per_batch() -> None:
    snn = fasfx.convert(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), [torch.randn(5, 3)])
    assert snn(torch.randn(2, 3)).shape == (2, 2)


def test_dataloader_as_calibration() -> None:
    rows = [{"input_ids": r["input_ids"][0], "attention_mask": r["attention_mask"][0]} for r in calibration("bert")]
    snn = fasfx.convert(tiny("bert"), torch.utils.data.DataLoader(rows * 2, batch_size=2))  # type: ignore[arg-type]
    assert first(snn(**tiny_inputs("bert"))).shape == (2, 12, 32)


# --- time steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["multi", "radix", "rate"])
def test_setting_timesteps_equals_converting_with_them(code: Any) -> None:
    inputs = tiny_inputs("bert", seed=5)
    snn = convert("bert", code=code, timesteps=3)
    before = first(snn(**inputs))
    snn.timesteps = 6
    assert snn.timesteps == snn.spike_config.timesteps == 6
    fresh = convert("bert", code=code, timesteps=6)
    assert torch.equal(first(snn(**inputs)), first(fresh(**inputs)))
    assert snn.ledger.table.equals(fresh.ledger.table)
    snn.timesteps = 3
    assert torch.equal(first(snn(**inputs)), before)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_bad_timesteps_change_nothing(steps: Any, bert: fasfx.SpikingModel) -> None:
    expected = first(bert(**tiny_inputs("bert")))
    with pytest.raises(ConfigError, match="timesteps"):
        bert.timesteps = steps
    assert bert.timesteps == 4
    assert torch.equal(first(bert(**tiny_inputs("bert"))), expected)


# --- spikes ---------------------------------------------------------------------------------------------


class Counts(Interpreter):
    """The counts that a lowered program computes with, by site."""

    def __init__(self, snn: fasfx.SpikingModel) -> None:
        super().__init__(snn.graph_module)
        self.found: dict[str, Tensor] = {}
        self.ties: dict[str, Tensor] = {}  # where the input lies between two counts, up to float rounding

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is ops.count.op:
            half = self.env[n.args[0]] + 0.5
            self.ties[n.meta["site"]] = (half - half.round()).abs() < 1e-6
        value = super().run_node(n)
        if n.target is ops.count.op:
            self.found[n.meta["site"]] = value
        return value


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("code", ["multi", "radix", "rate"])
def test_spikes_are_what_the_network_computes_with(code: Any, granularity: Any) -> None:
    snn, inputs = convert("bert", code=code, granularity=granularity), tiny_inputs("bert", seed=3)
    used = Counts(snn)
    with torch.no_grad():
        used.run(*inputs.values())
    trains = snn.spikes(**inputs)
    sites = facts(snn.ranged).sites
    assert list(trains) == list(used.found)
    assert set(trains) == set(sites)
    theta = thresholds(snn.ranged)
    for name, train in trains.items():
        assert train.events.dtype == torch.int8
        assert train.events.shape[0] == snn.timesteps * sites[name].population
        capacity = ops.CODES[code].capacity(len(train.events), 20)
        agree = (train.counts() == used.found[name]) | used.ties[name]
        assert bool(agree.all()) and float(used.ties[name].double().mean()) < 0.2
        assert torch.equal(train.decode(), train.counts() * train.scale)
        if granularity != "token" or sites[name].fixed is not None:
            assert torch.equal(train.scale, theta[name] / capacity)
        assert 0 <= train.firing_rate <= 1
        assert sites[name].signed or int(train.counts().min()) >= 0  # multi corrects downwards, in between


def test_spikes_take_the_arguments_of_forward(bert: fasfx.SpikingModel) -> None:
    inputs = tiny_inputs("bert")
    for train, other in zip(bert.spikes(**inputs).values(), bert.spikes(*inputs.values()).values(), strict=True):
        assert torch.equal(train.events, other.events)
    with pytest.raises(InputError, match="missing input"):
        bert.spikes()


# --- choices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_granularity(family: str, granularity: Any) -> None:
    snn, model, inputs = (
        convert(family, granularity=granularity, timesteps=NUM_STEPS),
        tiny(family),
        tiny_inputs(family),
    )
    with torch.no_grad():
        expected = first(model(**inputs))
        assert (first(snn(**inputs)) - expected).norm() < CLOSE * expected.norm()
    sizes = {theta.numel() for theta in thresholds(snn.ranged).values()}
    assert (sizes == {1}) == (granularity == "tensor" or not any(size > 1 for size in sizes))
    assert granularity != "channel" or max(sizes) > 1


def test_percentile_is_below_the_maximum() -> None:
    batches = [tiny_inputs("bert", 16, 40, seed) for seed in range(2)]
    found = [
        thresholds(fasfx.convert(tiny("bert"), batches, fasfx.SpikeConfig(threshold=t)).ranged)  # type: ignore[arg-type]
        for t in ("percentile", "max")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(bool((found[0][name] <= found[1][name]).all()) for name in found[0])
    assert any(bool((found[0][name] < found[1][name]).any()) for name in found[0])


def test_margin_scales_thresholds() -> None:
    plain, wide = (thresholds(convert("bert", margin=m).ranged) for m in (1.0, 3.0))
    fixed = {name for name, site in facts(convert("bert").ranged).sites.items() if site.fixed is not None}
    powers = {name: torch.log(wide[name] / plain[name]).div(math.log(3)) for name in plain}
    assert all(bool(power.sub(power.round()).abs().max() < 1e-5) for power in powers.values())
    of = {name: int(power.round().max()) for name, power in powers.items()}
    assert {name for name, power in of.items() if power == 0} == fixed
    # a numerator of attention also grows with the length
    assert {n for n, power in of.items() if power == 2} == {n for n in plain if n.startswith("matmul")} != set()
    assert set(of.values()) == {0, 1, 2}


def test_skip_leaves_a_module_in_float(bert: fasfx.SpikingModel) -> None:
    snn = convert("bert", skip=(r"layer\.0\.intermediate",))
    table = snn.coverage.table
    skipped = table[table.reason == "its module is in config.skip"]
    modules = [f"encoder.layer.0.intermediate.{name}" for name in ("dense", "intermediate_act_fn")]
    assert list(skipped.module) == modules and list(skipped.kind) == ["synapse", "float"]
    assert snn.coverage.spike_driven_macs < bert.coverage.spike_driven_macs == 1
    expected = int(skipped.macs.sum()) / int(table.macs.sum())
    assert snn.coverage.spike_driven_macs == pytest.approx(1 - expected)


def test_strict_names_what_is_not_spike_driven() -> None:
    with pytest.raises(CoverageError, match=r"layer\.1\.output\.dense.*config\.skip"):
        convert("bert", skip=("layer.1.output.dense",), strict=True)
    assert convert("bert", strict=True).coverage.spike_driven_macs == 1


# --- tables ---------------------------------------------------------------------------------------------


def test_coverage_names_the_float_operators() -> None:
    bert = convert("bert", nonlinear="exact")
    assert {"layer_norm", "gelu", "exp", "div", "tanh"} <= set(bert.coverage.float_operators)
    table = bert.coverage.table
    assert list(table) == ["node", "module", "operator", "kind", "macs", "spike_driven", "reason"]
    assert (table[table.kind == "float"].spike_driven == False).all()  # noqa: E712
    assert "100.00% of multiply-accumulates" in str(bert.coverage)


def test_ledger_has_one_bound_per_site(bert: fasfx.SpikingModel) -> None:
    table = bert.ledger.table
    sites = facts(bert.ranged).sites
    neurons = table[table["pass"] == "clip"]
    assert list(neurons.node) == list(sites)
    assert (neurons.kind == "Bound").all()
    theta = thresholds(bert.ranged)
    code = ops.CODES["multi"]
    for row in neurons.itertuples():
        assert row.value == pytest.approx(
            code.error_bound(float(theta[row.node].max()), 4 * sites[row.node].population, 20)
        )
        assert row.assume.startswith("constant input")


def test_repr_says_what_it_is(bert: fasfx.SpikingModel) -> None:
    sites = len(facts(bert.ranged).sites)
    assert repr(bert).startswith(f"SpikingModel(multi, T=4, sequential, {sites} sites, 100.00% of multiply-accumulates")
    assert bert.latency_ticks["sequential"] % 4 == 0
    assert bert.latency_ticks["synchronous"] == 4


def test_the_original_is_untouched_and_its_weights_are_shared() -> None:
    model = tiny("bert").train()
    model.encoder.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    snn = fasfx.convert(model, calibration("bert"))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    held = {p.data_ptr() for p in snn.ranged.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= held


def test_a_network_is_copied_and_not_pickled(bert: fasfx.SpikingModel) -> None:
    again, batch = copy.deepcopy(bert), tiny_inputs("bert")
    again.timesteps = 2
    assert bert.timesteps != 2 and not torch.equal(first(again(**batch)), first(bert(**batch)))
    with pytest.raises(CheckpointError, match="SpikingModel cannot be pickled: use save_pretrained"):
        pickle.dumps(bert)
