"""The integer form: counts as bytes, int8 weights, products in integers; and the passes that prepare ranges for it."""

import inspect
import os
import subprocess
import sys
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import fasfx
from fasfx import ops
from fasfx.feedback import block_of, fed_back
from fasfx.integer import multiple, rounded, step
from fasfx.ops.byte_count import WIDEST, fits, pair_limit, zero_of
from fasfx.ops.integer_matmul import EXACT
from fasfx.orthogonal import blockwise, rotation
from fasfx.passes import Clip, Fold, Lower, Round, Smooth, Substitute, clip
from fasfx.passes.clip import thresholds
from fasfx.passes.observe import lift_of
from fasfx.program import attribute, facts, fake
from fasfx.runner import Runner
from fasfx.runtime import OnnxModel
from fasfx.runtime.flattening import flatten_rows
from fasfx.runtime.merging import merge_layers
from fasfx.runtime.spikes import SpikeRecorder
from fasfx.synapses import VIEWS, is_byte, operand, synapses
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
NEURONS = [("radix", steps, 20, signed) for steps in range(1, 8) for signed in (True, False)]
NEURONS += [("rate", 127, 20, True), ("rate", 5, 20, False)]
FAMILIES = [family for family in TINY if family != "t5"]


def uneven(family: str) -> nn.Module:
    """A tiny model one channel of whose norms stands out."""
    model = tiny(family)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight[6] *= 20
    return model


def batch(family: str, rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    return tiny_inputs(family, rows, length, seed)


def converted(family: str, **changes: Any) -> tuple[nn.Module, fasfx.SpikingModel]:
    model = uneven(family)
    extra = {"use_cache": False} if family in ("gpt2", "llama", "opt", "t5") else {}
    return model, fasfx.convert(model, [batch(family) | extra], fasfx.SpikeConfig.integer(**changes))


@cache
def usual(family: str) -> tuple[nn.Module, fasfx.SpikingModel]:
    """The same with nothing changed, once: for tests that change nothing about it either."""
    return converted(family)


@torch.no_grad()
def error(model: Any, other: Any, inputs: dict[str, Tensor]) -> float:
    wanted, found = model(**inputs)[0], other(**inputs)[0]
    return float((found - wanted).norm() / wanted.norm())


# --- operators -------------------------------------------------------------------------------------------


@given(st.sampled_from(NEURONS), st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20))
def test_bytes_are_the_counts_but_for_ties(neuron: Any, values: list[float]) -> None:
    u = torch.tensor(values)
    byte = ops.byte_count.op(u, *neuron)
    assert byte.dtype == torch.uint8
    count, found = ops.count.op(u, *neuron), byte.float() - zero_of(*neuron)
    tie = (u - u.floor() == 0.5) & (found != count)
    assert bool(((found == count) | tie).all())
    assert bool((found[tie] == u[tie].floor()).all()) and bool((found[tie] % 2 == 0).all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("code", "most"), [("radix", 7), ("rate", 127)])
def test_two_products_fit_in_16_bits(code: str, most: int, signed: bool) -> None:
    """At the extremes, for every T: the largest byte, and the largest two adjacent weights."""
    for steps in range(1, most + 1):
        neuron = code, steps, 20, signed
        _, top = ops.CODES[code].limits(*neuron[1:])
        assert fits(*neuron[:3]) and top + zero_of(*neuron) <= 255
        assert (top + zero_of(*neuron)) * pair_limit(*neuron) <= WIDEST
    assert not fits(code, most + 1, 20)


WITHOUT_VNNI = """
import torch
from fasfx import ops
byte = torch.full((3, 64), 255, dtype=torch.uint8)
for weights in ((127, 1), (1, 127), (64, 64), (127, 127)):
    weight = torch.tensor(weights * 32)[:, None].repeat(1, 5)
    found = ops.integer_linear.op(byte, weight.to(torch.int8), torch.ones(5), None, 128)
    print(torch.equal(found, ((byte.long() - 128) @ weight).float()))
"""


def test_a_processor_without_vnni_sums_adjacent_pairs() -> None:
    """Two adjacent weights of 128 together are exact there, however uneven; 254 are not, hence the limit."""
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["True", "True", "True", "False"]
    assert pair_limit("radix", 7, 20, True) == 128


