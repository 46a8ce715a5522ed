"""Every pass: its level, its numbers within its promise, its input untouched; every rule with a near miss.

Golden texts live in tests/golden, one per level of a tiny network. Regenerate: FASFX_UPDATE_GOLDEN=1 pytest
tests/properties/test_passes.py, then read the diff.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import NETS, Attention, Calls, EagerAttention, Net, configs, net, nets, outputs, recorded, same, stages
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn import functional as F

import fasfx
from fasfx.capture import capture
from fasfx.config import SpikeConfig
from fasfx.errors import CalibrationError, FasfxError, LevelError
from fasfx.graph_text import text
from fasfx.ops import CODES, qcfs
from fasfx.passes import PIPELINE, Clip, Fold, Lower, Normalise, Observe, Substitute
from fasfx.passes.substitute import qcfs_to_fire
from fasfx.program import attribute, copy_program, facts, operators
from fasfx.runner import Pass, Runner
from fasfx.tools.bench.models import tiny, tiny_inputs

aten = torch.ops.aten
GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT_ACCURACY = 1e-11  # float64
ROUNDING = 1e-9  # of x N / theta and back with N up to 2^19, relative to theta


def a_pass(name: str, made: Net) -> Pass:
    return Observe([made.batch]) if name == "observe" else {one.name: one for one in PIPELINE}[name]()


def check_pass(one: Pass, before: GraphModule, batch: dict[str, Tensor]) -> GraphModule:
    """Run a pass on a program of the level it takes: what must hold of every pass, and its promise on numbers."""
    shown, wanted = text(before), outputs(before, batch)
    tensors = {name: value.clone() for name, value in before.state_dict().items()}
    after = Runner([one]).run(before)
    assert facts(after).level == one.gives and facts(before).level == one.takes
    assert text(before) == shown
    assert all(torch.equal(value, tensors[name]) for name, value in before.state_dict().items())
    assert [ran.pass_name for ran in facts(after).history][-1] == one.name
    assert text(Runner([one]).run(before)) == text(after)  # the same again
    if one.numerics == "exact":
        assert same(wanted, outputs(after, batch), FLOAT_ACCURACY)
        assert facts(after).ledger.entries == facts(before).ledger.entries
    return after


@pytest.mark.parametrize("name", NETS)
def test_every_pass_keeps_its_promise(name: str) -> None:
    made = net(name)
    for config in (
        SpikeConfig(nonlinear="exact", code="radix", timesteps=6, margin=1.37),
        SpikeConfig(granularity="token", margin=1.37, centre=True),
    ):
        program = capture(made.module, made.batch, config)
        assert same(outputs(made.module, made.batch), outputs(program, made.batch), FLOAT_ACCURACY)
        for one in PIPELINE:
            program = check_pass(a_pass(one.name, made), program, made.batch)


@given(nets(), configs())
@settings(max_examples=30)
def test_clipped_values_are_within_the_ledger(made: Net, config: SpikeConfig) -> None:
    """Each site's error, alone: at most the bound of its ledger line wherever |x| <= theta."""
    clipped = stages(made, config)["CLIPPED"]
    entries = {entry.node: entry for entry in facts(clipped).ledger.entries}
    _, recorder = recorded(clipped, made.batch)
    assert entries.keys() == recorder.neurons.keys() == facts(clipped).sites.keys()
    for site, (x, theta, y, signed) in recorder.neurons.items():
        inside = (x.abs() <= theta) & (signed | (x >= 0))
        error = (y - x).abs()
        bounds = entries[site].promise.at(theta=1, T=config.timesteps, levels=config.levels) * theta
        assert bool((error <= bounds + ROUNDING * theta)[inside].all()), site
        if (value := entries[site].value) is not None:
            assert bool((error[inside] <= value + ROUNDING * theta.max()).all()), site


@given(nets(), configs(threshold="max"))
@settings(max_examples=20)
def test_calibration_itself_is_never_clipped(made: Net, config: SpikeConfig) -> None:
    """Sites that only depend on the input see the values they were calibrated on."""
    levels = stages(made, config)
    first = next(iter(facts(levels["CLIPPED"]).sites))
    x, theta, _, signed = recorded(levels["CLIPPED"], made.batch)[1].neurons[first]
    assert bool((x.abs() <= theta).all()) and (signed or bool((x >= 0).all()))


