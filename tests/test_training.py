"""Stage I: fasfx.prepare gives a network that trains like the original, and fasfx.convert what it has learned."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import Calls
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

import fasfx
from fasfx import ops
from fasfx.alignment import Recorder, disagreement, relative_errors
from fasfx.errors import CheckpointError, ConfigError, CoverageError, InputError
from fasfx.learnable import LOG_SCALE, learned_thresholds
from fasfx.passes.clip import thresholds
from fasfx.program import copy_program, facts
from fasfx.tools.bench.models import tiny, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
aten = torch.ops.aten
Batch = dict[str, Any]
CLASSES = 3
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "initializer_range": 0.15}
TEXT = LAYERS | {"vocab_size": 128, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXACT = fasfx.SpikeConfig(nonlinear="exact")
FINE = EXACT.replace(timesteps=24, levels=24)  # of the multi code: a neuron errs by theta / 2^24
WITHOUT_CACHE = {"use_cache": False}


def classifier(seed: int = 0, **fields: Any) -> BertForSequenceClassification:
    """One layer of width 16, float32, in eval mode; dropout only if asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = TEXT | {"intermediate_size": 24, "max_position_embeddings": 32, "num_labels": CLASSES}
        return BertForSequenceClassification(BertConfig(**(shape | NO_DROPOUT | fields))).eval()


def text(seed: int = 0, size: int = 4) -> Batch:
    """Token ids, a mask and labels."""
    labels = torch.randint(0, CLASSES, (size,), generator=torch.Generator().manual_seed(seed))
    return tiny_inputs("bert", size, 8, seed) | {"labels": labels}


def inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def clipped(model: nn.Module | None = None, config: fasfx.SpikeConfig = EXACT) -> fasfx.ClippedModel:
    return fasfx.prepare(model or classifier(), [text()], config)


@pytest.fixture(scope="module")
def prepared() -> fasfx.ClippedModel:
    """A classifier without dropout, float64, multi code of 4 levels and 2 steps: its neurons err visibly."""
    return clipped(classifier().double(), EXACT.replace(timesteps=2, levels=4))


@pytest.fixture
def qann(prepared: fasfx.ClippedModel) -> fasfx.ClippedModel:
    return copy.deepcopy(prepared)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if not name.endswith(LOG_SCALE)]


def scales_of(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(LOG_SCALE)]


def descend(model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer) -> list[float]:
    """One step for every batch; the losses."""
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def move_thresholds(model: fasfx.ClippedModel, by: float = 0.5) -> None:
    """As training would: every learned scale another one, none as it was."""
    with torch.no_grad():
        for scale in scales_of(model):
            scale.uniform_(-by, by)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# --- the original and its copy ---------------------------------------------------------------------------


