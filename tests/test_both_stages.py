"""What strangers found when they read both stages, and what keeps it from coming back."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import EXACT, classifier, clipped, inputs, original, text, trainer
from torch import nn

import fasfx
from fasfx import ops
from fasfx.datasets import read_labelled
from fasfx.errors import CheckpointError, ConfigError, InputError
from fasfx.resuming import FILE, Saved

aten = torch.ops.aten


def test_an_unsigned_rate_neuron_never_sends_less_than_nothing() -> None:
    u, sent = torch.tensor([-0.5]), torch.zeros(1)
    for number in range(1, 5):
        sent = ops.tick.op(u, sent, torch.tensor(number), "rate", 1, False)
    assert sent.tolist() == ops.fire.op(4 * u, torch.tensor(4.0), "rate", 4, 1, False).tolist() == [0.0]


def test_the_fas_preset_ticks_to_what_qcfs_computes() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(32, 8)
    qann = fasfx.prepare(module, [x], fasfx.SpikeConfig.fas(timesteps=64))
    assert (fasfx.convert(qann)(x) - qann(x)).norm() < 0.05 * qann(x).norm()  # 0.57


def test_initial_below_minus_half_a_threshold() -> None:
    sent, theta, initial = torch.zeros(1), torch.tensor(1.0), torch.tensor(-0.6)
    for number in range(1, 5):
        sent = ops.tick.op(torch.zeros(1) + initial / number, sent, torch.tensor(number), "rate", 1, False)
    assert float(sent / 4) == float(ops.fire.op(torch.zeros(1), theta, "rate", 4, 1, False, initial))


def test_attention_dropout_is_off_in_the_calibrated_program_and_the_teacher() -> None:
    model = classifier(attention_probs_dropout_prob=0.5)
    qann = clipped(model).train()
    qann.objective = fasfx.Objective(teacher=model)
    for program in (qann._programs[0], qann._teacher, fasfx.convert(qann).ranged):
        assert not any(n.args[2] for n in program.graph.find_nodes(op="call_function", target=aten.dropout.default))


def test_gradient_accumulation_does_not_multiply_the_objectives_terms(tmp_path: Path) -> None:
    """One batch of 4 rows, or the same 4 rows twice, accumulated: the gradients are the same."""
    found = []
    for accumulate in (1, 2):
        qann = clipped(classifier().double())
        qann.objective = fasfx.Objective(task=0.0, teacher=classifier(seed=1).double())
        whole = trainer(
            qann, tmp_path, max_steps=1, optim="sgd", learning_rate=0.1, gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0, train_sampling_strategy="sequential",
        )  # fmt: skip
        batch = text()
        four = [{n: v[i] for n, v in batch.items()} for i in range(4)]
        whole.train_dataset = four * accumulate
        before = qann.get_parameter("classifier.weight").detach().clone()
        whole.train()
        found.append(qann.get_parameter("classifier.weight").detach() - before)
    assert torch.allclose(found[0], found[1], rtol=1e-6), float(found[1].norm() / found[0].norm())  # 2.0


@pytest.mark.parametrize("content", [[1], {"x": 1}, {"recipe": "{}"}], ids=str)
def test_a_file_that_is_no_progress(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="delete it to begin anew"):
        Saved(tmp_path, {}).load()


def test_the_message_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no progress")
    with pytest.raises(CheckpointError) as caught:
        Saved(tmp_path, {}).load()
    assert len(str(caught.value).splitlines()) == 1 and "weights_only" not in str(caught.value)


def test_diagnose_without_labels_is_refused_and_changes_nothing() -> None:
    qann = clipped()
    for parameter in qann.parameters():
        parameter.grad = torch.ones_like(parameter)
    with contextlib.suppress(AttributeError), pytest.raises(InputError):
        qann.diagnose(**inputs(text()))  # AttributeError: 'NoneType' object has no attribute 'backward'
    assert not qann.training and all(p.grad is not None for p in qann.parameters())


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("a.jsonl", '{"text": "a\u2028b", "label": "x"}\n{"text": "c", "label": "y"}\n', "a\u2028b"),
        ("a.csv", 'text,label\n"a\nb",x\nc,y\n', "a\nb"),
        ("a.csv", "\ufefftext,label\na,x\nc,y\n", "a"),
        ("a.csv", f"text,label\n{'ab ' * 50_000},x\nc,y\n", "ab " * 50_000),
    ],
    ids=["line separator", "quoted newline", "byte order mark", "long field"],
)
def test_ordinary_files(name: str, content: str, first: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labelled(tmp_path / name).texts == [first, "c"]


def test_progress_of_another_network_is_not_taken_up(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(name: str, done: int, _: Any) -> None:
        if (name, done) == ("tune, layer", 4):
            raise Killed

    batches = [inputs(text(seed)) for seed in range(4)]
    one, other = (
        fasfx.convert(classifier(seed), batches, fasfx.SpikeConfig.low_latency(nonlinear="exact")) for seed in (0, 1)
    )
    with pytest.raises(Killed):
        fasfx.tune(one, batches, ("layer",), epochs=2, folder=tmp_path, progress=kill)
    with pytest.raises(CheckpointError):
        fasfx.tune(other, batches, ("layer",), epochs=2, folder=tmp_path)


def test_the_teacher_is_no_part_of_the_model() -> None:
    model = classifier()
    qann = clipped(model)
    names = set(qann.state_dict())
    qann.objective = fasfx.Objective(teacher=model)
    assert set(qann.state_dict()) == names  # 29 more, "_teacher.*": every checkpoint of Trainer holds them


def test_tune_with_dynamic_thresholds_beside_a_fixed_one() -> None:
    batches = [inputs(text(seed)) for seed in range(3)]
    config = fasfx.SpikeConfig.low_latency(nonlinear="exact", granularity="token")
    snn = fasfx.convert(classifier(), batches, config)
    with contextlib.suppress(ConfigError):  # or tune the softmax alone
        fasfx.tune(snn, batches, epochs=1)  # AttributeError: ... no attribute 'potential_dropout_unit'


def small() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16, 8)


def test_batches_may_be_tensors_everywhere() -> None:
    module, x = small()
    snn = fasfx.convert(fasfx.prepare(module, [x], EXACT.replace(schedule="synchronous")), [x])
    assert fasfx.tune(snn, [x, x], epochs=1).tuning is not None


def test_batches_may_hold_labels_where_no_loss_reads_them() -> None:
    model = classifier()
    with_labels, without = (fasfx.convert(model, [batch], EXACT) for batch in (text(), inputs(text())))
    assert torch.equal(with_labels(**inputs(text())).logits, without(**inputs(text())).logits)


def test_an_objective_needs_an_output_with_a_loss() -> None:
    module, x = small()
    qann = fasfx.prepare(module, [x], EXACT, fasfx.Objective(spikes=1.0)).train()
    with pytest.raises(InputError, match="Tensor has no loss, so there is no place for an objective"):
        qann(x)


def test_a_product_of_spikes_and_floats_is_no_spike() -> None:
    model, batch = original("llama")
    snn = fasfx.convert(model, [inputs(batch)], fasfx.SpikeConfig.fas(activation="keep"))
    table = snn.coverage.table
    (down,) = table[table.module == "model.layers.0.mlp.down_proj"].spike_driven
    assert not down  # its input is silu's spikes times the float output of up_proj


def test_every_activation_function_is_replaced_whatever_reads_it() -> None:
    model, batch = original("llama")  # a product reads silu, and the product is what enters the synapse
    qann = fasfx.prepare(model, [inputs(batch)], EXACT.replace(activation="replace"))
    program = qann._programs[1]
    assert not program.graph.find_nodes(op="call_function", target=aten.silu.default)
    assert fasfx.convert(qann)(**inputs(batch)).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("again", [False, True], ids=["as calibrated", "observed again"])
def test_a_batch_norm_between_convolutions_is_folded_after_training(again: bool) -> None:
    parts = (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1))
    model, x = nn.Sequential(*parts).double().eval(), torch.randn(16, 3, 9, dtype=torch.float64)
    qann = fasfx.prepare(model, [x], EXACT.replace(timesteps=3, levels=6))
    snn = fasfx.convert(qann, [x] if again else None)
    assert not snn.graph_module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    assert torch.allclose(snn(x), qann(x), rtol=1e-12, atol=1e-12)