@pytest.mark.parametrize("name", NETS)
def test_normalise_has_nothing_left_to_do(name: str) -> None:
    made = net(name)
    normal = Runner([Normalise()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))
    again = copy_program(normal)
    facts(again).level = "CAPTURED"
    assert text(Runner([Normalise()]).run(again)) == text(normal)


def test_passes_form_a_chain() -> None:
    for one, following in zip(PIPELINE, PIPELINE[1:], strict=False):
        assert one.gives == following.takes
    assert len({one.name for one in PIPELINE}) == len(PIPELINE)
    for one in PIPELINE:
        assert one.__doc__ and one.numerics in ("exact", "ledger")
        assert all(rule.doc for rule in one.rules)


# --- rules: each fires on its pattern, and declines or lets alone what is only like it --------------------


def rms_norm(x: Tensor, w: Tensor, power: int = 2, dim: int = -1, last: bool = False) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + 1e-6)
    return scaled * w if last else w * scaled


def gelu_new(x: Tensor, cubic: float = 0.044715) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + cubic * torch.pow(x, 3.0))))


def gelu_new_as_written(x: Tensor, cubic: float = 0.044715) -> Tensor:
    return x * 0.5 * (torch.tanh((x + torch.pow(x, 3.0) * cubic) * math.sqrt(2.0 / math.pi)) + 1.0)


Case = tuple[Callable[[nn.Module, Tensor], Any], tuple[int, ...], Any]
# rule: (call, shape of x, operator that is there afterwards)
MATCHES: dict[str, Case] = {
    "addmm_to_linear": (lambda m, x: torch.addmm(m.b, x, m.w), (3, 8), aten.linear.default),
    "mm_to_matmul": (lambda m, x: torch.mm(x, m.w), (3, 8), aten.matmul.default),
    "bmm_to_matmul": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), (3, 5, 8), aten.matmul.default),
    "baddbmm_to_matmul": (lambda m, x: torch.baddbmm(m.s, x, x.transpose(1, 2)), (3, 5, 8), aten.matmul.default),
    "primitives_to_rms_norm": (lambda m, x: rms_norm(x, m.b), (3, 5, 8), aten.rms_norm.default),
    "primitives_to_rms_norm_weight_last": (lambda m, x: rms_norm(x, m.b, last=True), (3, 5, 8), aten.rms_norm.default),
    "primitives_to_tanh_gelu": (lambda m, x: gelu_new_as_written(x), (3, 8), aten.gelu.default),
    "primitives_to_quick_gelu": (lambda m, x: x * torch.sigmoid(1.702 * x), (3, 8), aten.silu.default),
}
# rule: (call, shape, reason it gives; None where the pattern itself does not match)
NEAR_MISSES: dict[str, list[Case]] = {
    "addmm_to_linear": [
        (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), (3, 8), None),
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), (3, 8), None),
        (lambda m, x: torch.addmm(x, x, m.w), (3, 8), None),
        (lambda m, x: torch.addmm(x[:, :1], x, m.w), (3, 8), None),
    ],
    "mm_to_matmul": [],
    "bmm_to_matmul": [],
    "baddbmm_to_matmul": [
        (lambda m, x: torch.baddbmm(m.s, x, x.transpose(1, 2), alpha=0.25), (3, 5, 8), None),
        (lambda m, x: torch.baddbmm(m.s, x, x.transpose(1, 2), beta=0, alpha=0.25), (3, 5, 8), None),
    ],
    "primitives_to_rms_norm": [
        (lambda m, x: rms_norm(x, m.b, power=4), (3, 5, 8), "mean of x^4 over dims [-1] is no RMSNorm"),
        (lambda m, x: rms_norm(x, m.b, dim=1), (3, 5, 8), "mean of x^2 over dims [1] is no RMSNorm"),
        (lambda m, x: rms_norm(x, m.w), (3, 8, 8), "the weight has not one element per feature"),
        (lambda m, x: rms_norm(x, m.one), (3, 5, 8), "the weight has not one element per feature"),
    ],
    "primitives_to_rms_norm_weight_last": [
        (lambda m, x: rms_norm(x, m.b, dim=1, last=True), (3, 5, 8), "mean of x^2 over dims [1] is no RMSNorm"),
    ],
    "primitives_to_tanh_gelu": [
        (lambda m, x: gelu_new_as_written(x, cubic=0.05), (3, 8), "are not those of tanh-GELU"),
    ],
    "primitives_to_quick_gelu": [
        (lambda m, x: x * torch.sigmoid(-1.5 * x), (3, 8), "-1.5 is no positive number"),
        (lambda m, x: x * torch.sigmoid(m.b * x), (3, 8), None),
        (lambda m, x: (x + 1) * torch.sigmoid(1.5 * x), (3, 8), None),
    ],
}


