"""The pass tools on a tiny BERT: pipelines, run, verify, bisect, reduce, explain, diff, and the planted faults."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from strategies import aligned
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import fasfx
from fasfx import tools
from fasfx.calibration import without_cache
from fasfx.capture import capture
from fasfx.config import SpikeConfig
from fasfx.difference import main_output
from fasfx.errors import CalibrationError, CheckpointError, ConfigError, InputError, PromiseError
from fasfx.graph_text import text
from fasfx.passes import PIPELINE
from fasfx.program import facts
from fasfx.tools import pipeline
from fasfx.tools.bench.models import tiny, tiny_inputs
from fasfx.tools.bench.planted import FAULTS, Fault
from fasfx.tools.subjects import apply_partly, output
from fasfx.tools.verifying import distance

EVERY = ",".join(one.name for one in PIPELINE)
FLOAT = SpikeConfig(nonlinear="exact")  # without groups, whose breakpoints take time
CONFIGS = {
    "multi": SpikeConfig(),
    "radix": SpikeConfig(code="radix", timesteps=6, nonlinear="exact"),
    "synchronous": SpikeConfig(schedule="synchronous", nonlinear="exact"),
    "rate, synchronous": SpikeConfig(code="rate", schedule="synchronous", nonlinear="exact"),
    "token": SpikeConfig(granularity="token", nonlinear="exact"),
    "percentile": SpikeConfig(threshold="percentile", margin=0.5, nonlinear="exact"),
    "integer": SpikeConfig.integer(),
}


def bert(passes: str | None = None, config: SpikeConfig = FLOAT) -> tools.Subject:
    """A tiny BERT, captured once, with batches of its own."""
    return tools.subject(captured("bert"), passes, [tiny_inputs("bert", seed=seed) for seed in (1, 2)], config)


@functools.cache
def captured(family: str) -> GraphModule:
    model = tiny(family)
    return capture(model, tiny_inputs(family) | without_cache(model), FLOAT)


# --- pipelines -------------------------------------------------------------------------------------------


def test_a_pipeline_is_names_and_fields() -> None:
    names, options = pipeline.parse("normalise, observe{granularity=token,timesteps=6},clip{skip=pooler,margin=1.5}")
    assert names == ["normalise", "observe", "clip"]
    assert options == {"granularity": "token", "timesteps": 6, "skip": ("pooler",), "margin": 1.5}
    config = bert("normalise,observe{timesteps=6}").program.meta["fasfx"].config
    assert config == FLOAT.replace(timesteps=6)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("normalise,shine", "unknown pass shine: known are normalise, rotate"),
        ("normalise{timesteps}", "write field=value"),
        ("normalise{timesteps=3},observe{timesteps=4}", "every field once"),
        ("normalise{{timesteps=3}", "is no pipeline"),
        ("", "is no pipeline"),
        ("observe{glitter=3}", "unknown field glitter"),
        ("observe{timesteps=none}", "timesteps='none'"),
    ],
)
def test_a_wrong_pipeline_is_refused(spec: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        _, options = pipeline.parse(spec)
        FLOAT.replace(**options)


def test_the_default_pipeline_goes_on_where_the_program_is() -> None:
    """At any of the levels that several passes keep, too; by its level alone where it does not say."""
    program, names = bert(config=FLOAT).program, EVERY.split(",")
    assert pipeline.default(program) == names
    for done in (1, 2, 3, 4, 5, len(names)):
        ran = tools.run(bert(config=FLOAT), stop_after=done)
        assert pipeline.default(ran) == names[done:]
    for level, following in (("CAPTURED", names), ("RANGED", names[6:]), ("LOWERED", [])):
        facts(program).level = level
        assert pipeline.default(program) == following


# --- run -------------------------------------------------------------------------------------------------


def test_run_is_what_convert_does() -> None:
    given = bert()
    expected = fasfx.convert(tiny("bert"), given.batches, FLOAT)
    assert text(tools.run(given)) == text(expected.graph_module)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [(SpikeConfig(), (0, 5, 7, 8)), (FLOAT.replace(centre=True), (1, 3)), (SpikeConfig.integer(), (1, 4, 5))],
    ids=["default", "centred", "integer"],
)
def test_a_stored_program_gives_what_the_model_gives(
    config: SpikeConfig, numbers: tuple[int, ...], tmp_path: Path
) -> None:
    given = bert(config=config)
    final = tools.run(given, dump=tmp_path)
    names = sorted((one.name for one in tmp_path.iterdir()), key=lambda name: int(name.partition("-")[0]))
    assert names == [f"{number}-{name}" for number, name in enumerate(["captured", *EVERY.split(",")])]
    for number in numbers:  # from any level on
        (folder,) = tmp_path.glob(f"{number}-*")
        again = tools.subject(folder / "graph.txt")
        assert text(again.program) == (folder / "graph.txt").read_text()
        stored = [*again.program.state_dict().values(), *(value for batch in again.batches for value in batch.values())]
        assert aligned(stored)
        found = tools.run(again)
        assert text(found) == text(final)
        for a, b in zip(output(found, given.inputs).values(), output(final, given.inputs).values(), strict=True):
            assert torch.equal(a, b)


def test_run_shows_what_is_asked_for() -> None:
    shown: list[str] = []
    program = tools.run(bert(EVERY), shown.append, print_after=["fold"], print_diff=True, stop_after=9)
    assert facts(program).level == "FOLDED"
    assert [one for one in shown if one.startswith("after fold\n# fasfx graph")] == [f"after fold\n{text(program)}"]
    differences = [one for one in shown if one.startswith("--- before")]
    assert "--- before normalise\n+++ after normalise" in differences[0]
    assert "-layer_norm" not in differences[0] and "\n-scaled_dot_product_attention" in differences[0]
    with pytest.raises(ConfigError, match="cannot print after shine"):
        tools.run(bert("normalise"), print_after=["shine"])


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.txt").write_text("# fasfx graph 1\n")
    with pytest.raises(CheckpointError, match=r"is no graph text with spike_config\.json"):
        tools.subject(tmp_path / "graph.txt")
    given = bert()
    tools.run(given, stop_after=0, dump=tmp_path)
    (tmp_path / "0-captured" / "inputs.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"neither inputs\.safetensors nor a tokenizer"):
        tools.subject(tmp_path / "0-captured")
    with pytest.raises(CalibrationError, match="needs batches of its inputs"):
        tools.subject(given.program)


# --- verify ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_pass_keeps_its_promise(name: str) -> None:
    tools.run(bert(config=CONFIGS[name]), verify_each=True)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_every_pass_keeps_its_promise_elsewhere(family: str) -> None:
    tools.run(tools.subject(captured(family), None, [tiny_inputs(family)], FLOAT), verify_each=True)


class Careless(PassBase):
    """Drops the bias of the first linear layer; a PassBase of torch's, with no name and no level."""

    def call(self, gm: GraphModule) -> PassResult:
        """As torch asks for it."""
        (first, *_) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        first.args = first.args[:2]
        return PassResult(gm, True)