@given(st.data(), st.integers(1, 5), st.integers(1, 9), st.sampled_from([128, 254]))
def test_rounded_weights_keep_to_the_limit_and_are_the_nearest(data: Any, rows: int, width: int, pair: int) -> None:
    entries = st.floats(-100, 100, width=32)
    weight = torch.tensor(data.draw(st.lists(entries, min_size=rows * width, max_size=rows * width))).view(rows, width)
    found, scale = rounded(weight, pair)
    assert found.dtype == torch.int8 and found.shape == (width, rows)
    sizes = torch.nn.functional.pad(found.t().int().abs(), (0, width % 2)).unflatten(1, (-1, 2))
    assert int(sizes.max()) <= 127 and int(sizes.sum(2).max()) <= pair
    assert bool(((found.t() * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001 + 1e-30).all())


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize(("biased", "operator"), [(True, "QGemm"), (False, "MatMulIntegerToFloat")])
def test_products_are_exact_in_torch_and_in_onnx_runtime(
    neuron: Any, biased: bool, operator: str, tmp_path: Path
) -> None:
    """Counts at both ends, and weights as large as they may be, in every order: the same bits everywhere."""
    low, top = ops.CODES[neuron[0]].limits(*neuron[1:])
    zero, pair = zero_of(*neuron), min(127, pair_limit(*neuron) // 2)
    counts = torch.randint(0, 2, (5, 33)) * (top - low) + low
    weight = (torch.randint(0, 2, (33, 6)) * 2 - 1) * pair
    scale, bias = torch.rand(6), torch.randint(-(10**6), 10**6, (6,), dtype=torch.int32)

    class Layer(nn.Module):
        def forward(self, n: Tensor) -> Tensor:
            return ops.integer_linear.op(n, weight.to(torch.int8), scale, bias if biased else None, zero)

    byte = (counts + zero).to(torch.uint8)
    wanted = (counts @ weight + (bias if biased else 0)).float() * scale
    assert torch.equal(Layer()(byte), wanted)
    if zero == 0:
        assert torch.allclose(Layer()(counts.float()), wanted, rtol=1e-4, atol=1e-2)
    rows = {"n": {0: torch.export.Dim("rows")}}
    file = tmp_path / "layer.onnx"
    torch.onnx.export(Layer().eval(), (byte,), file, opset_version=18, dynamo=True, dynamic_shapes=rows, verbose=False)
    assert operators_of(file)[operator] == 1
    (found,) = onnxruntime.InferenceSession(file).run(None, {"n": byte.numpy()})
    assert torch.equal(torch.from_numpy(found), wanted)


def operators_of(file: Path) -> Counter[str]:
    """How many of each ONNX Runtime runs on a CPU."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_name("optimized.onnx"))
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("width", [3, EXACT, EXACT + 5])
def test_products_of_counts_are_exact_at_any_width(width: int) -> None:
    """Also where float32 could not hold the sum."""
    a, b = torch.full((1, width), 127), torch.full((width, 1), -127)
    a[0, 0] = 126
    found = ops.integer_matmul.op((a + 0).to(torch.uint8), (b + 128).to(torch.uint8), 0, 128)
    assert found.dtype == torch.float32
    assert torch.equal(found, (a @ b).float())


@given(st.integers(1, 4), st.integers(0, 5), st.sampled_from([torch.float32, torch.float64]))
def test_a_hadamard_transform_mixes_blocks_and_is_its_own_inverse(blocks: int, power: int, dtype: torch.dtype) -> None:
    size = 2**power
    x = torch.randn(2, 3, blocks * size, dtype=dtype)
    mixed = ops.hadamard.op(x, size)
    assert torch.allclose(ops.hadamard.op(mixed, size), size * x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(mixed[..., ::size], x.unflatten(-1, (-1, size)).sum(-1), rtol=1e-4, atol=1e-4)
    spike = torch.zeros(size, dtype=dtype)
    spike[-1] = 3
    assert torch.equal(ops.hadamard.op(spike, size).abs(), torch.full((size,), 3.0, dtype=dtype))


# --- passes ----------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 5), st.integers(1, 9), st.sampled_from([128, 254]))
def test_weights_with_error_feedback_are_kept_by_rounding(data: Any, rows: int, width: int, pair: int) -> None:
    """They are multiples of the step that the given ones have, so that lower finds these integers and no others."""
    entries = st.floats(-100, 100, width=16)
    weight = torch.tensor(data.draw(st.lists(entries, min_size=rows * width, max_size=rows * width))).view(rows, width)
    x = torch.randn(20, width)
    new = fed_back(weight, pair, (x.T @ x / 20)[None])
    assert torch.allclose(step(new, pair), step(weight, pair), rtol=1e-5)
    whole, scale = rounded(new, pair)
    assert torch.allclose(whole.t() * scale[:, None], new, rtol=1e-4)
    sizes = torch.nn.functional.pad(whole.t().int().abs(), (0, width % 2)).unflatten(1, (-1, 2))
    assert int(sizes.max()) <= 127 and int(sizes.sum(2).max()) <= pair


@pytest.mark.parametrize(("blocks", "share"), [(1, 0.6), (3, 0.8)])
def test_error_feedback_keeps_outputs_and_not_weights(blocks: int, share: float) -> None:
    """Inputs of few directions: their outputs are nearer than those of the nearest weights."""
    torch.manual_seed(0)
    x = torch.randn(400, 24) @ torch.randn(24, 96) + 0.1 * torch.randn(400, 96)
    weight = torch.randn(30, 96)
    parts = x.unflatten(1, (blocks, -1)).transpose(0, 1)
    fed = fed_back(weight, 128, parts.mT @ parts / 400)
    whole, scale = rounded(weight, 128)
    nearest = whole.t() * scale[:, None]
    assert (x @ (fed - weight).T).norm() < share * (x @ (nearest - weight).T).norm()
    assert (fed - weight).norm() > (nearest - weight).norm()


def test_moments_are_kept_in_even_blocks() -> None:
    assert [block_of(width) for width in (7, 1024, 1536, 4864, 1031)] == [7, 1024, 768, 608, 1]


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_round_makes_the_network_more_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs it has not seen, with counts so fine that weights make the error."""
    model, extra = tiny(family), {} if family == "bert" else {"use_cache": False}
    given, config = [batch(family, 16, 20, seed) | extra for seed in range(3)], fasfx.SpikeConfig.integer(timesteps=12)
    snn = fasfx.convert(model, given, config)
    monkeypatch.setattr(Round, "rewrite", lambda self, gm: False)
    nearest = fasfx.convert(model, given, config)
    unseen = batch(family, 4, 15, 9)
    assert error(model, snn, unseen) < 0.95 * error(model, nearest, unseen)


@given(st.integers(0, 10**6), st.floats(0.05, 20))
def test_a_lift_keeps_the_sum_of_small_currents(seed: int, size: float) -> None:
    u = torch.rand(2000, generator=torch.Generator().manual_seed(seed)).pow(6) * size
    lift = lift_of(u)
    assert 0 <= lift <= 0.5
    lost = abs(float((u + lift).round().sum() - u.sum()))
    assert lost <= 2 + 1e-3 * float(u.sum()) or lift == 0


def test_exponentials_are_lifted_and_the_ledger_says_so() -> None:
    _, snn = usual("llama")
    lifted = {name: site.lift for name, site in facts(snn.ranged).sites.items() if site.lift}
    assert lifted and all(facts(snn.ranged).sites[name].fixed == 1 for name in lifted)
    table = snn.ledger.table.set_index("node")
    for name, lift in lifted.items():
        assert table[table["pass"] == "clip"].loc[name, "value"] == pytest.approx((0.5 + lift) / 127)


def test_another_t_warns_that_lifts_stay(tmp_path: Path) -> None:
    """They come from data, which is not kept."""
    _, snn = converted("llama")
    snn.save_pretrained(tmp_path)
    for network in (snn, fasfx.SpikingModel.from_pretrained(tmp_path)):
        with pytest.warns(UserWarning, match="lifts of exponentials were found for T = 7 and stay.*convert at T = 5"):
            network.timesteps = 5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network.timesteps = 7


@pytest.mark.parametrize("size", [1, 2, 9, 48, 96, 576])
def test_rotations_are_orthogonal_and_spread(size: int) -> None:
    one = torch.eye(size, dtype=torch.float64)
    for q, spread in ((rotation(size), size), (blockwise(size), size & -size)):
        assert torch.allclose(q @ q.T, one, atol=1e-12)
        assert float(q.abs().max()) <= (2 / spread) ** 0.5 + 1e-12 or spread == 1
    assert torch.allclose(ops.hadamard.op(one, size & -size) / (size & -size) ** 0.5, blockwise(size))


@pytest.mark.parametrize("family", TINY)
def test_rotate_and_smooth_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "rewrite", lambda self, gm: False)
    model, snn = converted(family)
    declined = {d.rule for d in facts(snn.ranged).declined if d.pass_name == "rotate"}
    reasons = {"bert": {"rotate_stream"}, "gpt2": {"rotate_values"}, "t5": {"rotate_stream"}}
    assert declined == reasons.get(family, set())
    given = batch(family, seed=1)
    with torch.no_grad():
        found = snn.ranged(*[given[name] for name in snn.input_names])[0]
        wanted = model(**given)[0]
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert error(model, snn, batch(family)) < 0.1


def test_rotation_evens_the_channels_of_a_stream_out() -> None:
    """The outlier channel of the norms' weights is in no range any more."""
    for family, even in (("llama", True), ("bert", False)):
        model = uneven(family)
        extra = {"use_cache": False} if family == "llama" else {}
        observed = fasfx.convert(model, [batch(family) | extra], fasfx.SpikeConfig.integer(granularity="channel"))
        peaks = [site.peak for site in facts(observed.ranged).sites.values() if "norm" in site.name]
        ratios = [float(peak.max() / peak.median()) for peak in peaks if peak is not None and peak.dim()]
        assert ratios and (max(ratios) < 5) == even


def tied() -> nn.Module:
    """A tiny Llama whose head reads with the weights of the embedding, behind a norm with weights of its own."""
    kind, config, settings = TINY["llama"]
    torch.manual_seed(0)
    model: nn.Module = kind(config(**settings | {"vocab_size": 300, "tie_word_embeddings": True})).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    return model


def test_a_tied_head_keeps_the_embeddings_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rotated, with error fed back, and as integers; the rotation changes nothing. A file holds them once."""
    model, given = tied(), batch("llama", rows=16)
    snn = fasfx.convert(model, [given | {"use_cache": False}], fasfx.SpikeConfig.integer())
    graph = snn.graph_module.graph
    (lookup,) = graph.find_nodes(op="call_function", target=ops.integer_embedding.op)
    (kept,) = {node for node in graph.nodes if node.op == "get_attr" and node in lookup.args[0].args}
    assert [user.target for user in kept.users if user is not lookup.args[0]] == [ops.integer_linear.op]
    rounded_rows = snn(**batch("llama", seed=1)).logits
    assert error(model, snn, batch("llama", seed=1)) < 0.1
    snn.to_onnx(tmp_path)
    weights = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    large = [w for w in weights if w.data_type == onnx.TensorProto.INT8 and model.config.vocab_size in w.dims]
    assert len(large) == 1
    found = OnnxModel(tmp_path, threads=1)(**batch("llama", seed=1)).logits
    assert torch.allclose(torch.as_tensor(found), rounded_rows, rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(Round, "rewrite", lambda self, gm: False)
    exact = fasfx.convert(model, [given | {"use_cache": False}], fasfx.SpikeConfig.integer())
    with torch.no_grad():
        same = exact.ranged(*[given[name] for name in exact.input_names])[0]
        assert torch.allclose(same, model(**given).logits, rtol=1e-4, atol=1e-4)


class Bare(nn.Module):
    """A tied network whose norms have neither weights nor an eps of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.layer(F.rms_norm(x, [32]))
        return F.linear(F.rms_norm(x, [32]), self.table.weight)


def test_a_tied_head_behind_a_norm_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "rewrite", lambda self, gm: False)
    model, ids = Bare().eval(), torch.arange(50).view(5, 10)
    snn = fasfx.convert(model, [{"ids": ids}], fasfx.SpikeConfig.integer())
    with torch.no_grad():
        assert torch.allclose(snn.ranged(ids), model(ids), rtol=1e-4, atol=1e-4)
    stored = [value for value in snn.graph_module.state_dict().values() if value.dtype == torch.int8]
    assert sorted(value.numel() for value in stored) == [32 * 32, 32 * 50]


