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
from torch import nn

from fasfx.calibration import without_cache
from fasfx.capture import parameters_of
from fasfx.config import SpikeConfig
from fasfx.conversion import convert
from fasfx.datasets import Example, blocks, examples, read_labelled, split
from fasfx.devices import device_of, moved
from fasfx.difference import main_output
from fasfx.errors import CheckpointError, ConfigError, RuntimeUnavailableError
from fasfx.folders import check_place
from fasfx.model import SpikingModel
from fasfx.objective import Objective
from fasfx.ranging import Progress
from fasfx.scores import accuracy, perplexity
from fasfx.text_files import read_texts
from fasfx.training import ClippedModel, prepare, require_ticks

TASKS = {"classification": "AutoModelForSequenceClassification", "language-modelling": "AutoModelForCausalLM"}
CALIBRATION = 8  # batches of training data
THRESHOLD_LR, DECAY = 0.01, 0.01
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Training:
    """How long and how fast weights are trained: epochs, learning rate, rows of a batch, seed of order and dropout."""

    epochs: float
    lr: float
    batch: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """Everything that makes one training run what it is; progress is taken up only by the same one."""

    model: str
    task: str
    data: str
    evaluation: str | None
    length: int
    distill: bool
    through_time: bool
    spikes: float
    training: Training


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
    """Stage I on a recipe's data; progress is kept in `folder`, for the caller to forget when the result is safe.

    Raises DataError for unusable data, CheckpointError for a folder that holds another run, ConfigError,
    RuntimeUnavailableError without accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeUnavailableError("transformers.Trainer needs accelerate: pip install 'fasfx[train]'")
    model, rows, held, fresh = _load(recipe, tokenizer)
    if recipe.distill and fresh:
        raise ConfigError(f"--distill needs a teacher, but weights of {recipe.model} are new: {', '.join(fresh[:3])}")
    if recipe.through_time:
        require_ticks(config)
    _claim(folder, recipe, config)
    collate = collator(tokenizer, model)
    batches = [collate(part) for part in _parts(rows, recipe.training.batch)][:CALIBRATION]
    calibration = [batch | without_cache(model) for batch in batches]
    objective = Objective(teacher=model if recipe.distill else None, spikes=recipe.spikes)
    qann = prepare(model, calibration, config, objective, progress, recipe.through_time)
    fit(qann, rows, collate, folder, recipe.training, progress)
    here = device_of(qann)  # where the Trainer took it
    warnings = qann.diagnose(**moved(batches[0], here))
    qann.eval()
    snn = convert(qann, [moved(batch, here) for batch in calibration], progress=progress)
    measured = [moved(collate(part), here) for part in _parts(held, recipe.training.batch)]
    score, of = ("accuracy", accuracy) if recipe.task == "classification" else ("perplexity", perplexity)
    return Result(snn, score, of(qann, measured), of(snn, measured), warnings)


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

    check_place(recipe.model)
    kind = getattr(transformers, TASKS[recipe.task])
    settings: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if recipe.task == "classification":
        data = read_labelled(Path(recipe.data))
        classes = _order_of(recipe.model, data.classes)
        settings |= {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
        settings |= {"label2id": {name: at for at, name in enumerate(classes)}, "ignore_mismatched_sizes": True}
    torch.manual_seed(recipe.training.seed)
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
            tokenizer, read_labelled(Path(recipe.evaluation), least=1), classes, recipe.length, names
        )
    else:
        rows = blocks(tokenizer, read_texts(Path(recipe.data)), recipe.length)
        other = recipe.evaluation and blocks(tokenizer, read_texts(Path(recipe.evaluation)), recipe.length)
        _require_causal(model, rows[0], recipe.model)
    train, held = (rows, other) if other else split(_shuffled(rows, recipe))
    return model, train, held, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})


@torch.no_grad()
def _require_causal(model: Any, row: Example, name: str) -> None:
    """Raise ConfigError if a token of a row changes what the model says before it, as in an encoder."""
    ids = torch.tensor([row["input_ids"][:8]])
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    first, second = (main_output(model(input_ids=of))[:, :-1] for of in (ids, other))
    if not torch.allclose(first, second):
        raise ConfigError(
            f"{name} reads the tokens that it is to predict: language modelling needs a causal model, not an encoder"
        )


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
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.training.seed)).tolist()
    return [rows[at] for at in order]


def collator(tokenizer: Any, model: nn.Module) -> Any:
    """Rows -> a padded batch of what the model takes, labels among it."""
    from transformers import DataCollatorWithPadding

    padded = DataCollatorWithPadding(tokenizer)
    names = {*parameters_of(model)}
    return lambda rows: {name: value for name, value in padded(rows).items() if name in names}


def _parts(rows: list[Example], size: int) -> Iterator[list[Example]]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def fit(
    model: nn.Module,
    rows: list[Example],
    collate: Any,
    folder: Path,
    training: Training,
    progress: Progress,
) -> None:
    """Train a model, or a network of stage I with its thresholds, on rows; go on where `folder` says it was."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_pt_utils import LengthGroupedSampler
    from transformers.trainer_utils import get_last_checkpoint

    class ByLength(LengthGroupedSampler):  # type: ignore[misc]
        """Batches of rows of about one length, so little padding; Trainer's own order is another one after a kill."""

        def set_epoch(self, epoch: int) -> None:
            self.generator.manual_seed(training.seed + epoch)

    class Trains(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if "input_ids" not in rows[0]:
                return super()._get_train_sampler(train_dataset)
            return ByLength(training.batch, rows, model_input_name="input_ids", generator=torch.Generator())

    class Reports(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress("train", state.global_step, state.max_steps)

    steps = math.ceil(len(rows) / training.batch) * training.epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch,
        learning_rate=training.lr,
        weight_decay=DECAY,
        warmup_steps=round(0.06 * steps),
        save_steps=max(1, min(100, round(steps / 10))),
        save_total_limit=2,
        seed=training.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_strategy="no",
    )
    optimizer = None
    if isinstance(model, ClippedModel):
        optimizer = torch.optim.AdamW(model.parameter_groups(training.lr, THRESHOLD_LR, DECAY))
    trainer = Trains(
        model,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[Reports()],
    )
    trainer.remove_callback(PrinterCallback)
    for cut_short in folder.glob("checkpoint-*"):
        if not (cut_short / TRAINER_STATE_NAME).exists():  # written last
            shutil.rmtree(cut_short)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
