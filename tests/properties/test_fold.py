"""Folding moves thresholds into weights: the same spikes, the same outputs, the caller's weights untouched."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import NETS, Calls, Net, configs, exact_net, net, nets, outputs, recorded, same, stages
from torch import nn

import fasfx
from fasfx.config import SpikeConfig
from fasfx.ops import CODES
from fasfx.passes import Clip, Fold, Substitute, fold
from fasfx.passes.clip import thresholds
from fasfx.program import attribute, constants, facts
from fasfx.runner import Runner
from fasfx.tools.bench.models import tiny, tiny_inputs

FLOAT_ACCURACY = 1e-11  # float64, a few layers, counts up to 2^19 folded into weights
STEPS = {"rate": 4, "radix": 5, "multi": 3}
STATIC = ("tensor", "channel")


def assert_same_spikes(levels: dict[str, Any], batch: dict[str, torch.Tensor], exact: bool) -> None:
    """SPIKING, FOLDED and LOWERED send the same counts at every site and give the same outputs."""
    wanted_outputs, wanted = recorded(levels["SPIKING"], batch)
    for level in ("FOLDED", "LOWERED"):
        found_outputs, found = recorded(levels[level], batch)
        assert found.counts.keys() == wanted.counts.keys()
        for site, counts in found.counts.items():
            # Exact sums: the integers themselves; else theta / N was rounded once in reading them off.
            expected = wanted.counts[site] if exact else wanted.counts[site].round()
            assert torch.equal(counts if exact else counts.round(), expected), (level, site)
            assert torch.equal(counts, counts.round()) or not exact
        assert same(wanted_outputs, found_outputs, 0.0 if exact else FLOAT_ACCURACY), level


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", NETS)
def test_exact_sums_keep_every_count(name: str, code: str) -> None:
    """Whole weights, thresholds N * 4^k: every product and sum is exact, so nothing may differ at all."""
    if code == "radix" and name.startswith("attention"):
        pytest.skip("exponentials have threshold 1, and 1 / (2^T - 1) is not exact")
    made = exact_net(name)
    for granularity in STATIC:
        config = SpikeConfig(
            nonlinear="exact", code=code, timesteps=STEPS[code], levels=8, granularity=granularity, margin=1
        )
        assert_same_spikes(stages(made, config, exact=True), made.batch, exact=True)


@given(nets(), configs())
@settings(max_examples=60)
def test_random_weights_agree_to_float_accuracy(made: Net, config: SpikeConfig) -> None:
    assert_same_spikes(stages(made, config), made.batch, exact=False)


@given(nets(("mlp", "conv2d_groups", "attention", "layer_norm")), configs())
@settings(max_examples=15)
def test_other_inputs_and_batch_sizes_agree_too(made: Net, config: SpikeConfig) -> None:
    levels = stages(made, config)
    x = made.batch["x"]
    for batch in (1, 5):
        other = {"x": 3 * torch.randn(batch, *x.shape[1:], dtype=x.dtype)}
        assert_same_spikes(levels, other, exact=False)


@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize("name", NETS)
def test_error_falls_to_zero(name: str, granularity: str) -> None:
    """With many steps the folded network is the original: nothing was scaled twice, or not at all."""
    made = net(name, seed=1)
    config = SpikeConfig(nonlinear="exact", code="radix", timesteps=20, granularity=granularity)
    snn = fasfx.convert(made.module, calibration=[made.batch], config=config)
    assert same(outputs(made.module, made.batch), outputs(snn, made.batch), 2.0**-16)


# --- what cannot move is listed --------------------------------------------------------------------------


def declined(name: str, **options: Any) -> set[tuple[str, str]]:
    made = net(name)
    folded = stages(made, SpikeConfig(nonlinear="exact", code="radix", timesteps=6, **options))["FOLDED"]
    return {(d.rule, d.reason) for d in facts(folded).declined if d.pass_name == "fold"}


INPUT = ("scale_to_maker", "a factor does not move through x")


@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize("name", ["mlp", "mlp_no_bias", "dropout", "neg_and_div", "permute", "tied", "conv2d_groups"])
def test_everything_but_the_input_moves(name: str, granularity: str) -> None:
    assert declined(name, granularity=granularity) == {INPUT}


@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norm_weights_take_everything(name: str, granularity: str) -> None:
    assert declined(name, granularity=granularity) == set()


@pytest.mark.parametrize("granularity", STATIC)
def test_attention_keeps_only_input_and_exponential(granularity: str) -> None:
    found = declined("attention", granularity=granularity)
    assert ("scale_to_maker", "a factor does not move through aten.exp.default") in found and len(found) == 2


@pytest.mark.parametrize("product", [True, False])
def test_products_of_values_have_headroom_for_both_factors(product: bool) -> None:
    gated = Calls(
        lambda m, x: m.c(m.a(x) * m.b(x) if product else m.a(x) * 2),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, 8),
    ).eval()
    made = Net("gated", gated, {"x": torch.randn(50, 8)}).double()
    config = SpikeConfig(nonlinear="exact", code="radix", timesteps=8, margin=1.5)
    ranged = stages(made, config)["RANGED"]
    (name,) = [name for name in facts(ranged).sites if name.startswith("mul")]
    peak = facts(ranged).sites[name].peak
    quiet = torch.quantile(peak.flatten(), 0.75)
    floor = quiet if product else torch.minimum(quiet, peak.amax() / 8)
    assert torch.allclose(thresholds(ranged)[name], 1.5 ** (2 if product else 1) * torch.hypot(peak, floor))


def test_shared_values_are_listed() -> None:
    shared = Net(
        "shared",
        Calls(lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval(),
    )
    shared.batch["x"] = torch.randn(3, 8)
    folded = stages(shared.double(), SpikeConfig(nonlinear="exact"))["FOLDED"]
    reasons = {(d.rule, d.reason) for d in facts(folded).declined if d.pass_name == "fold"}
    assert reasons == {INPUT, ("scale_to_maker", "others read the value too")}


class Norm(nn.Module):
    """As an RMSNorm is written out; with `twice` the value before the weight is read once more."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.weight, self.twice = nn.Parameter(torch.rand(8) + 0.5), twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        between = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1)
        return between * self.weight + (between if self.twice else 0)