def test_verify_names_the_values_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "installed", lambda: {"careless": Careless})
    with pytest.raises(PromiseError, match="pass Careless breaks its promise at .* places:\n  value linear in .*query"):
        tools.run(bert("normalise,careless,observe"), verify_each=True)
    found = tools.bisect(bert("normalise,careless,observe"))
    assert found is not None
    assert (found.pass_name, found.application) == ("careless", None)  # it asks for no permission
    assert found.node is not None and found.node.node == "linear"


# --- bisect and reduce -----------------------------------------------------------------------------------


@pytest.fixture(params=FAULTS)
def planted(request: pytest.FixtureRequest) -> Iterator[Fault]:
    fault = FAULTS[request.param]
    with fault.plant():
        yield fault


def of(fault: Fault) -> tools.Subject:
    return bert(config=fault.config.replace(nonlinear="exact"))


def test_without_a_fault_nothing_is_found() -> None:
    for fault in FAULTS.values():
        assert tools.bisect(of(fault)) is None
        assert tools.reduce(of(fault)) is None


def test_bisect_names_pass_rule_and_node(planted: Fault) -> None:
    found = tools.bisect(of(planted))
    assert found is not None
    assert planted.is_named_by(found)
    given = of(planted)
    partly = apply_partly(pipeline.make(found.pass_name, given.batches), found.before, found.number - 1)
    assert tools.verify(found.before, partly, given.inputs) == []  # it is the first


def test_bisect_by_a_metric_of_the_output() -> None:
    fault, given = FAULTS["scale"], of(FAULTS["scale"])
    clean = distance_of(given)
    with fault.plant():
        found = tools.bisect(given, "relative_l2", 1.2 * clean)
    assert found is not None and found.application is not None
    assert (found.pass_name, found.application.rule) == (fault.pass_name, fault.rule)
    assert found.measured > 1.2 * clean


