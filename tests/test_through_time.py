"""Stage I through the ticks of a synchronous network: what trains is what its spikes will say after T ticks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import EXACT, TIED, classifier, descend, inputs, move_thresholds, original, text, trainer
from torch import Tensor

import fasfx
from fasfx import ops
from fasfx.alignment import disagreement
from fasfx.errors import ConfigError
from fasfx.runtime.ticks import StepGraph
from fasfx.through_time import ThroughTime

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
TICKING = ["multi", "rate"]
THREE = EXACT.replace(schedule="synchronous", timesteps=3, levels=6)


def through_time(code: str = "multi", model: Any = None, batch: Any = None) -> fasfx.ClippedModel:
    """Three ticks, float64; thresholds are not those of calibration."""
    qann = fasfx.prepare(model or classifier().double(), [batch or text()], THREE.replace(code=code), through_time=True)
    torch.manual_seed(0)
    move_thresholds(qann, 0.2)
    return qann


def gradients(qann: fasfx.ClippedModel, batch: Any) -> list[Tensor]:
    qann.zero_grad()
    qann(**batch).loss.backward()
    return [p.grad.clone() for p in qann.parameters() if p.grad is not None]


@pytest.mark.parametrize("code", TICKING)
@pytest.mark.parametrize("family", ["bert", "vit", *TIED])
def test_what_trains_is_the_synchronous_network(family: str, code: str) -> None:
    model, batch = original(family)
    batch = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    qann = through_time(code, model.double().eval(), batch)
    found, wanted = qann(**inputs(batch)).logits, fasfx.convert(qann)(**inputs(batch)).logits
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    closed = fasfx.prepare(model, [batch], THREE.replace(code=code))
    assert not torch.allclose(closed(**inputs(batch)).logits, wanted, rtol=1e-3)
    assert {name for name, _ in qann.named_parameters()} == {name for name, _ in closed.named_parameters()}


@pytest.mark.parametrize("settings", [{"timesteps": 1}, {"granularity": "token"}, {"granularity": "channel"}], ids=str)
@pytest.mark.parametrize("code", TICKING)
def test_whatever_the_settings(code: str, settings: dict[str, Any]) -> None:
    """One tick of a multi neuron is its closed form; thresholds of rows are computed anew in every tick."""
    config, teacher = THREE.replace(code=code, **settings), classifier(seed=1).double()
    qann = fasfx.prepare(classifier().double(), [text()], config, through_time=True)
    other = text(1, 2)  # another batch size
    found = qann(**inputs(other)).logits
    assert torch.allclose(found, fasfx.convert(qann)(**inputs(other)).logits, rtol=1e-9, atol=1e-12)
    if settings == {"timesteps": 1}:
        closed = fasfx.prepare(classifier().double(), [text()], config)
        assert torch.allclose(found, closed(**inputs(other)).logits, rtol=1e-9, atol=1e-12)
    qann.train().objective = fasfx.Objective(teacher=teacher)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(qann, other))


@pytest.mark.parametrize("code", TICKING)
def test_gradients_are_those_of_all_ticks(code: str) -> None:
    """The multi code's earlier ticks run without: nothing of their gradient is left in the last."""
    qann, batch = through_time(code).eval(), text()
    found = gradients(qann, batch)
    qann.zero_grad()
    *_, output = StepGraph(qann._programs[1]).ticks([*qann.inputs(batch).values()], 3)
    qann._task_loss(output, {"labels": batch["labels"]}, None).backward()
    wanted = [p.grad for p in qann.parameters() if p.grad is not None]
    assert len(found) == len(wanted) == len([*qann.parameters()])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    assert any(bool(gradient.any()) for gradient in found)