@torch.no_grad()
@pytest.mark.parametrize("twice", [False, True])
def test_factors_in_a_row_become_one(twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a norm of spiking products: the scale of its factors, the weight. Not if the value between is read too."""
    made = Net("norm", Norm(twice).eval(), {"x": torch.randn(50, 8)}).double()
    ranged = stages(made, SpikeConfig(code="radix", timesteps=6))["RANGED"]
    folded = Runner([Clip(), Substitute(), Fold()]).run(ranged)
    monkeypatch.setattr(fold, "_is_chained", lambda *_: False)
    apart = Runner([Clip(), Substitute(), Fold()]).run(ranged)
    assert factors_of_factors(folded) == twice and factors_of_factors(apart) == 1
    assert same(apart(**made.batch), folded(**made.batch), 1e-14)


def factors_of_factors(gm: torch.fx.GraphModule) -> int:
    products, fixed = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor), constants(gm)
    factors = [n for n in products if isinstance(n.args[1], float) or n.args[1] in fixed]
    return len([n for n in factors if n.args[0] in factors])


class Factors(nn.Module):
    """A chain of constants that must not be joined, before a layer."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call, self.layer, self.embedding = call, nn.Linear(8, 8), nn.Embedding(64, 8)
        self.register_buffer("whole", torch.arange(1, 9))
        self.register_buffer("one", torch.full((1, 1, 1), 2.0))
        self.register_buffer("deep", torch.rand(3, 8, 1))
        self.register_buffer("row", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.call(self, x))


@torch.no_grad()
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.embedding((x[:, 0] > 0).long() * 2 * 3),
        lambda m, x: m.embedding(((x > 0).long() * m.whole * 2).amax(-1)),
        lambda m, x: ((x.abs() * m.whole) * 0.5).t().contiguous().t(),
        lambda m, x: (x * m.one) * 3.0,
        lambda m, x: ((m.layer(x) * 2.0).t() * m.deep).mT * m.deep.mT,
        lambda m, x: (x[:, :1] * 2.0) * m.row,
        lambda m, x: (torch.nn.functional.linear(x, m.layer.weight, x.mean(0)) * m.whole) * 2.0,
    ],
)
def test_other_factors_in_a_row_keep_dtypes_and_shapes(call: Any) -> None:
    torch.manual_seed(0)
    model, x = Factors(call).eval(), torch.randn(6, 8)
    snn = fasfx.convert(model, [{"x": x}], SpikeConfig(code="radix", timesteps=12, nonlinear="exact"))
    expected, found = model(x), snn(x=x)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("name", ["conv_transpose", "matmul_weight", "dynamic_weight"])