@pytest.mark.parametrize("tied_rows", [True, False])
def test_rows_of_zeros_keep_their_bias(tied_rows: bool) -> None:
    """A bias is int32 in the step of its row: there the step is not that of the weights."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 50)
            with torch.no_grad():
                self.table.weight[3], self.layer.weight[3], self.layer.bias[3] = 0, 0, 7.25

        def forward(self, ids: Tensor) -> Tensor:
            x = F.layer_norm(self.table(ids), [32])
            return F.linear(x, self.table.weight if tied_rows else self.layer.weight, self.layer.bias)

    model, ids = Head().eval(), torch.arange(50).view(5, 10)
    snn = fasfx.convert(model, [{"ids": ids}], fasfx.SpikeConfig.integer())
    (layer,) = snn.graph_module.graph.find_nodes(op="call_function", target=ops.integer_linear.op)
    stored = [attribute(snn.graph_module, str(node.target)) for node in layer.args[1:4] if node.op == "get_attr"]
    assert stored[-1].dtype == torch.int32
    with torch.no_grad():
        assert torch.allclose(snn(ids)[..., 3], torch.tensor(7.25), rtol=1e-6)
        assert float((snn(ids) - model(ids)).norm() / model(ids).norm()) < 0.05


def test_a_layer_whose_bias_is_computed_stays_in_float() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.layer_norm(x, [32]), self.layer.weight, x.mean((0, 1))[:8])

    model, x = Computed().eval(), torch.randn(4, 6, 32)
    snn = fasfx.convert(model, [{"x": x}], fasfx.SpikeConfig.integer())
    assert not snn.graph_module.graph.find_nodes(op="call_function", target=ops.integer_linear.op)
    assert "its bias is computed: weights and bias stay float" in set(snn.coverage.table.reason)
    with torch.no_grad():
        assert float((snn(x) - model(x)).norm() / model(x).norm()) < 0.05


@given(st.floats(0.01, 8), st.integers(0, 5))
def test_a_multiple_is_one_factor_for_every_weight(factor: float, at: int) -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.5, 4.0, -1.5]])
    assert multiple(weight * factor, weight) == pytest.approx(factor)
    other = weight.clone()
    other.view(-1)[at] += 0.1
    assert (
        multiple(other, weight) == 0 and multiple(weight.t(), weight) == 0 and multiple(-factor * weight, weight) == 0
    )


def test_smooth_makes_int8_weights_more_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, one threshold per channel goes into the weights as it is; one factor for all heads is left out."""
    monkeypatch.setattr(clip, "RAISED", 0)
    model, snn = usual("vit")
    monkeypatch.setattr(Smooth, "rewrite", lambda self, gm: False)
    _, other = converted("vit")
    given = batch("vit")
    assert error(model, snn, given) < 0.5 * error(model, other, given)


