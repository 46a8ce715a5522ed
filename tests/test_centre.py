"""Centred values: the same network for any weights, medians of the first batch, declined where it would not pay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import Calls, Net, aligned, outputs, same
from test_training import classifier, descend, inputs, text
from torch import Tensor, nn
from torch.nn import functional as F

import fasfx
from fasfx.capture import capture
from fasfx.errors import ConfigError
from fasfx.passes import Centre, Normalise, Rotate
from fasfx.passes.clip import thresholds
from fasfx.program import GraphModule, attribute, facts
from fasfx.ranging import calibrate
from fasfx.runner import Runner

aten = torch.ops.aten
CENTRED = fasfx.SpikeConfig(centre=True, nonlinear="exact", timesteps=1)


def centred(gm: GraphModule) -> list[Any]:
    """The differences that layers read."""
    return [n for n in gm.graph.find_nodes(op="call_function", target=aten.sub.Tensor) if "centre" in str(n.args[1])]


def ranged(call: Callable[..., Any], batches: list[Tensor], config: fasfx.SpikeConfig = CENTRED, **layers: Any) -> Any:
    """A function of its layers at RANGED."""
    return calibrate(Calls(call, **layers).eval(), [{"x": batch} for batch in batches], config)


def test_the_median_of_every_channel_in_the_first_batch_is_taken_off() -> None:
    first, second = torch.randn(3, 5, 8) + torch.arange(8.0), torch.randn(3, 5, 8) - 100
    gm = ranged(lambda m, x: m.a(x), [first, second], a=nn.Linear(8, 4))
    (difference,) = centred(gm)
    centre = attribute(gm, str(difference.args[1].target))
    assert torch.equal(centre, first.flatten(0, 1).median(0).values)
    (site,) = facts(gm).sites.values()
    assert site.name == difference.name and site.signed
    seen = torch.cat([first, second]).flatten(0, 1) - centre
    assert torch.equal(site.peak, seen.abs().amax(0))
    assert facts(gm).centres == []


class Masked(nn.Module):
    """A layer on positions, one on positions as rows, one on texts; a mask of padding, and one of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        rows = torch.tanh(self.a(x)).flatten(0, 1)
        pooled = self.a((x * attention_mask.unsqueeze(-1)).sum(1))
        return self.b(rows).view(len(x), -1).sum(1) + self.b(pooled).sum(1) + global_attention_mask.sum()


def test_padding_says_nothing_of_what_is_usual() -> None:
    """Half of every text is padding, and far off; a value without positions has its median over all rows."""
    torch.manual_seed(0)
    module, x, mask = Masked().eval(), torch.randn(6, 4, 8), torch.ones(6, 4, dtype=torch.int64)
    x[:, 2:], mask[:, 2:] = 100, 0
    first = torch.zeros_like(mask).index_fill(1, torch.tensor([0]), 1)
    gm = calibrate(module, [{"x": x, "attention_mask": mask, "global_attention_mask": first}], CENTRED)
    rows, pooled = x[:, :2].flatten(0, 1), x[:, :2].sum(1)
    seen = [rows, pooled, torch.tanh(module.a(rows)), module.a(pooled)]
    found = [attribute(gm, str(difference.args[1].target)) for difference in centred(gm)]
    assert len(found) == len(seen)
    for wanted in seen:
        assert any(torch.allclose(centre, wanted.median(0).values, rtol=1e-5, atol=1e-6) for centre in found)