def normalised(call: Callable[..., Any], shape: tuple[int, ...], module: nn.Module | None = None) -> GraphModule:
    """A function after normalise; its numbers are those of the function."""
    layers = {"w": torch.randn(8, 8), "b": torch.randn(8), "s": torch.randn(3, 5, 5), "one": torch.rand(1)}
    layers["s"] = layers["s"][:1]
    made = Net("rule", module or Calls(call, **layers), {"x": torch.randn(shape)}).double()
    made.module.eval()
    captured = capture(made.module, made.batch, SpikeConfig(nonlinear="exact"))
    normal = Runner([Normalise()]).run(captured)
    for batch in (made.batch, {"x": torch.cat([made.batch["x"], torch.randn(shape).double()])}):
        assert same(outputs(made.module, batch), outputs(normal, batch), FLOAT_ACCURACY)
    return normal


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in operators(gm)]


@pytest.mark.parametrize("rule", MATCHES)
def test_rule_matches_its_pattern(rule: str) -> None:
    call, shape, operator = MATCHES[rule]
    normal = normalised(call, shape)
    assert operator in targets(normal) and not facts(normal).declined


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, case) for rule, cases in NEAR_MISSES.items() for case in range(len(cases))]
)
def test_near_miss_keeps_its_numbers_and_says_why(rule: str, case: int) -> None:
    call, shape, reason = NEAR_MISSES[rule][case]
    normal = normalised(call, shape)
    if reason is not None:
        assert [d.reason for d in facts(normal).declined if d.rule == rule and reason in d.reason]
        assert MATCHES[rule][2] not in targets(normal)