def test_what_cannot_be_rotated_is_said_with_node_and_source_line() -> None:
    _, snn = usual("bert")
    (reason, *_) = [d.reason for d in facts(snn.ranged).declined if d.pass_name == "rotate"]
    assert "is read by add" in reason and "modeling_bert.py" in reason


def test_gated_layers_have_a_threshold_per_row_and_meet_bytes() -> None:
    """Their channels mixed, unless one threshold for everything is asked for."""
    _, snn = usual("llama")
    assert len(snn.graph_module.graph.find_nodes(op="call_function", target=ops.hadamard.op)) == 2
    _, static = converted("llama", granularity="tensor")
    assert not static.graph_module.graph.find_nodes(op="call_function", target=ops.hadamard.op)
    assert not any(site.dynamic for site in facts(static.ranged).sites.values())
    gated = [site for site in facts(snn.ranged).sites.values() if site.dynamic]
    assert [site.module for site in gated] == [f"model.layers.{layer}.mlp" for layer in range(2)]
    rows = snn.coverage.table.set_index("node")
    assert set(rows[rows.operator == "integer_linear"].reason) == {""}
    assert snn.coverage.spike_driven_macs == 1


# --- whole networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_in_onnx_runtime_runs_in_integers(family: str, tmp_path: Path) -> None:
    """Every linear layer and every product of attention is one integer product, and the outputs agree."""
    model, snn = usual(family)
    snn.to_onnx(tmp_path)
    operators = operators_of(tmp_path / "model.onnx")
    targets = (ops.integer_linear.op, ops.integer_matmul.op)
    products = [node for node in snn.graph_module.graph.nodes if node.target in targets]
    # In both layers q, k and v are merged (GPT-2's are one layer as they come), a gate and what it lets through too.
    merged = {"gpt2": 0, "llama": 6}.get(family, 4)
    biased = [node for node in products if node.target is ops.integer_linear.op and node.args[3] is not None]
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == len(products) - merged > 8
    assert operators["QGemm"] == (len(biased) - merged if biased else 0)
    sequence = OnnxModel(tmp_path, threads=1)
    for rows, length in ((1, 5), (3, 9)):
        given = batch(family, rows, length, seed=length)
        ours, theirs = error(model, snn, given), error(model, sequence, given)
        assert theirs == pytest.approx(ours, rel=0.2)
        assert error(snn, sequence, given) < ours