def original(family: str) -> tuple[PreTrainedModel, Batch]:
    """(model in train mode, a batch with labels)"""
    torch.manual_seed(0)
    words = tiny_inputs("bert", 4, 8)
    spoken = words | {"labels": words["input_ids"]} | WITHOUT_CACHE
    if family == "bert":
        return classifier().train(), text()
    if family == "vit":
        shape = {"intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": CLASSES}
        pixels = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 1])}
        return ViTForImageClassification(ViTConfig(**LAYERS, **shape)).train(), pixels
    if family == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**TEXT, n_positions=32, **still)).train(), spoken
    if family == "opt":
        shape = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0}
        return OPTForCausalLM(OPTConfig(**TEXT, **shape, init_std=0.15)).train(), spoken
    shape = {"intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**TEXT, **shape)).train(), spoken


# Embeddings that are the weights of the head, too.
TIED = {
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "llama": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("family", ["bert", "vit", *TIED])
def test_a_copy_with_the_originals_names_trains_and_the_original_stays(family: str) -> None:
    model, batch = original(family)
    next(model.children()).eval()  # a mode of its own, which must survive too
    before, modes = tensors(model), [module.training for module in model.modules()]
    qann = fasfx.prepare(model, [batch], EXACT.replace(timesteps=12))
    names = {name for name, _ in model.named_parameters()}
    assert qann.training
    assert {name for name, _ in qann.named_parameters() if not name.endswith(LOG_SCALE)} == names
    assert all(torch.equal(qann.get_parameter(name), model.get_parameter(name)) for name in names)
    expected, found = model(**batch), qann(**batch)
    assert type(found) is type(expected) and list(found) == list(expected)
    assert torch.allclose(found.loss, expected.loss, rtol=1e-4)
    assert torch.allclose(found.logits, expected.logits, atol=1e-3)

    descend(qann, [batch] * 2, torch.optim.SGD(qann.parameters(), 0.1))
    assert [name for name in names if torch.equal(qann.get_parameter(name), before[name])] == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert_same(tensors(model), before)
    if family in TIED:
        (node,) = qann.ranged().graph.find_nodes(op="get_attr", target=TIED[family])
        assert {user.target for user in node.users} == {aten.embedding.default, aten.linear.default}


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_there_in_train_mode_only(field: str) -> None:
    qann, batch = clipped(classifier(**{field: 0.5})), inputs(text())
    assert not qann.training
    still = qann(**batch).logits
    for _ in range(2):
        qann.train()
        assert not torch.equal(qann(**batch).logits, qann(**batch).logits)
        torch.manual_seed(1)
        one = qann(**batch).logits
        torch.manual_seed(1)
        assert torch.equal(qann(**batch).logits, one)
        qann.eval()
        assert torch.equal(qann(**batch).logits, still)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_a_teacher_switches_dropout_off(field: str) -> None:
    original, batch = classifier(**{field: 0.5}), inputs(text())
    qann = clipped(original).train()
    qann.objective = fasfx.Objective(teacher=original)
    assert torch.equal(qann(**batch).logits, qann(**batch).logits)
    qann.objective = fasfx.Objective()
    assert not torch.equal(qann(**batch).logits, qann(**batch).logits)


# --- T -> large -------------------------------------------------------------------------------------------


def test_with_many_steps_training_is_ordinary_training() -> None:
    """Step for step in float64: losses, and how far every parameter has moved."""
    model = classifier().double()
    qann, before = clipped(model, FINE), tensors(model)
    batches = [text(seed) for seed in range(3)]
    expected = descend(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    found = descend(qann, batches, torch.optim.SGD(weights_of(qann), 0.1))
    assert found == pytest.approx(expected, rel=1e-6) and len({*expected}) == 3
    for name, parameter in model.named_parameters():
        moved = parameter - before[name]
        gap = (qann.get_parameter(name) - parameter).norm()
        assert gap < 1e-5 * moved.norm() + 1e-15, name  # the key's bias has no gradient but float rounding


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("code", list(ops.CODES))
def test_a_log_scale_learns_theta_times_the_gradient_of_theta(code: str, granularity: str) -> None:
    """(q - x) inside the range and q outside it, summed over what shares a threshold."""
    layer, x = nn.Linear(5, 3).double(), torch.randn(64, 5, dtype=torch.float64)
    config = EXACT.replace(code=code, timesteps=3, levels=5, margin=0.3, granularity=granularity)
    qann = fasfx.prepare(layer, [x], config)
    (scale,) = scales_of(qann)
    with torch.no_grad():
        scale.fill_(0.25)  # exp is not 1
    (theta,) = learned_thresholds(qann._programs[1]).values()
    (calibrated,) = thresholds(qann._programs[0]).values()
    assert torch.allclose(theta, math.exp(0.25) * calibrated, rtol=1e-12)
    weight = torch.randn(64, 3, dtype=torch.float64)
    (qann(x) * weight).sum().backward()
    q = ops.qcfs.op(x, theta, code, 3, 5, True)
    inside = x.abs() < theta
    assert 0.1 < float(inside.double().mean()) < 0.9
    wanted = ((q - torch.where(inside, x, 0.0)) * (weight @ layer.weight)).detach()
    assert scale.shape == (() if granularity == "tensor" else (5,))
    assert scale.grad is not None
    assert torch.allclose(scale.grad, wanted.sum_to_size(scale.shape), rtol=1e-12, atol=1e-12)


# --- transformers.Trainer ---------------------------------------------------------------------------------


def rows(number: int = 16) -> list[Batch]:
    """Examples with a column that no model takes."""
    batch = text(size=number) | {"row": torch.arange(number)}
    return [{name: value[at] for name, value in batch.items()} for at in range(number)]


def trainer(qann: nn.Module, folder: Path, **fields: Any) -> Trainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(folder), **(settings | quiet | fields))
    return Trainer(qann, arguments, train_dataset=rows(), eval_dataset=rows(8))


@pytest.fixture(scope="module")
def with_dropout() -> fasfx.ClippedModel:
    return clipped(classifier(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))


def test_trainer_trains_evaluates_saves_and_resumes_to_the_same_bits(
    with_dropout: fasfx.ClippedModel, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(copy.deepcopy(with_dropout), tmp_path, **saving)
    start = tensors(whole.model)
    whole.train()
    end = tensors(whole.model)
    learned = {name for name, _ in whole.model.named_parameters()}
    assert {name for name in end if not torch.equal(end[name], start[name])} == learned
    assert_same(load_file(tmp_path / "checkpoint-4" / "model.safetensors"), end)

    figures = whole.evaluate()
    whole.model.eval()
    with torch.no_grad():
        losses = [float(whole.model(**text(size=8)).loss)]
    assert figures["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert whole.predict(rows(8)).predictions.shape == (8, CLASSES)

    again = trainer(copy.deepcopy(with_dropout), tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(tensors(again.model), end)


def test_trainer_in_bfloat16(with_dropout: fasfx.ClippedModel, tmp_path: Path) -> None:
    qann, batch = copy.deepcopy(with_dropout).eval(), text()
    with torch.autocast("cpu", torch.bfloat16):
        half = qann(**batch).loss
    whole = qann(**batch).loss
    assert half != whole and torch.allclose(half.float(), whole, rtol=0.05)
    before = tensors(qann)
    trainer(qann, tmp_path, bf16=True).train()
    after = tensors(qann)
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in after.values())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in qann.named_parameters()}


# --- activation checkpointing -----------------------------------------------------------------------------


class Blocks(nn.Module):
    """Numbered layers with dropout, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 8))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def blocks() -> fasfx.ClippedModel:
    return fasfx.prepare(Blocks().double(), [torch.randn(4, 8, dtype=torch.float64)], EXACT).train()


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, Tensor], int]:
    """(gradients, bytes kept for them), dropout the same each time"""
    sizes: list[int] = []
    held = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.nbytes if t.data_ptr() not in held else 0) or t, lambda t: t
    ):
        loss = run()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(sizes)


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less(blocks: fasfx.ClippedModel) -> None:
    x = torch.randn(64, 8, dtype=torch.float64)
    expected, whole = gradients(blocks, lambda: blocks(x).square().sum())
    blocks.activation_checkpointing_enable()
    found, kept = gradients(blocks, lambda: blocks(x).square().sum())
    blocks.activation_checkpointing_disable()
    assert found.keys() == expected.keys() == {name for name, _ in blocks.named_parameters()}
    for name, wanted in expected.items():
        assert torch.allclose(found[name], wanted, rtol=1e-10, atol=1e-10), name
    assert kept < whole / 3
    assert gradients(blocks, lambda: blocks(x).square().sum())[1] == whole


def test_checkpointed_layers_take_the_mode_and_dtype_of_the_model(blocks: fasfx.ClippedModel) -> None:
    qann, x = copy.deepcopy(blocks), torch.randn(8, 8, dtype=torch.float64)
    plain = copy.deepcopy(blocks).eval()(x)
    qann.activation_checkpointing_enable()
    assert not torch.equal(qann(x), qann(x))
    qann.eval()
    assert torch.equal(qann(x), plain) and torch.equal(qann(x), plain)
    qann.train()
    assert not torch.equal(qann(x), qann(x))


def test_trainer_with_activation_checkpointing(with_dropout: fasfx.ClippedModel, tmp_path: Path) -> None:
    whole, again = copy.deepcopy(with_dropout), copy.deepcopy(with_dropout)
    trainer(whole, tmp_path).train()
    trainer(again, tmp_path, activation_checkpointing=True).train()
    assert again._recompute and not whole._recompute
    for name, wanted in whole.state_dict().items():
        assert torch.allclose(again.state_dict()[name], wanted, rtol=1e-4, atol=1e-5), name


def test_options_of_activation_checkpointing_are_refused(qann: fasfx.ClippedModel) -> None:
    for options in ({"every_n_layers": 2}, {"offload": True}, {"activation_checkpointing_kwargs": {"a": 1}}):
        with pytest.raises(ConfigError, match="no options"):
            qann.activation_checkpointing_enable(**options)  # type: ignore[arg-type]


# --- two processes ----------------------------------------------------------------------------------------

ALIKE = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from test_training import ALIKE, classifier, clipped, trainer

rank = PartialState(cpu=True).process_index
qann = clipped(classifier(seed=rank).double())  # the second one's weights give way to the first one's
whole = trainer(qann, {folder!r}, per_device_train_batch_size=4, **ALIKE)
whole.train()
torch.save((whole.args.world_size, whole.model.state_dict()), os.path.join({folder!r}, f"rank{{rank}}.pt"))
"""


def in_two_processes(tmp_path: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """The script under `accelerate launch`, with gloo: (world size, weights) of both processes.

    Without an MPI, accelerate starts processes on a machine only as "--multi_gpu"; the script asks for the CPU.
    """
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *plain, str(script)]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    (size, first), (_, second) = in_two_processes(tmp_path)
    assert size == 2
    assert_same(second, first)
    alone = trainer(clipped(classifier().double()), tmp_path, per_device_train_batch_size=8, **ALIKE)
    start = tensors(alone.model)
    alone.train()
    for name, wanted in alone.model.state_dict().items():
        assert torch.allclose(first[name], wanted, rtol=1e-9, atol=1e-9), name
    assert not torch.allclose(start["classifier.weight"], first["classifier.weight"], atol=1e-3)


# --- the objective ----------------------------------------------------------------------------------------


def recorded(gm: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """(what every site transmits, logits)"""
    recorder = Recorder(gm)
    logits = recorder.run(*inputs(batch).values()).logits
    return recorder.values, logits


def test_the_loss_is_the_sum_of_the_objectives_terms(qann: fasfx.ClippedModel) -> None:
    batch, teacher, temperature = text(), classifier(seed=1).double(), 2.0
    qann.eval()
    alone = qann(**batch).loss
    aim = fasfx.Objective(0.5, teacher, logits=2.0, hidden=3.0, temperature=temperature, spikes=0.25)
    qann.objective = aim
    assert torch.equal(qann(**batch).loss, alone)  # in eval mode the task's loss, as Trainer reports it
    qann.train()
    total, without_labels = qann(**batch).loss, qann(**inputs(batch)).loss

    values, logits = recorded(qann._programs[1], batch)
    wanted, answer = recorded(qann._teacher, batch)
    assert torch.allclose(answer, teacher(**inputs(batch)).logits, rtol=1e-12)
    assert torch.equal(logits, qann(**batch).logits)
    assert values.keys() == wanted.keys() == facts(qann._programs[0]).sites.keys()
    task = -logits.log_softmax(-1)[range(4), batch["labels"]].mean()
    of, to = (logits / temperature).log_softmax(-1), (answer / temperature).log_softmax(-1)
    kl = (to.exp() * (to - of)).sum(-1).mean() * temperature**2
    hidden = sum((values[n] - wanted[n]).norm() ** 2 / wanted[n].norm() ** 2 for n in wanted) / len(wanted)
    counter = Recorder(qann._programs[1], spikes=True)
    counter.run(*inputs(batch).values())
    spikes = counter.per_value
    assert torch.allclose(task, alone, rtol=1e-12)
    terms = 2 * kl + 3 * hidden + 0.25 * spikes
    assert all(float(term.detach()) > 0.01 for term in (task, kl, hidden, spikes))
    assert torch.allclose(total, 0.5 * task + terms, rtol=1e-6)  # the divergence is in float32
    assert torch.allclose(without_labels, terms, rtol=1e-6)


class Detaching(nn.Module):
    """A layer behind a detach, and one that has its gradient past it; a weight that one branch only reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        z = F.linear(y.detach(), self.b.weight) + F.linear(y, self.b.weight.detach(), self.b.bias)
        return self.c(torch.tanh(z) * ids.unsqueeze(-1).detach() + torch.tensor(1.0))


@pytest.mark.parametrize("through", [False, True])
def test_what_a_model_detaches_stays_detached(through: bool) -> None:
    """As fine as FINE, so the gradients are the original's; what comes of it is deployed without."""
    torch.manual_seed(0)
    model, batch = Detaching().double(), {"x": torch.randn(6, 4).double(), "ids": torch.ones(6, dtype=torch.int64)}
    schedule = "synchronous" if through else "sequential"
    config = FINE.replace(schedule=schedule, timesteps=12 if through else 24)
    qann = fasfx.prepare(model, [batch], config, through_time=through)
    for network in (model, qann):
        network(**batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(qann.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6), name
    assert all(p.grad.any() for name, p in qann.named_parameters() if name.endswith(LOG_SCALE))
    snn, plain = fasfx.convert(qann), fasfx.convert(model, [batch], config)
    assert facts(snn.ranged).sites.keys() == facts(plain.ranged).sites.keys()
    assert aten.detach.default not in {node.target for node in snn.ranged.graph.nodes}
    assert torch.allclose(snn(**batch), model(**batch), rtol=1e-4)


def test_a_site_behind_a_detach_is_that_of_its_value_when_training_is_over() -> None:
    """tanh reads the detached value too, so spikes cannot pass it unchanged: two sites, or one of another name."""

    def call(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.detach()
        return m.b(z) + torch.tanh(z) + (m.b(y) if m.both else 0)

    for both in (False, True):
        torch.manual_seed(0)
        model, batch = Calls(call, a=nn.Linear(4, 8), b=nn.Linear(8, 8)).double(), {"x": torch.randn(6, 4).double()}
        model.both = both
        qann = fasfx.prepare(model, [batch], FINE)
        snn, plain = fasfx.convert(qann), fasfx.convert(model, [batch], FINE)
        assert facts(qann._programs[0]).sites.keys() > facts(plain.ranged).sites.keys() or not both
        assert facts(snn.ranged).sites.keys() == facts(plain.ranged).sites.keys()
        assert torch.allclose(snn(**batch), plain(**batch), rtol=1e-5)


@pytest.mark.parametrize(("through", "population"), [(False, 1), (True, 1), (True, 2)])
def test_spikes_are_counted_per_value(through: bool, population: int) -> None:
    """Two values of one spike each, a power of two; silent ones behind them, as many as the layer is wide."""
    config = EXACT.replace(timesteps=2 if through else 1, population=population, schedule="synchronous")
    for wide in (8, 18):
        silent = nn.Linear(2, wide)
        nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
        model, batch = nn.Sequential(silent, nn.ReLU(), nn.Linear(wide, 1)), {"input": torch.ones(3, 2)}
        qann = fasfx.prepare(model, [batch], config, through_time=through)
        spikes = qann._seen(batch, spikes=True).spikes
        assert spikes.item() == pytest.approx(2 / (2 + wide), rel=1e-3)
        assert fasfx.energy(fasfx.convert(qann), [batch]).spikes == pytest.approx(2 / (2 + wide))


def test_many_spikes_of_a_network_in_half_precision_are_a_number() -> None:
    model, batch = nn.Linear(64, 512).half(), {"input": torch.ones(2048, 64, dtype=torch.float16)}
    qann = fasfx.prepare(model, [batch], EXACT.replace(code="rate", timesteps=8))
    assert qann._seen(batch, spikes=True).spikes.item() == pytest.approx(4, rel=0.1)  # margin 2


def test_disagreement_counts_positions_of_the_mask_only() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    of, to = student.log_softmax(-1), teacher.log_softmax(-1)
    every = (to.exp() * (to - of)).sum(-1)
    assert torch.allclose(disagreement(student, teacher, mask), every[mask.bool()].mean())
    assert torch.allclose(disagreement(student, teacher), every.mean())
    assert torch.allclose(disagreement(student, teacher, mask[0]), every.mean())  # no mask of these positions
    assert float(disagreement(teacher, teacher, mask)) == 0


def test_hidden_values_are_no_logits() -> None:
    """An encoder's features have no distribution: they are compared as values, at positions of the mask only."""
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    gap, size = (student - teacher)[mask.bool()].norm() ** 2, teacher[mask.bool()].norm() ** 2
    outputs = BaseModelOutput(last_hidden_state=student), BaseModelOutput(last_hidden_state=teacher)
    assert torch.allclose(disagreement(*outputs, mask), gap / size)
    logits = MaskedLMOutput(logits=student), MaskedLMOutput(logits=teacher)
    assert torch.equal(disagreement(*logits, mask), disagreement(student, teacher, mask))


def test_an_error_of_one_is_nothing_arrived() -> None:
    teacher = {"a": torch.randn(4, 3), "b": torch.zeros(2)}
    found = relative_errors({"a": torch.zeros(4, 3), "b": torch.zeros(2)}, teacher)
    assert [float(x) for x in found.values()] == [1.0, 0.0]


def test_the_teacher_is_asked_and_never_changed(qann: fasfx.ClippedModel) -> None:
    teacher = classifier(seed=1).double().train()
    before = tensors(teacher)
    qann.objective = fasfx.Objective(teacher=teacher)
    first, *_, last = descend(qann, [text()] * 20, torch.optim.Adam(qann.parameters(), 1e-2))
    assert last < first / 2
    assert teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert_same(tensors(teacher), before)


WRONG_TEACHERS = {
    "wider": ({"intermediate_size": 32}, r"intermediate\.dense\.weight of shape \[24, 16\]: its shape is \[32, 16\]"),
    "another kind": (None, r"BertModel has no parameter bert\.embeddings\.word_embeddings\.weight.*it has none"),
}


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_a_teacher_of_another_kind_is_refused(case: str, qann: fasfx.ClippedModel) -> None:
    fields, words = WRONG_TEACHERS[case]
    teacher = tiny("bert") if fields is None else classifier(**fields)
    before = qann.objective
    with pytest.raises(ConfigError, match=words):
        qann.objective = fasfx.Objective(teacher=teacher.double())
    assert qann.objective is before
    qann.train()
    assert qann(**text()).loss.isfinite()


def test_a_weight_on_spikes_makes_fewer_of_them(prepared: fasfx.ClippedModel) -> None:
    def spikes(weight: float) -> float:
        qann = copy.deepcopy(prepared)
        qann.objective = fasfx.Objective(spikes=weight)
        descend(qann, [text()] * 20, torch.optim.Adam(qann.parameters(), 1e-2))
        counted = fasfx.convert(qann).count_spikes(**inputs(text()))
        return float(counted[[1, 2]].sum(axis=1).mean())

    assert spikes(1.0) < 0.8 * spikes(0.0)


def test_activation_checkpointing_does_not_go_with_terms_of_inner_values(qann: fasfx.ClippedModel) -> None:
    qann.activation_checkpointing_enable()
    qann.objective = fasfx.Objective(spikes=1.0)
    assert qann.eval()(**text()).loss.isfinite()
    with pytest.raises(ConfigError, match="activation checkpointing does not go with a teacher or a weight on spikes"):
        qann.train()(**text())


# --- convert ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", list(ops.CODES))
def test_the_spiking_network_computes_what_was_trained(code: str, prepared: fasfx.ClippedModel, tmp_path: Path) -> None:
    ranged, batch = copy_program(prepared._programs[0]), inputs(text())
    facts(ranged).config = facts(ranged).config.replace(code=code)
    qann = fasfx.ClippedModel(ranged, classifier())
    before = qann(**batch).logits
    move_thresholds(qann)
    expected = qann(**batch).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    snn = fasfx.convert(qann)
    assert torch.allclose(snn(**batch).logits, expected, rtol=1e-12, atol=1e-12)

    learned = learned_thresholds(qann._programs[1])
    snn.save_pretrained(tmp_path)
    again = fasfx.SpikingModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, snn(**batch).logits)
    for network in (snn, again):
        network.timesteps = 5
        assert_same(thresholds(network.ranged), learned)
        assert facts(network.ranged).trained == 2


def test_what_was_converted_does_not_train_on(qann: fasfx.ClippedModel) -> None:
    snn, batch = fasfx.convert(qann), inputs(text())
    before, held = snn(**batch).logits, tensors(snn.ranged)
    descend(qann, [text()], torch.optim.SGD(qann.parameters(), 0.1))
    qann.eval()
    assert not torch.allclose(qann(**batch).logits, before, atol=1e-3)
    assert torch.equal(snn(**batch).logits, before)
    snn.timesteps = 3  # rebuilt from the program it keeps
    snn.timesteps = 2
    assert torch.equal(snn(**batch).logits, before)
    assert_same(tensors(snn.ranged), held)


def test_a_trained_network_keeps_its_configuration(qann: fasfx.ClippedModel) -> None:
    config = facts(qann._programs[0]).config
    assert fasfx.convert(qann, config=config).spike_config == config
    with pytest.raises(ConfigError, match="keeps the configuration it was prepared with"):
        fasfx.convert(qann, config=config.replace(timesteps=3))


def test_batches_after_training_replace_the_ranges_and_not_the_thresholds(qann: fasfx.ClippedModel) -> None:
    descend(qann, [text()], torch.optim.SGD(qann.parameters(), 0.5))
    batches = [text(seed) for seed in (3, 4)]
    model = classifier().double()
    model.load_state_dict({n: v for n, v in qann.state_dict().items() if n in model.state_dict()}, strict=False)
    fresh = facts(fasfx.convert(model, [inputs(b) for b in batches], facts(qann._programs[0]).config).ranged).sites
    stale = facts(fasfx.convert(qann).ranged).sites
    snn = fasfx.convert(qann, batches)
    found = facts(snn.ranged).sites
    assert [site.module for site in found.values()] == [site.module for site in fresh.values()]
    peaks = [(a.peak, b.peak, c.peak) for a, b, c in zip(found.values(), fresh.values(), stale.values(), strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b, _ in peaks)
    assert all(
        not torch.allclose(a, c, rtol=1e-3)
        for (a, _, c), s in zip(peaks, found.values(), strict=True)
        if s.fixed is None
    )
    assert_same(thresholds(snn.ranged), learned_thresholds(qann._programs[1]))


FUNCTION = {"bert": aten.gelu.default, "gpt2": aten.gelu.default, "llama": aten.silu.default}
READER = {"bert": "bert.encoder.layer.0.output.dense", "gpt2": "transformer.h.0.mlp.c_proj"}


@pytest.mark.parametrize(
    ("family", "activation"),
    [("bert", "keep"), ("gpt2", "keep"), ("gpt2", "replace"), ("llama", "keep"), ("llama", "replace")],
)
def test_coverage_of_activation_functions(family: str, activation: str) -> None:
    """Each is one site, also behind the views of GPT-2's layers; nothing else is one."""
    model, batch = original(family)
    qann = fasfx.prepare(model, [batch], fasfx.SpikeConfig.fas(timesteps=4, activation=activation))
    snn = fasfx.convert(qann)
    (site,) = facts(snn.ranged).sites.values()
    assert len(scales_of(qann)) == 1 and site.signed == (activation == "keep")
    found = [
        len(gm.graph.find_nodes(op="call_function", target=FUNCTION[family])) for gm in (snn.ranged, snn.graph_module)
    ]
    assert found == [1, 1 if activation == "keep" else 0]
    assert site.channel == (-1,) and thresholds(snn.ranged)[site.name].unique().numel() > 1  # a gate's too
    if family in READER:  # llama's gate multiplies the spikes by a float value first
        table = snn.coverage.table
        assert list(table[(table.kind == "synapse") & table.spike_driven].module) == [READER[family]]


def test_strict_refuses_what_sends_activation_functions_only() -> None:
    with pytest.raises(CoverageError, match="self.query: operand 0 carries float values"):
        fasfx.convert(classifier(), [inputs(text())], fasfx.SpikeConfig.fas(activation="keep", strict=True))


# --- what cannot be, and what is noticed ------------------------------------------------------------------


def test_labels_of_a_model_whose_loss_is_its_own_are_refused() -> None:
    model = BertForMultipleChoice(classifier().config).eval()
    batch = {"input_ids": torch.randint(3, 128, (3, 2, 6)), "attention_mask": torch.ones(3, 2, 6, dtype=torch.long)}
    qann = fasfx.prepare(model, [batch], EXACT)
    assert qann(**batch).logits.shape == (3, 2)
    with pytest.raises(InputError, match="labels given, but the loss of this model"):
        qann(**batch, labels=torch.tensor([0, 1, 0]))


def test_diagnose_names_what_does_not_learn(qann: fasfx.ClippedModel) -> None:
    qann.train()
    assert [words for words in qann.diagnose(**text()) if "key.bias" not in words] == []
    layer = "bert.encoder.layer.0"
    with torch.no_grad():
        qann.get_parameter(f"{layer}.intermediate.dense.weight").zero_()
        qann.get_parameter(f"{layer}.intermediate.dense.bias").zero_()
    for parameter in qann.parameters():
        parameter.grad = torch.rand_like(parameter)
    given = {name: p.grad for name, p in qann.named_parameters()}
    found = [words for words in qann.diagnose(**text()) if "key.bias" not in words]
    assert found == [
        "site gelu transmits nothing",
        "the gradient of theta_layer_norm_1_log_scale is zero",
        "the gradient of theta_gelu_log_scale is zero",
        f"the gradient of {layer}.output.dense.weight is zero",
    ]
    assert qann.training and all(p.grad is given[name] for name, p in qann.named_parameters())
    qann.eval()
    qann.diagnose(**text())
    assert not qann.training
    qann.get_parameter("classifier.bias").requires_grad_(False)
    assert not any("classifier.bias" in words for words in qann.diagnose(**text()))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(x))).mean(-1))


def test_batch_norms_keep_their_statistics_and_are_folded_at_the_end() -> None:
    model, x = Normed().double().train(), torch.randn(16, 3, 9, dtype=torch.float64)
    qann, target = fasfx.prepare(model, [x], EXACT.replace(timesteps=3, levels=6)), torch.randn(16, 2).double()
    statistics = {name: value for name, value in tensors(qann).items() if "running" in name}
    assert {name for name, _ in model.named_parameters()} <= {name for name, _ in qann.named_parameters()}
    optimizer, losses = torch.optim.Adam(qann.parameters(), 0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (qann(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = tensors(qann)
    assert len(statistics) == 2 and all(torch.equal(after[name], value) for name, value in statistics.items())
    assert int(model.norm.num_batches_tracked) == 0
    snn = fasfx.convert(qann)
    assert not snn.graph_module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    assert torch.allclose(snn(x), qann(x), rtol=1e-12, atol=1e-12)


# --- copies -----------------------------------------------------------------------------------------------


def test_a_copy_computes_from_its_own_tensors(with_dropout: fasfx.ClippedModel) -> None:
    again, batch = copy.deepcopy(with_dropout).eval(), inputs(text())
    before, kept = again(**batch).logits, tensors(with_dropout)
    again.load_state_dict({name: 2 * value for name, value in kept.items()})
    for name, value in again.named_buffers():
        assert value is again._programs[1].get_buffer(name) and torch.equal(value, 2 * kept[name])
    assert not torch.allclose(again(**batch).logits, before, atol=1e-3)
    assert_same(tensors(with_dropout), kept)
    assert type(again) is type(with_dropout) and again.config.num_labels == CLASSES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_is_refused_before_anything_changes(dtype: torch.dtype, with_dropout: fasfx.ClippedModel) -> None:
    again = copy.deepcopy(with_dropout)
    before = tensors(again)
    with pytest.raises(ConfigError, match=f"captured in torch.float32 and cannot become {dtype}: prepare model.to"):
        again.to(dtype)
    assert_same(tensors(again), before)
    assert torch.equal(again.to("cpu").eval()(**text()).loss, with_dropout.eval()(**text()).loss)


def test_pickling_is_refused_and_says_what_to_save(qann: fasfx.ClippedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be pickled: save its state_dict\(\).*save_pretrained"):
        torch.save(qann, tmp_path / "model.pt")
    move_thresholds(qann)
    torch.save(qann.state_dict(), tmp_path / "weights.pt")
    again = clipped(classifier(seed=1).double(), EXACT.replace(timesteps=2, levels=4))
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(**text()).loss, qann(**text()).loss)


def test_data_parallel_runs_on_one_device_and_refuses_to_copy(qann: fasfx.ClippedModel) -> None:
    parallel = nn.DataParallel(qann)
    assert torch.equal(parallel(**text()).loss, qann(**text()).loss)
    with pytest.raises(ConfigError, match="one process per GPU with `accelerate launch`"):
        qann._replicate_for_data_parallel()


# --- optimizer groups -------------------------------------------------------------------------------------


def test_parameter_groups_hold_every_parameter_once(qann: fasfx.ClippedModel) -> None:
    frozen = qann.get_parameter("classifier.bias").requires_grad_(False)
    groups = qann.parameter_groups(1e-3, threshold_lr=1e-2, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in qann.parameters() if p is not frozen)
    decaying, plain, learned = groups
    assert {id(p) for p in learned["params"]} == {id(p) for p in scales_of(qann)}
    assert (learned["lr"], learned["weight_decay"]) == (1e-2, 0.0)
    assert (decaying["lr"], decaying["weight_decay"]) == (1e-3, 0.1) and all(p.dim() > 1 for p in decaying["params"])
    assert (plain["lr"], plain["weight_decay"]) == (1e-3, 0.0) and all(p.dim() <= 1 for p in plain["params"])


def test_thresholds_stay_positive_whatever_their_learning_rate(qann: fasfx.ClippedModel) -> None:
    start = learned_thresholds(qann._programs[1])
    descend(qann, [text()] * 3, torch.optim.Adam(qann.parameter_groups(1e-3, threshold_lr=10.0)))
    end = learned_thresholds(qann._programs[1])
    assert all(bool((end[site] > 0).all()) for site in end)
    assert min(float((end[site] / start[site]).min()) for site in end) < 1e-3  # a step of theta itself had crossed 0


# --- read by a stranger --------------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """Stochastic depth: in train mode a layer is left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else x + self.layer(x)


def test_what_is_random_and_no_dropout_is_left_out_with_a_warning() -> None:
    model, x = nn.Sequential(Sometimes(), nn.Dropout(0.5), nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="trains without what 0 do at random"):
        qann = fasfx.prepare(model, [x], EXACT)
    assert torch.equal(qann(x), qann(x))
    assert not torch.equal(qann.train()(x), qann(x))  # dropout is still there


def test_a_regression_learns_from_its_teacher() -> None:
    student, teacher = (classifier(seed, num_labels=1) for seed in (0, 1))
    aim = fasfx.Objective(teacher=teacher, logits=1.0, hidden=0.0)
    qann = fasfx.prepare(student, [inputs(text())], EXACT, aim).train()
    wanted = teacher(**inputs(text())).logits
    found = qann(**inputs(text()))
    error = (found.logits - wanted).square().sum() / wanted.square().sum()
    assert float(found.loss) == pytest.approx(float(error), rel=1e-4) and float(error) > 0


def test_a_teacher_of_the_same_shapes_but_other_heads_is_refused(qann: fasfx.ClippedModel) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=1 instead of 2"):
        qann.objective = fasfx.Objective(teacher=classifier(num_attention_heads=1).double())


def test_diagnose_without_labels_says_so_and_keeps_gradients(qann: fasfx.ClippedModel) -> None:
    qann(**text()).loss.backward()
    before = qann.get_parameter("classifier.weight").grad
    with pytest.raises(InputError, match="nothing to learn from: the batch has no labels"):
        qann.diagnose(**inputs(text()))
    assert qann.get_parameter("classifier.weight").grad is before


def test_trainer_smooths_and_shifts_labels_as_for_the_original(tmp_path: Path) -> None:
    model = tiny("llama")
    batch = tiny_inputs("llama") | {"labels": tiny_inputs("llama")["input_ids"]}
    fine = fasfx.prepare(model.double(), [inputs(batch) | WITHOUT_CACHE], FINE)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    losses = [float(Trainer(one, arguments).compute_loss(one.eval(), dict(batch))) for one in (model, fine)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_data_after_training_moves_ranges_and_nothing_else() -> None:
    """An int8 network that would get thresholds per row, moments and lifts if it were observed afresh."""
    model, batches = tiny("llama"), [tiny_inputs("llama", seed=seed) | {"use_cache": False} for seed in range(2)]
    qann = fasfx.prepare(model, batches[:1], fasfx.SpikeConfig.integer())
    plain, again = fasfx.convert(qann), fasfx.convert(qann, batches[1:])
    for name, site in facts(again.ranged).sites.items():
        before = facts(plain.ranged).sites[name]
        assert (site.dynamic, site.lift, site.moment) == (before.dynamic, before.lift, before.moment)
        assert site.theta is None or torch.equal(site.theta, before.theta)
    assert any(
        not torch.equal(site.peak, facts(plain.ranged).sites[name].peak)
        for name, site in facts(again.ranged).sites.items()
        if site.peak is not None
    )