def kept(call: Callable[[], object]) -> int:
    """Bytes that a call keeps for gradients."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        call()
    return sum(sizes)


@pytest.mark.parametrize(("code", "spikes", "ticks"), [("multi", 0.0, 1), ("multi", 0.1, 3), ("rate", 0.0, 3)])
def test_ticks_are_kept_where_gradients_need_them(code: str, spikes: float, ticks: int) -> None:
    sizes = []
    for steps in (1, 3):
        config = THREE.replace(code=code, timesteps=steps)
        aim = fasfx.Objective(spikes=spikes)
        qann = fasfx.prepare(classifier().double(), [text()], config, aim, through_time=True).train()
        sizes.append(kept(lambda qann=qann: qann(**text())))
    assert sizes[1] == pytest.approx(ticks * sizes[0], rel=0.1)


@pytest.mark.parametrize("code", TICKING)
def test_recomputed_ticks_give_the_same_gradients_and_keep_less(code: str) -> None:
    qann, batch = through_time(code, classifier(hidden_dropout_prob=0.5).double()).train(), text()
    qann.objective = fasfx.Objective(spikes=0.1)
    found, sizes = [], []
    for again in (False, True):
        (qann.activation_checkpointing_enable if again else qann.activation_checkpointing_disable)()
        sizes.append(kept(lambda: qann(**batch)))
        torch.manual_seed(3)
        found.append(gradients(qann, batch))
    assert all(map(torch.equal, *found)) and sizes[1] < 0.5 * sizes[0]


def test_checkpointing_is_refused_where_one_tick_is_kept_anyway() -> None:
    qann = through_time().train()
    qann.activation_checkpointing_enable()
    with pytest.raises(ConfigError, match="keeps one tick, and this network needs no other: turn it off"):
        qann(**text())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_has_the_same_masks_in_every_tick(dropout: float) -> None:
    """Those of the closed form, to which a fine network then comes; later random numbers are the same, too."""
    fine = THREE.replace(timesteps=12, levels=24)
    model, outputs, later = classifier(hidden_dropout_prob=dropout).double(), [], []
    for through in (True, False):
        qann = fasfx.prepare(model, [text()], fine, through_time=through).train()
        torch.manual_seed(5)
        outputs.append(qann(**inputs(text())).logits)
        later.append(torch.rand(()))
        again = qann(**inputs(text())).logits
        assert torch.equal(again, outputs[-1]) == (dropout == 0)
    assert torch.allclose(*outputs, rtol=1e-3) and later[0] == later[1]


def test_an_objective_reads_the_last_tick_and_counts_the_spikes_of_all() -> None:
    qann, teacher, batch = through_time().train(), classifier(seed=1).double(), text()
    aim = fasfx.Objective(0.0, teacher, logits=0.0, hidden=1.0)
    qann.objective = aim
    hidden = qann(**batch).loss
    seen = ThroughTime(qann._programs[1]).run([*qann.inputs(batch).values()], spikes=True)
    qann.objective = fasfx.Objective(0.0, teacher, logits=0.0, hidden=1.0, spikes=2.0)
    assert torch.allclose(qann(**batch).loss, hidden + 2.0 * seen.spikes, rtol=1e-9)
    sent = fasfx.energy(fasfx.convert(qann), [inputs(batch)]).spikes
    assert float(seen.spikes.detach()) == pytest.approx(sent, rel=0.3)  # a smooth number


def test_training_through_time_learns_what_the_ticks_say() -> None:
    """At two coarse ticks, steps through time teach the network more than the same steps in closed form."""
    two, teacher = THREE.replace(timesteps=2, levels=4), classifier(num_hidden_layers=3).double()
    found = dict[bool, float]()
    batches = [text(seed, 8) for seed in range(8)]
    for through in (False, True):
        qann = fasfx.prepare(teacher, batches, two, fasfx.Objective(0.0, teacher, hidden=0.0), through_time=through)
        descend(qann, batches * 8, torch.optim.AdamW(qann.parameter_groups(1e-3, 1e-2)))
        snn = fasfx.convert(qann)
        with torch.no_grad():
            gaps = [disagreement(snn(**inputs(batch)), teacher(**inputs(batch))) for batch in batches]
        found[through] = float(torch.stack(gaps).mean())
    assert found[True] < 0.9 * found[False]


def test_trainer_trains_through_time(tmp_path: Path) -> None:
    qann = through_time(model=classifier(), batch=text())
    before = {name: p.detach().clone() for name, p in qann.named_parameters()}
    trainer(qann, tmp_path, max_steps=2).train()
    still = [name for name, p in qann.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert torch.allclose(qann.eval()(**inputs(text())).logits, fasfx.convert(qann)(**inputs(text())).logits, rtol=1e-4)


@pytest.mark.parametrize("code", TICKING)
def test_stage_two_holds_to_what_was_trained_through_time(code: str, tmp_path: Path) -> None:
    """At its T nothing is to be tuned; with fewer ticks the teacher is what those of stage I say."""
    snn, batches = fasfx.convert(through_time(code)), [inputs(text(seed)) for seed in range(3)]
    snn.save_pretrained(tmp_path / "snn")
    snn = fasfx.SpikingModel.from_pretrained(tmp_path / "snn")
    reports: list[str] = []
    same = fasfx.tune(snn, batches, epochs=1, progress=lambda stage, *_: reports.append(stage))
    assert reports == []  # no step was taken
    assert same.tuning is not None and float(same.tuning.before.abs().max()) < 1e-20
    assert torch.equal(same(**batches[0]).logits, snn(**batches[0]).logits)
    fewer = fasfx.SpikingModel(snn.ranged)
    fewer.timesteps = 2
    found = fasfx.tune(fewer, batches, epochs=1).tuning
    assert found is not None and found.neuron.mean() < found.before.mean()


def test_a_copy_runs_its_own_program() -> None:
    qann = through_time()
    new = copy.deepcopy(qann)
    with torch.no_grad():
        new.get_parameter("classifier.weight").zero_()
    assert not torch.equal(new(**inputs(text())).logits, qann(**inputs(text())).logits)
    assert new.diagnose(**text()) != [] and qann.diagnose(**text()) == []


def test_a_sequential_network_has_no_time_to_learn_through() -> None:
    with pytest.raises(ConfigError, match='which is what trains without it; set schedule="synchronous"'):
        fasfx.prepare(classifier(), [text()], EXACT, through_time=True)


def test_functions_stay_exact_while_it_trains() -> None:
    qann = fasfx.prepare(classifier(), [text()], THREE.replace(nonlinear="spiking"), through_time=True)
    found = {n.target for n in qann._programs[1].graph.nodes}
    assert {ops.tick.op, torch.ops.aten.gelu.default} < found and not {ops.lookup.op, ops.group.op} & found
    assert fasfx.convert(qann).coverage.spike_driven_macs == 1.0