def test_what_is_bounded_is_not_clipped(tmp_path: Path) -> None:
    """Counts of exponentials and of values over their row's largest; the others are. Norms are one division."""
    _, snn = usual("llama")
    snn.to_onnx(tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    made = {name: node.op_type for node in nodes for name in node.output}
    read = {name: node.op_type for node in nodes for name in node.input}
    neurons = [(made[n.input[0]], read[n.output[0]]) for n in nodes if n.op_type == "QuantizeLinear"]
    bounded = [reader for maker, reader in neurons if maker in ("Add", "Exp", "Div")]
    assert bounded == ["DequantizeLinear"] * 2 * 2
    assert {reader for maker, reader in neurons if maker in ("Mul", "Transpose")} == {"Clip"}
    assert len(neurons) == 8 * 2 + 1 and "Reciprocal" not in made.values()


def test_a_profile_tells_which_node_ran_where(tmp_path: Path) -> None:
    _, snn = usual("bert")
    snn.to_onnx(tmp_path)
    deployed = OnnxModel(tmp_path, threads=1)
    table = deployed.profile(**batch("bert", seed=1))
    assert list(table.columns) == ["node", "operator", "provider", "microseconds"]
    assert set(table.provider) == {"CPUExecutionProvider"} and int(table.microseconds.min()) >= 0
    assert (table.operator == "MatMulIntegerToFloat").sum() == 2 * 2
    assert (table.operator == "QGemm").sum() == 2 * 4 + 1  # with q, k and v as one layer, and the pooler
    assert "LayerNormalization" in set(table.operator) and "SkipLayerNormalization" not in set(table.operator)
    with pytest.raises(fasfx.errors.InputError, match="missing input"):
        deployed.profile()


def test_views_and_transposes_move_bytes() -> None:
    _, snn = usual("bert")
    moved = [node for node in snn.graph_module.graph.nodes if node.target in VIEWS and is_byte(node)]
    assert len(moved) >= 2 * 4 * 2  # queries, keys, values and what is mixed of them, a view and a transpose each


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_flat_between_layers(family: str) -> None:
    """The same bits for any batch and length; every layer with a bias reads rows, and what lies between stays flat."""
    _, snn = usual(family)
    merged, flat = merge_layers(snn.graph_module), flatten_rows(merge_layers(snn.graph_module))
    layers = flat.graph.find_nodes(op="call_function", target=ops.integer_linear.op)
    assert all(fake(node.args[0]).dim() == 2 for node in layers if node.args[3] is not None)
    if family == "bert":
        norms = flat.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
        assert [fake(node).dim() for node in norms] == [3] + [2] * 4
    for rows, length in ((1, 5), (3, 9)):
        given = [batch(family, rows, length, seed=length)[name] for name in snn.input_names]
        with torch.no_grad():
            pairs = zip(tree_leaves(flat(*given)), tree_leaves(merged(*given)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rows_that_are_mixed_are_not_flat() -> None:
    """A sum over positions, a table of positions, and a split of them."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.table = nn.Parameter(torch.randn(6, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(F.layer_norm(x, [32])) + self.table
            a, b = x.split([2, 4], 1)
            return self.second(F.layer_norm(a.sum(1, keepdim=True) + b, [32]))

    x = torch.randn(4, 6, 32)
    snn = fasfx.convert(Mixing().eval(), [{"x": x}], fasfx.SpikeConfig.integer())
    flat = flatten_rows(merge_layers(snn.graph_module))
    with torch.no_grad():
        assert torch.equal(flat(x[:2]), snn(x[:2]))
    sums = [node for node in flat.graph.nodes if node.target is torch.ops.aten.sum.dim_IntList]
    assert all(fake(node.args[0]).dim() == 3 for node in sums) and sums


@pytest.mark.parametrize(("raised", "one"), [(1e9, True), (clip.RAISED, False)])
def test_one_factor_scales_the_scores_of_every_head(
    raised: float, one: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Queries' and keys' thresholds have one product, and in ONNX it is the scale of the integer product.

    Not where a head is much wider than another, as here.
    """
    monkeypatch.setattr(clip, "RAISED", raised)
    _, snn = converted("bert")
    theta = thresholds(snn.ranged)
    pairs = [list(map(operand, node.args)) for node, live in synapses(snn.ranged) if len(live) == 2]
    scores = [(theta[a.name], theta[b.name].mT) for a, b in pairs if theta[a.name].dim() and theta[b.name].dim() > 1]
    products = [a * b for a, b in scores]
    assert len(products) == 2 and all(p.numel() > 1 and torch.allclose(p, p.amax(-1, keepdim=True)) for p in products)
    assert all(torch.allclose(p, p.amax()) if one else float(p.amax() / p.amin()) > 4 for p in products)
    snn.to_onnx(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    matmuls = [node for node in graph.node if node.op_type == "MatMul"]
    sides = [[makers.get(name) for name in node.input] for node in matmuls]
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.external_data}
    both = [a for a, b in sides if a and b and b.op_type == a.op_type == "DequantizeLinear" and b.input[0] in makers]
    assert sum(float(numbers[node.input[1]]) != 1 for node in both) == 2 * one


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_spikes_are_those_of_the_site_wherever_bytes_are_moved(family: str) -> None:
    _, snn = usual(family)
    inputs = batch(family)
    in_float = SpikeRecorder(
        Runner([Clip(), Substitute(), Fold(), Lower(bytes_travel=False)]).run(snn.ranged), snn._static_thresholds()
    )
    in_float.run(*(inputs[name] for name in snn.input_names))
    trains = snn.spikes(**inputs)
    assert trains.keys() == in_float.trains.keys()
    for site, train in in_float.trains.items():
        assert trains[site].events.shape == train.events.shape
        assert trains[site].decode().shape == train.events.shape[1:]
        differing = trains[site].counts() != train.counts()  # next to a tie rounding of float sums decides
        assert differing.float().mean() < 0.01


def test_spike_quantizer_writes_the_integer_form(tmp_path: Path) -> None:
    model, given = uneven("bert"), batch("bert")
    quantizer = fasfx.SpikeQuantizer(fasfx.SpikeConfig.integer(), calibration_dataset=[given])
    shapes = {name: {0: torch.export.Dim("batch")} for name in given}
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=18, quantizer=quantizer)
    OnnxExporter().export(model, given, config).save_pretrained(tmp_path)
    assert error(model, OnnxModel(tmp_path, threads=1), given) < 0.1
    products = OnnxModel(tmp_path, threads=1).profile(**given).operator
    assert products.isin(["MatMulIntegerToFloat", "QGemm"]).sum() == 2 * 8 + 1


def test_a_program_has_the_signature_of_its_inputs() -> None:
    """Whoever exports or compiles it by hand reads it."""
    _, snn = usual("bert")
    assert list(inspect.signature(snn.graph_module.forward).parameters) == snn.input_names


def test_counts_in_float_are_the_same_network(tmp_path: Path) -> None:
    """form="closed": standard float operators, for runtimes without integer products."""
    model, snn = usual("bert")
    snn.to_onnx(tmp_path, form="closed")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert not {"QuantizeLinear", "MatMulInteger"} & {node.op_type for node in graph.node}
    given = batch("bert", seed=1)
    assert error(snn, OnnxModel(tmp_path, threads=1), given) < error(model, snn, given)
    with pytest.raises(fasfx.errors.ConfigError, match="exported as integer or closed"):
        snn.to_onnx(tmp_path, form="loop")


@pytest.mark.slow  # CI runs what it tests: README line 1 or a quick benchmark
def test_a_file_is_small(tmp_path: Path) -> None:
    """int8 weights and embeddings: about a quarter of the float file, and one scale for every channel."""
    torch.manual_seed(0)
    size = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 768}
    model = BertModel(BertConfig(vocab_size=2000, max_position_embeddings=64, **size)).eval()
    sizes = {}
    for weights in ("int8", "float"):
        snn = fasfx.convert(model, [batch("bert")], fasfx.SpikeConfig.integer(weights=weights))
        snn.to_onnx(tmp_path / weights)
        sizes[weights] = (tmp_path / weights / "model.onnx.data").stat().st_size
    assert sizes["int8"] < 0.28 * sizes["float"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"timesteps": 8}, "counts up to 255 do not fit in a byte: they stay float; radix with fewer time steps fits"),
        ({"code": "multi"}, "a multi neuron sends powers of two up to 524288: its counts stay float"),
    ],
)
def test_what_does_not_fit_stays_float_and_is_told(changes: Any, why: str, tmp_path: Path) -> None:
    model, snn = converted("bert", **changes)
    table = snn.coverage.table
    assert why in set(table.reason) and bool(table[table.reason == why].spike_driven.all())
    given = batch("bert", seed=1)
    assert error(model, snn, given) < 0.05
    snn.to_onnx(tmp_path)
    assert error(model, OnnxModel(tmp_path, threads=1), given) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_and_are_exported_in_float32_only(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clip, "RAISED", 0)  # it moves the error of so small a network by chance: decision 12
    model = uneven("llama").to(dtype)
    given = batch("llama")
    snn = fasfx.convert(model, [given | {"use_cache": False}], fasfx.SpikeConfig.integer())
    assert snn(**given).logits.dtype == dtype
    assert error(model, snn, given) < 0.1
    with pytest.raises(fasfx.errors.ConfigError, match="exported with float32 scales"):
        snn.to_onnx(tmp_path)


