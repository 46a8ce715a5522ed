"""What the benchmark trains and measures, once: kept by the hash of its recipe.

Of a network the recipe does not know the version of fasfx: delete the folder after a change of how networks learn.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import fasfx
from fasfx.calibration import without_cache
from fasfx.devices import device_of
from fasfx.finetuning import Training, fit
from fasfx.ranging import Progress
from fasfx.tools.bench.tasks import TASKS, Task
from fasfx.tuning import tune

CALIBRATION = 8  # batches of training rows
DISTILLATION = 2.0  # temperature
RECORD = "record.json"
HERE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")  # where the Trainer trains


class Kept(NamedTuple):
    """A network and the seconds that making it took, whenever that was."""

    model: Any
    seconds: float


def folder_of(recipe: dict[str, Any]) -> Path:
    """Where what a recipe makes is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasfx" / "trained"
    return cache / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def original(name: str, seed: int, epochs: float, lr: float) -> Kept:
    """The task's model, fine-tuned as it is."""
    task = TASKS[name]()
    training, model = Training(epochs, lr, task.size, seed), task.model(seed)
    return _weights(model, {"original": name, "how": asdict(training)}, partial(_fit, model, task, training))


def calibration(name: str, model: nn.Module) -> list[dict[str, Any]]:
    """The first batches of a task's training rows, where the model is."""
    task = TASKS[name]()
    batches = task.inputs(task.train[: CALIBRATION * task.size], device_of(model))
    return [batch | without_cache(model) for batch in batches]


def stage_one(name: str, seed: int, epochs: float, lr: float, config: fasfx.SpikeConfig, teacher: nn.Module,
              spikes: float = 0.0, of: Any = None, through_time: bool = False) -> Kept:  # fmt: skip
    """The teacher, trained on with the values that spikes will carry, distilled from itself.

    of: what made the teacher.   through_time: as of fasfx.prepare.
    """
    task = TASKS[name]()
    training = Training(epochs, lr, task.size, seed)
    aim = fasfx.Objective(teacher=teacher, temperature=DISTILLATION, spikes=spikes)
    qann = fasfx.prepare(teacher, calibration(name, teacher), config, aim, through_time=through_time)
    every = {"stage I": name, "how": asdict(training), "config": asdict(config), "of": of}
    aims = {name: getattr(aim, name) for name in ("task", "logits", "hidden", "temperature", "spikes")}
    return _weights(qann, every | {"objective": aims}, partial(_fit, qann, task, training))


def tuned(name: str, snn: fasfx.SpikingModel, stage: str, of: Any, batches: int, spikes: float = 0.0) -> Kept:
    """A spiking network after a part of stage II, at its own T."""
    task, recipe = TASKS[name](), {"stage II": of, "config": asdict(snn.spike_config), "stage": stage, "n": batches}
    folder = folder_of(recipe)
    if not (folder / "network").exists():
        record = _Record(folder, recipe)
        given = task.inputs(task.train[-batches * task.size :], device_of(snn))
        found = tune(snn, given, (stage,), spikes=spikes, folder=folder / "tuning", progress=record.report)
        found.save_pretrained(folder / "network")
        record.keep()
        shutil.rmtree(folder / "tuning")
    return Kept(fasfx.SpikingModel.from_pretrained(folder / "network").to(device_of(snn)), _kept(folder, "seconds"))


def measured(of: Any, measure: Callable[[], float]) -> tuple[float, float]:
    """A figure and the seconds it took: read where this very code has measured it before, else measured."""
    recipe = {"measured": of, "code": _code()}
    folder = folder_of(recipe)
    if not (folder / RECORD).exists():
        _Record(folder, recipe).keep(figure=measure())
    return _kept(folder, "figure"), _kept(folder, "seconds")


def _fit(model: nn.Module, task: Task, training: Training, folder: Path, progress: Progress) -> None:
    fit(model, task.train, task.collate, folder, training, progress)


def _weights(model: nn.Module, recipe: dict[str, Any], train: Callable[[Path, Progress], None]) -> Kept:
    """The model with the weights of a recipe: read where they are kept, else trained, resumed after a kill."""
    folder = folder_of(recipe)
    if not (folder / "model.safetensors").exists():
        record = _Record(folder, recipe)
        train(folder / "training", record.report)
        save_model(model, str(folder / "beside.safetensors"))
        record.keep()
        (folder / "beside.safetensors").rename(folder / "model.safetensors")
        shutil.rmtree(folder / "training")
    load_model(model, folder / "model.safetensors")
    return Kept(model.eval().to(HERE), _kept(folder, "seconds"))


class _Record:
    """A recipe and the seconds spent on it, in its folder from the first report on: a resumed run adds to them."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self._file, self._recipe = folder / RECORD, recipe
        self._start = time.perf_counter() - (_kept(folder, "seconds") if self._file.exists() else 0.0)

    def keep(self, **found: float) -> None:
        """Write them, and what was found, whole or not at all."""
        record = {"recipe": self._recipe, "seconds": time.perf_counter() - self._start, **found}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(".beside")
        beside.write_text(json.dumps(record, indent=1), encoding="utf-8")
        beside.replace(self._file)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Progress of training or tuning."""
        self.keep()
        if total is None or done == total or done % 50 == 0:
            print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)


def _kept(folder: Path, what: str) -> float:
    return float(json.loads((folder / RECORD).read_text(encoding="utf-8"))[what])


@cache
def _code() -> str:
    """Tells every version of the package's code from every other."""
    # glob.glob follows links, Path.glob does not.
    files = sorted(glob.glob(f"{Path(fasfx.__file__).parent}/**/*.py", recursive=True))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
