"""`fasfx finetune`: stage I from the command line, with transformers.Trainer; resumed after a kill."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasfx.calibration import without_cache
from fasfx.capture import parameters_of
from fasfx.config import SpikeConfig
from fasfx.conversion import convert
from fasfx.datasets import Example, blocks, examples, read_labelled, split
from fasfx.errors import CheckpointError, ConfigError, RuntimeUnavailableError
from fasfx.folders import read_texts
from fasfx.model import SpikingModel
from fasfx.ranging import Progress
from fasfx.training import ClippedModel, Objective, prepare

TASKS = {"classification": "AutoModelForSequenceClassification", "language-modelling": "AutoModelForCausalLM"}
CALIBRATION = 8  # batches of training data
THRESHOLD_LR, DECAY = 0.01, 0.01
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that makes one training run what it is; progress is taken up only by the same one."""

    model: str
    task: str
    data: str
    evaluation: str | None
    epochs: float
    lr: float
    length: int
    batch: int
    distill: bool
    spikes: float
    seed: int


@dataclass(frozen=True)
class Result:
    """A trained network, converted, and what it reaches on data that training did not see.

    score: "accuracy" or "perplexity" of the stage I network and of the spiking one.
    """

    snn: SpikingModel
    score: str
    trained: float
    spiking: float
    warnings: list[str]


def finetune(recipe: Recipe, config: SpikeConfig, tokenizer: Any, folder: Path, progress: Progress) -> Result:
    """Stage I on a recipe's data; progress is kept in `folder` until `forget` is called.

    Raises DataError for unusable data, CheckpointError for a folder that holds another run, ConfigError,
    RuntimeUnavailableError without accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeUnavailableError("transformers.Trainer needs accelerate: pip install 'fasfx[train]'")
    model, rows, held, fresh = _load(recipe, tokenizer)
    if recipe.distill and fresh:
        raise ConfigError(f"--distill needs a teacher, but weights of {recipe.model} are new: {', '.join(fresh[:3])}")
    _claim(folder, recipe, config)
    collate = collator(tokenizer, model)
    batches = [collate(rows[at : at + recipe.batch]) for at in range(0, len(rows), recipe.batch)][:CALIBRATION]
    calibration = [batch | without_cache(model) for batch in batches]
    objective = Objective(teacher=model if recipe.distill else None, spikes=recipe.spikes)
    qann = prepare(model, calibration, config, objective, progress)
    fit(qann, rows, collate, folder, recipe, progress)
    warnings = qann.diagnose(**batches[0])
    qann.eval()
    snn = convert(qann, calibration, progress=progress)
    measured = [[*_batches(collate, held, recipe.batch)] for _ in range(2)]
    score, of = ("accuracy", accuracy) if recipe.task == "classification" else ("perplexity", perplexity)
    return Result(snn, score, of(qann, measured[0]), of(snn, measured[1]), warnings)


def forget(folder: Path) -> None:
    """Remove a run's progress, once its result is safe."""
    shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path, recipe: Recipe, config: SpikeConfig) -> None:
    """Make the folder this run's own, or find that it is."""
    wanted = json.dumps({"recipe": asdict(recipe), "config": asdict(config)}, sort_keys=True, indent=1)
    file = folder / RECIPE
    if file.exists() and file.read_text(encoding="utf-8") != wanted:
        raise CheckpointError(f"{folder} holds a run with other options: give those, or delete it to begin anew")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(wanted, encoding="utf-8")


def _load(recipe: Recipe, tokenizer: Any) -> tuple[Any, list[Example], list[Example], list[str]]:
    """(model, rows to train on, rows to measure on, names of weights that are new)."""
    import transformers

    kind = getattr(transformers, TASKS[recipe.task])
    settings: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if recipe.task == "classification":
        data = read_labelled(Path(recipe.data))
        classes = _order_of(recipe.model, data.classes)
        settings |= {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
        settings |= {"label2id": {name: at for at, name in enumerate(classes)}, "ignore_mismatched_sizes": True}
    torch.manual_seed(recipe.seed)
    try:
        model, info = kind.from_pretrained(recipe.model, **settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{recipe.model} cannot be loaded for {recipe.task}: {error}") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if recipe.task == "classification":
        names = parameters_of(model)
        rows = examples(tokenizer, data, classes, recipe.length, names)
        other = recipe.evaluation and examples(
            tokenizer, read_labelled(Path(recipe.evaluation)), classes, recipe.length, names
        )
    else:
        rows = blocks(tokenizer, read_texts(Path(recipe.data)), recipe.length)
        other = recipe.evaluation and blocks(tokenizer, read_texts(Path(recipe.evaluation)), recipe.length)
    train, held = (rows, other) if other else split(_shuffled(rows, recipe))
    return model, train, held, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})


def _order_of(model: str, classes: list[str]) -> list[str]:
    """Classes in the order of a model that knows just these, else as they are."""
    from transformers import AutoConfig

    try:
        known = list(AutoConfig.from_pretrained(model).id2label.values())
    except (OSError, ValueError):
        return classes  # what is wrong with the model is told when it is loaded
    return known if sorted(known) == sorted(classes) else classes


def _shuffled(rows: list[Example], recipe: Recipe) -> list[Example]:
    """Examples in a random order; blocks of one stream stay in theirs."""
    if recipe.task != "classification":
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return [rows[at] for at in order]


def collator(tokenizer: Any, model: nn.Module) -> Any:
    """Rows -> a padded batch of what the model takes, labels among it."""
    from transformers import DataCollatorWithPadding

    padded = DataCollatorWithPadding(tokenizer)
    names = {*parameters_of(model)}
    return lambda rows: {name: value for name, value in padded(rows).items() if name in names}


def _batches(collate: Any, rows: list[Example], size: int) -> Iterator[dict[str, Tensor]]:
    for at in range(0, len(rows), size):
        yield collate(rows[at : at + size])


def fit(
    model: nn.Module,
    rows: list[Example],
    collate: Any,
    folder: Path,
    recipe: Recipe,
    progress: Progress,
) -> None:
    """Train a model, or a network of stage I with its thresholds, on rows; go on where `folder` says it was."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Reports(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress("train", state.global_step, state.max_steps)

    steps = math.ceil(len(rows) / recipe.batch) * recipe.epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr,
        weight_decay=DECAY,
        warmup_steps=round(0.06 * steps),
        save_steps=max(1, min(100, round(steps / 10))),
        save_total_limit=2,
        seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    optimizer = None
    if isinstance(model, ClippedModel):
        optimizer = torch.optim.AdamW(model.parameter_groups(recipe.lr, THRESHOLD_LR, DECAY))
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[Reports()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Share of rows whose largest logit is their label's."""
    right = rows = 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{n: v for n, v in batch.items() if n != "labels"}).logits
        right, rows = right + int((logits.argmax(-1) == labels).sum()), rows + len(labels)
    return right / rows


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """exp of the mean negative log-likelihood per predicted token, in nats."""
    total = tokens = 0.0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**{n: v for n, v in batch.items() if n != "labels"}).logits[:, :-1]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
    return math.exp(total / tokens)