def zeroed_attention(low: float = torch.finfo(torch.float32).min, one: int = 1, fill: float = 0.0) -> Calls:
    """Attention as transformers' ONNX exporter traces it: fully masked rows are set to zero by hand."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        mask = x[:, 0, :, None] + x[:, 0, None, :] > m.edge
        unattended = mask.to(torch.float32).sum(dim=-1, keepdim=True) < one
        added = (~mask).to(torch.float32) * low
        found = F.scaled_dot_product_attention(
            x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2), added, scale=0.5
        )
        zero = torch.zeros(()) if fill == 0 else torch.full((), fill)
        return torch.where(unattended, zero, found)

    made = Calls(call).eval()
    made.register_buffer("edge", torch.tensor(0.5))
    return made


@pytest.mark.parametrize(
    ("kind", "reason"),
    [({}, None), ({"low": -1.0}, "no full mask"), ({"one": 3}, "no full mask"), ({"fill": 2.0}, "not set to zero")],
)
def test_zeroed_attention(kind: dict[str, Any], reason: str | None) -> None:
    torch.manual_seed(0)
    module, batch = zeroed_attention(**kind), {"x": torch.randn(3, 8, 5)}
    batch["x"][0] = -1.0  # every key of the first sample is masked
    captured = capture(module, batch, SpikeConfig(nonlinear="exact"))
    normal = Runner([Normalise()]).run(captured)
    assert torch.allclose(normal(**batch), module(**batch), atol=1e-6)
    declined = [d.reason for d in facts(normal).declined if d.rule == "zeroed_attention_to_attention"]
    assert (declined == []) if reason is None else reason in declined[0]
    assert (aten.lt.Scalar in targets(normal)) is (reason is not None)


def test_every_rule_is_tried_here() -> None:
    tried = set(MATCHES) | {"qcfs_to_fire", "tuned_qcfs_to_fire", "zeroed_attention_to_attention"}
    assert {rule.name for one in PIPELINE for rule in one.rules} <= tried


def test_qcfs_to_fire_declines_an_unknown_code() -> None:
    clipped = copy_program(stages(net("linear"), SpikeConfig(nonlinear="exact"))["CLIPPED"])
    (node,) = clipped.graph.find_nodes(op="call_function", target=qcfs.op)
    node.update_arg(2, "morse")
    assert qcfs_to_fire.apply(clipped, "substitute") == 0
    (declined,) = facts(clipped).declined
    assert (declined.pass_name, declined.rule, declined.node) == ("substitute", "qcfs_to_fire", node.name)
    assert declined.reason == "no neuron is known for code 'morse'"


@pytest.mark.parametrize("call", [gelu_new, gelu_new_as_written], ids=["number first", "tensor first"])
def test_tanh_gelu_is_found_however_it_is_written(call: Callable[[Tensor], Tensor]) -> None:
    assert aten.gelu.default in targets(normalised(lambda m, x: call(x), (3, 8)))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.b * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.b * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.b * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.b * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x),
        lambda m, x: F.rms_norm(x, [8], m.b, 1e-6),
    ],
    ids=["square", "x * x", "sqrt", "factor first", "operator"],
)
def test_other_spellings_of_rms_norm_keep_their_numbers(call: Callable[..., Tensor]) -> None:
    normalised(call, (3, 5, 8))


# --- attention -------------------------------------------------------------------------------------------

BOOL_MASK = torch.rand(5, 5) > 0.4
LOWEST, MINUS_INF = torch.finfo(torch.float64).min, -math.inf
NO_MASK, DIAGONAL = torch.zeros(5, 5).double(), torch.eye(5, dtype=torch.bool)
EVERY_OTHER = torch.tensor([True, False, True, False, True])[:, None].expand(5, 5).clone()
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": BOOL_MASK | DIAGONAL},
    "float mask": {"attn_mask": torch.randn(5, 5).double()},
    "float mask with -inf": {"attn_mask": NO_MASK.masked_fill(~DIAGONAL, MINUS_INF)},
    "float mask with lowest": {"attn_mask": NO_MASK.masked_fill(BOOL_MASK, LOWEST)},
    "mask and scale": {"attn_mask": torch.randn(5, 5).double(), "scale": 2.0},
    "masked rows": {"attn_mask": EVERY_OTHER},
    "float masked rows": {"attn_mask": NO_MASK.masked_fill(~EVERY_OTHER, MINUS_INF)},
}


@pytest.mark.parametrize("groups", [4, 2, 1], ids=lambda g: f"{g} groups")
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_written_out(options: dict[str, Any], groups: int) -> None:
    normal = normalised(lambda: None, (3, 5, 16), Attention(16, 4, groups, **options))
    assert aten.scaled_dot_product_attention.default not in targets(normal)
    assert aten.softmax.int not in targets(normal) and aten.exp.default in targets(normal)


def test_a_boolean_mask_becomes_one_bias_for_all_layers_that_share_it() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        mask = x[:, 0, :, None] + x[:, 0, None, :] < 1
        for _ in range(3):
            x = x + F.scaled_dot_product_attention(x, x, x, mask)
        return x

    found = targets(normalised(call, (3, 8, 8)))
    assert found.count(aten.where.Scalar) == 1 and found.count(aten.exp.default) == 3


def test_a_reshape_to_the_same_shape_goes() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, 8).reshape(x.shape[0], -1)

    assert targets(normalised(call, (3, 5, 8))).count(aten.reshape.default) == 1


@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=str)
def test_fully_masked_rows_are_zero_at_every_level(kind: torch.dtype) -> None:
    """Where nothing is attended the result is 0, before the output projection adds its bias."""
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    given_mask = mask if kind == torch.bool else torch.zeros(5, 5, dtype=kind).masked_fill(~mask, -math.inf)
    made = Net("masked", Attention(16, 2, 2, attn_mask=given_mask), {"x": torch.randn(2, 5, 16)}).double()
    for level, program in stages(made, SpikeConfig(nonlinear="exact", timesteps=6)).items():
        (found,) = outputs(program, made.batch)
        assert torch.equal(found[:, 2], made.module.o.bias.detach().expand(2, 16)), level
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3)])
def test_causal_attention_of_unequal_lengths(queries: int, keys: int) -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, :queries], x[:, :keys], m.l(x[:, :keys]), is_causal=True)

    normalised(call, (3, 7, 8), Calls(call, l=nn.Linear(8, 8)))


def test_eager_attention_is_deferred_and_its_probabilities_still_returned() -> None:
    normal = normalised(lambda: None, (3, 5, 8), EagerAttention())
    assert aten.softmax.int not in targets(normal) and aten.exp.default in targets(normal)
    sites = facts(stages(net("attention_eager"), SpikeConfig(nonlinear="exact"))["RANGED"]).sites
    assert [site.fixed for site in sites.values()].count(1.0) == 1


def test_dropout_on_probabilities_in_training_stays() -> None:
    """Captured with dropout that is on: normalise keeps it, between exponential and product."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        weights = F.dropout(torch.softmax(x @ x.transpose(1, 2), -1), 0.5, True)
        return weights @ m.l(x)

    made = Net("dropout", Calls(call, l=nn.Linear(8, 8)), {"x": torch.randn(2, 5, 8)})
    normal = Runner([Normalise()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))
    assert aten.dropout.default in targets(normal)
    torch.manual_seed(1)
    found = torch.stack([outputs(normal, made.batch)[0] for _ in range(400)]).mean(0)
    wanted = torch.softmax(made.batch["x"] @ made.batch["x"].transpose(1, 2), -1) @ made.module.l(made.batch["x"])
    assert same([wanted.detach()], [found], 0.3)
    lowered = stages(made, SpikeConfig(nonlinear="exact"))["LOWERED"]
    assert torch.equal(*[outputs(lowered, made.batch)[0] for _ in range(2)])  # a lowered program is for inference


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: torch.softmax(x @ x.transpose(1, 2), 1) @ x,
        lambda m, x: x.transpose(1, 2) @ torch.softmax(x @ x.transpose(1, 2), -1),
        lambda m, x: torch.softmax(x, -1),
        lambda m, x: torch.softmax(x @ x.transpose(1, 2), -1, dtype=torch.float64) @ x,
        lambda m, x: torch.softmax(x @ x.transpose(1, 2), 2) @ x,
    ],
    ids=["other dim", "right operand", "no product", "with dtype", "positive dim"],
)
def test_other_softmaxes_keep_their_numbers(call: Callable[..., Tensor]) -> None:
    normalised(call, (3, 5, 8))