def test_scales_too_small_for_float16_are_refused() -> None:
    with pytest.raises(fasfx.errors.ConfigError, match="too small for float16: convert model.float"):
        fasfx.convert(uneven("bert").half(), [batch("bert")], fasfx.SpikeConfig.integer())


def test_the_ledger_names_every_rounded_weight() -> None:
    _, snn = usual("bert")
    rows = snn.ledger.table
    rows = rows[rows.rule == "int8_weights"]
    assert len(rows) == 2 * 6 + 1 + 3  # layers, pooler, embeddings
    assert set(rows.bound) == {"step/2"} and bool((rows.value > 0).all())


def test_a_checkpoint_keeps_what_the_passes_made(tmp_path: Path) -> None:
    _, snn = converted("llama")
    snn.save_pretrained(tmp_path)
    again, given = fasfx.SpikingModel.from_pretrained(tmp_path), batch("llama", seed=1)
    assert torch.equal(again(**given).logits, snn(**given).logits)
    again.timesteps = 5
    snn.timesteps = 5
    assert torch.equal(again(**given).logits, snn(**given).logits)


def test_spikes_decode_to_what_the_products_read() -> None:
    """The events of every site, a row's own threshold among them, add up to the bytes."""
    _, snn = usual("llama")
    given = batch("llama", seed=1)
    trains = snn.spikes(**given)
    assert set(trains) == set(facts(snn.ranged).sites)
    assert all(int(train.counts().abs().max()) <= 127 for train in trains.values())
    gated = next(name for name, site in facts(snn.ranged).sites.items() if site.dynamic)
    values = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            values[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Watch(snn.ranged).run(*[given[name] for name in snn.input_names])
    wanted = values[gated]
    gap = trains[gated].decode() - wanted
    assert float(gap.norm() / wanted.norm()) < 0.2
    assert np.isfinite(trains[gated].firing_rate)


def test_training_keeps_the_weights_meaning() -> None:
    """fasfx.prepare neither rotates nor evens out: parameters are the original's."""
    model = uneven("llama")
    qann = fasfx.prepare(model, [batch("llama") | {"use_cache": False}], fasfx.SpikeConfig.integer())
    own = dict(qann.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in model.named_parameters())


def test_the_integer_graph_compiles_without_breaks() -> None:
    """One graph, integer products as they are; the compiler's backend is its own eager one."""
    _, snn = usual("bert")
    given = batch("bert", seed=1)
    with torch.no_grad():
        compiled = torch.compile(snn.graph_module, fullgraph=True, backend="aot_eager")(**snn._inputs((), given))
        assert torch.allclose(compiled[0], snn(**given)[0], atol=1e-5)


def test_counts_in_float_meet_int8_weights_in_float(tmp_path: Path) -> None:
    """ONNX Runtime's own rounding of the other side would add a tenth of the error."""
    model, snn = usual("bert")
    snn.to_onnx(tmp_path, form="closed")
    given = batch("bert", rows=4, length=24)
    assert error(snn, OnnxModel(tmp_path, threads=1), given) < 0.1 * error(model, snn, given)