@pytest.mark.parametrize("bias", [True, False])
def test_a_value_far_from_0_takes_one_spike(bias: bool) -> None:
    torch.manual_seed(0)
    module, batch = nn.Sequential(nn.Linear(8, 4, bias)), torch.randn(64, 8) + 100
    wanted, errors = module(batch).detach(), []
    for centre in (False, True):
        snn = fasfx.convert(module, [{"input": batch}], CENTRED.replace(centre=centre, schedule="synchronous"))
        errors.append(float((snn(input=batch).detach() - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.1 * errors[0]


DECLINED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "product": (
        lambda m, x: m.a(x) + torch.matmul(x, x.mT)[..., :1],
        {"a": nn.Linear(8, 8)},
        "aten.matmul.default reads it",
    ),
    "weight": (lambda m, x: F.linear(m.a, x[0]), {"a": torch.randn(8, 8)}, "aten.linear.default reads it"),
    "convolution": (lambda m, x: m.a(x), {"a": nn.Conv1d(5, 5, 3)}, "aten.conv1d.default reads it"),
    "rectifier": (lambda m, x: m.a(F.relu(x)), {"a": nn.Linear(8, 8)}, "it cannot be negative"),
    "dropout": (
        lambda m, x: m.a(F.dropout(x, 0.1, m.training)) + m.a(x),
        {"a": nn.Linear(8, 8)},
        "its readers see it through different operators",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_declines_and_why(name: str) -> None:
    call, layers, reason = DECLINED[name]
    x = torch.randn(3, 5, 8)
    module = Calls(call, **layers).train(name == "dropout")
    captured = capture(module, {"x": x}, CENTRED, training=name == "dropout")
    gm = Runner([Normalise(), Rotate(), Centre()]).run(captured)
    assert reason in {d.reason for d in facts(gm).declined if d.rule == "centre_layers"}
    assert not centred(gm)


def test_skipped_modules_and_other_configurations_are_left_alone() -> None:
    module, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"input": torch.randn(4, 8)}
    assert len(centred(fasfx.convert(module, [batch], CENTRED).ranged)) == 2
    assert len(centred(fasfx.convert(module, [batch], CENTRED.replace(skip=("^0$",))).ranged)) == 1
    assert not centred(fasfx.convert(module, [batch], CENTRED.replace(centre=False)).ranged)


def test_it_stays_exact_while_weights_train_and_spikes_follow() -> None:
    """At RANGED, with what training made of the weights, the network is the original's with these weights."""
    model, batches = classifier(), [text(seed) for seed in range(4)]
    qann = fasfx.prepare(model, batches, CENTRED.replace(timesteps=2, schedule="synchronous"))
    names = {name for name, _ in qann.named_parameters() if "theta" not in name}
    assert names == {name for name, _ in model.named_parameters()}
    descend(qann, batches, torch.optim.AdamW(qann.parameter_groups(1e-3, 1e-2)))
    snn = fasfx.convert(qann)
    assert centred(snn.ranged)
    trained = classifier()
    trained.load_state_dict({name: value for name, value in qann.state_dict().items() if name in names}, strict=False)
    given, far = inputs(batches[0]), classifier()(**inputs(batches[0])).logits
    wanted = trained.eval()(**given).logits
    assert torch.allclose(snn.ranged(*given.values()).logits, wanted, atol=1e-5)
    assert not torch.allclose(far, wanted, atol=1e-5)
    snn.timesteps = 10
    assert torch.allclose(snn(**given).logits, wanted, atol=1e-3)


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
def test_checkpoints_and_exports_keep_it(schedule: Any, tmp_path: Path) -> None:
    model, batch = classifier().eval(), inputs(text(0))
    snn = fasfx.convert(model, [batch], CENTRED.replace(timesteps=3, schedule=schedule))
    snn.save_pretrained(tmp_path / "saved")
    again = fasfx.SpikingModel.from_pretrained(tmp_path / "saved")
    # Some processors sum a product of a matrix and a vector in an order that hangs on where these lie in memory.
    assert aligned(again.ranged.state_dict().values())
    assert torch.equal(again(**batch).logits, snn(**batch).logits)
    snn.to_onnx(tmp_path / "onnx")
    there = fasfx.runtime.OnnxModel(tmp_path / "onnx")(**batch).logits
    assert torch.allclose(there, snn(**batch).logits, atol=1e-4)


def test_what_layers_add_is_stored_when_weights_are_scaled() -> None:
    net = Net("layers", Calls(lambda m, x: m.a(x), a=nn.Linear(8, 4)), {"x": torch.randn(5, 8) + 3}).double()
    snn = fasfx.convert(net.module, [net.batch], CENTRED.replace(timesteps=12))
    lowered = snn.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [node.args[2].op for node in lowered] == ["get_attr"]
    assert same(outputs(net.module, net.batch), outputs(snn, net.batch), 1e-4)


def test_ranges_observed_again_leave_the_centres_that_were_trained() -> None:
    model, batches = classifier(), [text(seed) for seed in range(4)]
    qann = fasfx.prepare(model, batches[:1], CENTRED)
    before = {name: value.clone() for name, value in qann.named_buffers() if name.startswith("centre")}
    again = fasfx.convert(qann, batches[1:]).ranged
    after = {name: value for name, value in again.named_buffers() if name.startswith("centre")}
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].any() for name in before)


@pytest.mark.parametrize(
    "fields", [{"coverage": "activation"}, {"activation": "replace"}, {"weights": "int8", "code": "radix"}], ids=str
)
def test_what_it_does_not_go_with_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="centre=True goes with .* only"):
        fasfx.SpikeConfig(centre=True, **fields)
    with pytest.raises(ConfigError, match="centre='false': choose one of False, True"):
        CENTRED.replace(centre="false")