def test_an_exponential_of_the_users_own_is_no_deferred_softmax() -> None:
    """exp(x) without its maximum subtracted exceeds 1: its threshold must come from calibration."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        features = torch.exp(m.q(x))
        return (features @ m.v(x).transpose(1, 2)) / features.sum([-1], True)

    made = Net("own", Calls(call, q=nn.Linear(8, 8), v=nn.Linear(8, 8)), {"x": 2 * torch.randn(2, 5, 8)}).double()
    for site in facts(stages(made, SpikeConfig(nonlinear="exact"))["RANGED"]).sites.values():
        assert site.fixed is None
    snn = fasfx.convert(made.module, calibration=[made.batch], config=SpikeConfig(nonlinear="exact", timesteps=10))
    assert same(outputs(made.module, made.batch), outputs(snn, made.batch), 2.0**-10)


# --- what capture leaves behind --------------------------------------------------------------------------


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.l(x)
    y.mul_(2.0).add_(1.0)
    z = torch.zeros_like(y)
    z[:, 1:] = F.relu_(y)[:, :-1]
    return m.l(z)


def asserting(m: nn.Module, x: Tensor) -> Tensor:
    torch._check(x.shape[0] < 1000)
    torch._assert(bool(x.shape[1] == 8), "width")
    return m.l(x.detach().to(x.dtype).to("cpu").type_as(x)[:].contiguous())


def aliasing(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.ops.aten.alias(m.l(x))
    return y, m.l(y) + torch.tensor(1.5, dtype=x.dtype)


@pytest.mark.parametrize("call", [in_place, asserting, aliasing])
def test_leftovers_of_capture_go(call: Callable[..., Any]) -> None:
    normal = normalised(call, (3, 8), Calls(call, l=nn.Linear(8, 8)))
    names = " ".join(str(target) for target in targets(normal))
    assert not re.search(r"assert|alias|detach|type_as|to\.d|_\.(default|Tensor|Scalar)|lift_fresh", names), names
    made = Net("leftovers", Calls(call, l=nn.Linear(8, 8)), {"x": torch.randn(3, 8)}).double()
    snn = fasfx.convert(made.module, calibration=[made.batch], config=SpikeConfig(nonlinear="exact", timesteps=10))
    assert same(outputs(made.module, made.batch), outputs(snn, made.batch), 2.0**-12)


def test_a_cache_does_not_take_a_second_pass_to_write_out_what_changes_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache is full of detach_, which changes no number; the pass takes as long as torch.export itself."""

    def never(*_: Any) -> None:
        raise AssertionError("decomposed")

    batch = tiny_inputs("llama") | {"use_cache": True}
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", never)
    assert aten.detach.default in targets(capture(tiny("llama"), batch, SpikeConfig()))


