"""`explain` on ten architectures: every operator left in float has a reason, and the reason is the true one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch.fx import GraphModule

from fasfx import tools
from fasfx.calibration import without_cache
from fasfx.capture import capture
from fasfx.compositions import COMPOSITIONS
from fasfx.config import SpikeConfig
from fasfx.coverage import FLOAT, SYNAPSE, coverage
from fasfx.levels import is_skipped
from fasfx.ops.functions import OPERATORS
from fasfx.program import facts
from fasfx.synapses import SYNAPSES
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

SIZES: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 64}
SIZES |= {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", SIZES | {"embedding_size": 8}),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 64}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "qwen2": ("Qwen2", SIZES | {"num_key_value_heads": 1}),
}
PRODUCTS = {torch.ops.aten.mul.Tensor}  # of two values: of counts only where functions are spiking
CONFIGS = {
    "exact": SpikeConfig(nonlinear="exact"),
    "activation": SpikeConfig(nonlinear="exact", coverage="activation", code="rate"),
    "skip": SpikeConfig(nonlinear="exact", skip=(r"(^|\.)0(\.|$)",)),
}


def family(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    if name in TINY:
        return tiny(name), tiny_inputs(name)
    kind, sizes = MORE[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (3, 7))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@functools.cache
def captured(name: str) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    model, batch = family(name)
    return capture(model, batch | without_cache(model), SpikeConfig()), batch


def explained(name: str, config: SpikeConfig) -> tuple[GraphModule, list[tools.Explanation]]:
    program, batch = captured(name)
    given = tools.subject(program, None, [batch], config)
    final = given.final()
    left = [row.node for row in coverage(final).rows if row.kind in (FLOAT, SYNAPSE) and not row.spike_driven]
    return final, tools.explain(given, *left) if left else []


@pytest.mark.parametrize(
    ("which", "name"),
    [("exact", name) for name in (*TINY, *MORE)] + [(w, n) for w in ("activation", "skip") for n in ("bert", "llama")],
)
def test_every_reason_is_the_true_one(name: str, which: str) -> None:
    config = CONFIGS[which]
    final, found = explained(name, config)
    nodes = {node.name: node for node in final.graph.nodes}
    assert found
    for one in found:
        node = nodes[one.node]
        reason = one.outcome.removeprefix("not spike-driven: ")
        assert reason != one.outcome and not one.spike_driven
        if reason == "its module is in config.skip":
            assert is_skipped(final, node)
        elif reason.endswith("carries float values"):
            assert node.target in SYNAPSES and config.coverage == "activation"
        else:
            assert reason == "evaluated in float (nonlinear='exact')", one
            assert node.target in OPERATORS or node.target in COMPOSITIONS or node.target in PRODUCTS, node.target
            assert not is_skipped(final, node)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_exact_leaves_is_spiking_by_default(name: str) -> None:
    """The counterfactual of the reason: without nonlinear="exact" nothing is left."""
    program, batch = captured(name)
    final = tools.subject(program, None, [batch], SpikeConfig()).final()
    assert facts(final).level == "LOWERED"
    assert coverage(final).float_operators == []


def test_a_function_without_a_spiking_form_says_so() -> None:
    class Special(torch.nn.Module):
        """A power that is not written out, and a function that no row of the tables has."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x.pow(1.7))

    given = tools.subject(Special(), None, [{"x": torch.rand(3, 8)}], SpikeConfig())
    power, bessel = tools.explain(given, "pow_1", "special_bessel_j0")
    assert power.outcome == "not spike-driven: aten.pow.Tensor_Scalar is not written out with these arguments"
    assert power.tried == (
        "normalise: compose: declined, aten.pow.Tensor_Scalar is not written out with these arguments",
    )
    assert bessel.outcome == "not spike-driven: no spiking form of it is known to this version"
    assert bessel.tried == ()