def distance_of(given: tools.Subject) -> float:
    """Relative L2 error of the network after all passes."""
    return distance(*(main_output(output(one, given.inputs)) for one in (given.program, given.final())))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'beauty': choose one of promise"):
        tools.bisect(bert(), "beauty")


def test_reduce_writes_a_test_that_fails_until_the_fix(planted: Fault, tmp_path: Path) -> None:
    found = tools.reduce(of(planted))
    assert found is not None
    assert 1 <= len(found.operators) <= 5
    test = found.write(tmp_path)
    folder = tmp_path / planted.pass_name
    assert (folder / "graph.txt").read_text() == found.text
    assert tools.replay(folder, planted.pass_name) != []
    # In a process of its own nothing is planted: the fault is fixed.
    command = [sys.executable, "-m", "pytest", "-q", str(test)]
    fixed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTEST_ADDOPTS": ""})
    assert fixed.returncode == 0, fixed.stdout


def test_the_program_is_right_after_any_number_of_applications() -> None:
    """What bisect relies on: a refused application leaves the program as it was."""
    for config in (CONFIGS["radix"], CONFIGS["integer"]):
        given = bert(config=config)
        for stage in given.stages():
            for limit in range(0, len(stage.applied), max(1, len(stage.applied) // 5)):
                partly = apply_partly(stage.one, stage.before, limit)
                assert tools.verify(stage.before, partly, given.inputs) == [], (stage.name, limit)


# --- explain and diff ------------------------------------------------------------------------------------


def test_explain_tells_what_became_of_a_node() -> None:
    given = bert(config=FLOAT.replace(skip=(r"layer\.1\.intermediate",)))
    (attention,) = tools.explain(given, "scaled_dot_product_attention")
    assert attention.outcome == "it is gone after pass normalise"
    assert attention.tried == ("normalise: attention_to_products: applied",)
    layer = tools.explain(given, "encoder.layer.1.intermediate")
    outcomes = {one.operator: one.outcome for one in layer if not one.spike_driven}
    assert outcomes == dict.fromkeys(
        ("aten.linear.default", "aten.gelu.default"), "not spike-driven: its module is in config.skip"
    )
    with pytest.raises(InputError, match="no node and no module is named 'encoder.layer.7'"):
        tools.explain(given, "encoder.layer.7")


def test_explain_shows_the_nearest_pattern() -> None:
    class Almost(torch.nn.Module):
        """RMSNorm with a cube."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * (x * torch.rsqrt(torch.sinh(x.pow(2).mean(-1, keepdim=True)) + 1e-6))

    given = tools.subject(Almost(), "normalise", [{"x": torch.randn(3, 8)}], FLOAT)
    (found,) = tools.explain(given, "mul_1")
    assert found.nearest.startswith("normalise: primitives_to_rms_norm")
    assert "sinh is aten.sinh.default and not aten.mean.dim" in found.nearest


def test_diff_of_two_levels() -> None:
    both = tools.diff(bert().until("CLIPPED"), bert().until("LOWERED")).set_index("node")
    neurons = both[both["kind"] == "neuron"]
    assert len(neurons) == len(facts(bert().until("RANGED").final()).sites)
    assert (neurons["bound_a"] == 4.0**-4).all() and (neurons["bound_b"] == neurons["bound_a"]).all()
    assert (neurons["measured_a"] <= neurons["bound_a"]).all() and (neurons["measured_a"] > 0).all()
    assert neurons["rate_a"].between(0, 1).all()
    assert (both["difference"] < 0.01).all()


def test_diff_of_two_configurations_and_two_files(tmp_path: Path) -> None:
    one, two = (bert(config=FLOAT.replace(timesteps=steps)) for steps in (2, 6))
    both = tools.diff(one, two).set_index("node")
    assert (both["bound_a"].dropna() == 4.0**-2).all() and (both["bound_b"].dropna() == 4.0**-6).all()
    assert both.loc["output 0", "difference"] > 0.01
    for number, given in enumerate((one, two)):
        tools.run(given, dump=tmp_path / str(number), stop_after=5)
    stored = tools.diff(*(tools.subject(tmp_path / str(number) / "5-smooth") for number in (0, 1)))
    assert stored.equals(tools.diff(*(bert(config=given.program.meta["fasfx"].config) for given in (one, two))))