def test_input_that_is_changed_in_place_stays_the_callers() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.l(x.add_(1.0))

    x = torch.randn(3, 8)
    made = Net("changed", Calls(call, l=nn.Linear(8, 8)), {"x": x.clone()})
    try:
        snn = fasfx.convert(made.module, calibration=[made.batch])
    except FasfxError:
        return  # saying no is fine
    wanted = made.module.l(x + 1.0)
    given_x = x.clone()
    assert same([wanted.detach()], outputs(snn, {"x": given_x}), 2.0**-4)


def test_order_of_calibration_names_does_not_matter() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) - 10 * self.b(right)

    model, batch = Two(), {"left": torch.randn(3, 4), "right": 100 * torch.randn(3, 4)}
    turned = dict(reversed(batch.items()))
    one, two = (fasfx.convert(model, calibration=[given]) for given in (batch, turned))
    assert torch.equal(one(**batch), two(**batch)) and torch.equal(one(**turned), one(**batch))
    assert torch.equal(one(*batch.values()), one(**batch))
    peaks = [{s.module: float(s.peak.max()) for s in facts(snn.ranged).sites.values()} for snn in (one, two)]
    assert peaks[0] == peaks[1]


# --- runner ----------------------------------------------------------------------------------------------


class Foreign(PassBase):
    """A pass that knows nothing of fasfx: relu becomes gelu."""

    def call(self, graph_module: GraphModule) -> PassResult:
        changed = False
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.target, changed = aten.gelu.default, True
        return PassResult(graph_module, changed)


class Nothing(PassBase):
    """A pass that returns None, which torch.fx allows."""

    def call(self, graph_module: GraphModule) -> None:
        return None


def test_runner_takes_any_fx_pass() -> None:
    made = net("mlp")
    before = Runner([Normalise()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))
    shown = text(before)
    after = Runner([Foreign(), Nothing(), Observe([made.batch])]).run(before)
    assert text(before) == shown and aten.gelu.default in targets(after)
    assert [ran.pass_name for ran in facts(after).history][-3:] == ["Foreign", "Nothing", "observe"]
    layers = made.module
    wanted = layers.b(F.gelu(layers.a(made.batch["x"])))
    assert same([wanted.detach()], outputs(after, made.batch), FLOAT_ACCURACY)


def test_runner_calls_its_hooks() -> None:
    made, seen = net("mlp"), []
    program = capture(made.module, made.batch, SpikeConfig(nonlinear="exact"))
    hooks = {
        kind: (lambda name, gm, kind=kind: seen.append((kind, name, facts(gm).level))) for kind in ("before", "after")
    }
    Runner([Normalise(), Observe([made.batch])], **hooks).run(program)
    assert seen == [
        ("before", "normalise", "CAPTURED"),
        ("after", "normalise", "NORMAL"),
        ("before", "observe", "NORMAL"),
        ("after", "observe", "RANGED"),
    ]


@pytest.mark.parametrize("one", [Clip, Substitute, Fold, Lower])
def test_wrong_start_level_is_named(one: type[Pass]) -> None:
    made = net("mlp")
    captured = capture(made.module, made.batch, SpikeConfig(nonlinear="exact"))
    with pytest.raises(LevelError, match=f"pass {one.name} takes a program at {one.takes}, this one is at CAPTURED"):
        Runner([one()]).run(captured)


class Careless(Pass):
    """Says it clips, and leaves one site bare."""

    name, takes, gives = "careless", "RANGED", "CLIPPED"

    def rewrite(self, gm: GraphModule) -> bool:
        Clip().rewrite(gm)
        node = gm.graph.find_nodes(op="call_function", target=qcfs.op)[-1]
        node.replace_all_uses_with(node.args[0])
        return True


def test_broken_promise_names_pass_node_and_line() -> None:
    made = net("mlp")
    ranged = stages(made, SpikeConfig(nonlinear="exact"))["RANGED"]
    with pytest.raises(LevelError) as caught:
        Runner([Careless()]).run(ranged)
    message = str(caught.value)
    assert "after pass careless" in message and "CLIPPED" in message
    assert "linear_1" in message and "operand 0 is not carried by spikes" in message
    assert " in b" in message and "strategies.py:" in message  # the user's module and line