def test_scales_that_stay_in_a_sum_are_listed(name: str) -> None:
    assert "scale_to_reader" in {rule for rule, _ in declined(name, granularity="channel")}


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_callers_weights_never_change(name: str) -> None:
    made = net(name)
    made.module.train()
    kept = {key: value.clone() for key, value in made.module.state_dict().items()}
    snn = fasfx.convert(
        made.module, calibration=[made.batch], config=SpikeConfig(nonlinear="exact", granularity="channel")
    )
    snn.timesteps = 2
    assert made.module.training
    for key, value in made.module.state_dict().items():
        assert torch.equal(value, kept[key]), key


def test_the_callers_parameters_stay_trainable() -> None:
    made = net("mlp")
    made.module.a.bias.requires_grad_(False)
    snn = fasfx.convert(made.module, calibration=[made.batch])
    assert not any(parameter.requires_grad for parameter in snn.graph_module.parameters())
    trainable = {key: value.requires_grad for key, value in made.module.named_parameters()}
    assert trainable == {"a.weight": True, "a.bias": False, "b.weight": True, "b.bias": True}


def test_weights_are_shared_until_a_pass_replaces_them() -> None:
    made = net("two_readers")
    levels = stages(made, SpikeConfig(nonlinear="exact"))
    for level in ("CAPTURED", "NORMAL", "RANGED", "CLIPPED", "SPIKING"):
        for key, parameter in made.module.named_parameters():
            assert attribute(levels[level], key).data_ptr() == parameter.data_ptr(), (level, key)
    lowered = {p.data_ptr() for p in [*levels["LOWERED"].parameters(), *levels["LOWERED"].buffers()]}
    biases = [made.module.b.bias, made.module.c.bias]  # their outputs feed no neuron
    assert all(bias.data_ptr() in lowered for bias in biases)
    weights = [made.module.a.weight, made.module.b.weight, made.module.c.weight]
    assert not any(weight.data_ptr() in lowered for weight in weights)


@pytest.mark.parametrize("granularity", STATIC)
def test_tied_weights_get_a_threshold_each(granularity: str) -> None:
    made = net("tied")
    levels = stages(made, SpikeConfig(nonlinear="exact", code="radix", timesteps=20, granularity=granularity))
    linears = [n for n in levels["FOLDED"].graph.nodes if n.target is torch.ops.aten.linear.default]
    first, second = (attribute(levels["FOLDED"], str(n.args[1].target)) for n in linears)
    assert not torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert same(outputs(made.module, made.batch), outputs(levels["LOWERED"], made.batch), 2.0**-12)


def test_a_gates_scale_goes_into_the_layer_of_one_factor() -> None:
    """silu(gate) * up: what turns the product into counts is in up's weights, no multiplication of its own."""
    batch = {**tiny_inputs("llama"), "use_cache": False}
    snn = fasfx.convert(tiny("llama"), [batch], SpikeConfig(code="radix", timesteps=7, nonlinear="exact"))
    assert not [d for d in facts(snn.graph_module).declined if d.rule == "scale_to_maker" and "aten.mul" in d.reason]