def test_a_single_row_does_not_stand_for_all() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, config = torch.randn(64, 8) * 3 + 1, CENTRED.replace(timesteps=8)
    errors = []
    for centre in (False, True):
        snn = fasfx.convert(module, [{"input": x[:1]}], config.replace(centre=centre))
        errors.append(float((snn(input=x) - module(x)).norm().detach()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_gated_values_keep_the_headroom_of_products() -> None:
    def gated(m: nn.Module, x: Tensor) -> Tensor:
        return m.d(F.silu(m.g(x)) * m.u(x))

    layers = {"g": nn.Linear(8, 16), "u": nn.Linear(8, 16), "d": nn.Linear(16, 4)}
    batch, found = torch.randn(64, 8), []
    for centre in (False, True):
        gm = ranged(gated, [batch], CENTRED.replace(code="rate", timesteps=8, centre=centre), **layers)
        (of,) = [site for site in facts(gm).sites.values() if site.peak is not None and site.peak.shape == (16,)]
        found.append(float((thresholds(gm)[of.name] / of.peak).max()))
    assert min(found) > 2.0**2  # the margin of either factor


def test_thresholds_fold_through_the_difference() -> None:
    call, layers = (lambda m, x: m.a(m.n(x))), {"n": nn.LayerNorm(8), "a": nn.Linear(8, 4)}
    lowered = []
    for centre in (False, True):
        module, batch = Calls(call, **layers).eval(), {"x": torch.randn(3, 5, 8)}
        snn = fasfx.convert(module, [batch], CENTRED.replace(timesteps=12, centre=centre))
        assert torch.allclose(snn(**batch), module(**batch), atol=1e-4)
        lowered.append([n.target for n in snn.graph_module.graph.nodes])
    assert [found.count(aten.mul.Tensor) for found in lowered] == [0, 0]
    assert [found.count(aten.sub.Tensor) for found in lowered] == [0, 1]


def test_a_bias_that_depends_on_the_input_is_left_alone() -> None:
    module, batch = (
        Calls(lambda m, x: F.linear(x, m.w, m.a(x[0])), w=torch.randn(8, 8), a=nn.Linear(8, 8)),
        torch.randn(3, 8),
    )
    snn = fasfx.convert(module, [{"x": batch}], CENTRED.replace(timesteps=12))
    assert torch.allclose(snn(x=batch), module(x=batch), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_centres_have_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    gm = ranged(lambda m, x: m.a(x), [torch.randn(3, 8).to(dtype)], a=nn.Linear(8, 4).to(dtype))
    (difference,) = centred(gm)
    assert attribute(gm, str(difference.args[1].target)).dtype == dtype


def test_stage_two_tunes_a_centred_network() -> None:
    """It goes on from the centred network: thresholds and potentials change, centres do not, the error falls."""
    batches = [inputs(text(seed)) for seed in range(6)]
    snn = fasfx.convert(classifier(), batches, CENTRED.replace(timesteps=2, schedule="synchronous"))
    tuned = fasfx.tune(snn, batches)
    assert [n.args[1].target for n in centred(tuned.ranged)] == [n.args[1].target for n in centred(snn.ranged)]
    errors = tuned.tuning
    assert errors is not None and errors["neuron"].mean() < errors["before"].mean()