class Early(Pass):
    """Clips, and says that the program is where it was."""

    name, takes, gives = "early", "RANGED", "RANGED"

    def rewrite(self, gm: GraphModule) -> bool:
        return Clip().rewrite(gm)


def test_operators_of_another_level_are_named() -> None:
    ranged = stages(net("mlp"), SpikeConfig(nonlinear="exact"))["RANGED"]
    with pytest.raises(LevelError, match=r"after pass early .* RANGED .*:\n.*qcfs.*: does not belong to RANGED"):
        Runner([Early()]).run(ranged)


class Failing(Pass):
    """Raises an error of its own."""

    name, takes, gives = "failing", "CAPTURED", "CAPTURED"

    def rewrite(self, gm: GraphModule) -> bool:
        raise CalibrationError("my own words")


def test_errors_of_a_pass_arrive_as_they_are() -> None:
    made = net("mlp")
    with pytest.raises(CalibrationError, match="^my own words$"):
        Runner([Failing()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))


def test_observing_nothing_or_nan_is_an_error() -> None:
    made = net("mlp")
    normal = Runner([Normalise()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))
    with pytest.raises(CalibrationError, match="no batches"):
        Runner([Observe([])]).run(normal)
    with pytest.raises(CalibrationError, match=r"calibration batch 1 gives NaN or infinity at x\b"):
        Runner([Observe([made.batch, {"x": made.batch["x"] * math.nan}])]).run(normal)


def test_observing_more_only_raises_ranges() -> None:
    made = net("attention")
    normal = Runner([Normalise()]).run(capture(made.module, made.batch, SpikeConfig(nonlinear="exact")))
    batches = [made.batch, {"x": 3 * torch.randn(4, 5, 16).double()}, {"x": torch.randn(1, 5, 16).double()}]
    peaks = []
    for count in range(1, 4):
        ranged = Runner([Observe(batches[:count])]).run(normal)
        peaks.append({name: site.peak for name, site in facts(ranged).sites.items()})
    for fewer, more in zip(peaks, peaks[1:], strict=False):
        assert all(bool((more[name] >= fewer[name]).all()) for name in fewer)
    backwards = Runner([Observe(reversed(batches))]).run(normal)
    assert all(torch.equal(site.peak, peaks[-1][name]) for name, site in facts(backwards).sites.items())


@pytest.mark.parametrize("code", CODES)
def test_skipped_modules_stay_as_they_are(code: str) -> None:
    made = net("two_readers")
    config = SpikeConfig(nonlinear="exact", code=code, skip=("^b$",))
    lowered = stages(made, config)["LOWERED"]
    skipped = [n for n in lowered.graph.nodes if n.target is aten.linear.default and n.args[1].target == "b.weight"]
    assert len(skipped) == 1
    assert attribute(lowered, "b.weight").data_ptr() == made.module.b.weight.data_ptr()


# --- golden texts ----------------------------------------------------------------------------------------


class Golden(nn.Module):
    """Norm, attention and a gated product in few nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up = nn.LayerNorm(4), Attention(4, 2, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x)) * F.relu(self.up(x))


def golden_text(gm: GraphModule) -> str:
    """The program's text without source lines (they hold paths) and calling convention."""
    lines = [re.sub(r' line="(?:[^"\\]|\\.)*"', "", line) for line in text(gm).splitlines()]
    return "\n".join(line for line in lines if not line.startswith("# call")) + "\n"


@pytest.mark.parametrize("code", ["multi", "radix"])
def test_golden_graphs(code: str) -> None:
    torch.manual_seed(0)
    made = Net("golden", Golden().eval(), {"x": torch.ones(2, 3, 4)})
    for parameter in made.module.parameters():  # values must not depend on a random generator
        nn.init.constant_(parameter, 0.5)
    levels = stages(made, SpikeConfig(nonlinear="exact", code=code, timesteps=4, levels=16, margin=1), exact=True)
    for level, program in levels.items():
        path = GOLDEN / f"{code}_{level.lower()}.txt"
        found = golden_text(program)
        if os.environ.get("FASFX_UPDATE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found, encoding="utf-8")
        assert found == path.read_text(encoding="utf-8"), f"{path.name} changed: set FASFX_UPDATE_GOLDEN=1"
