"""Stage II of FAS: thresholds and initial potentials of a synchronous network, per layer and then per channel.

Source: FAS, arXiv 2502.04405, stage II (coarse-to-fine calibration).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fasfx.calibration import as_batch
from fasfx.errors import CalibrationError, ConfigError
from fasfx.inputs import bind
from fasfx.learnable import Shapes, per_channel, per_layer
from fasfx.model import SpikingModel
from fasfx.passes.clip import thresholds
from fasfx.program import facts
from fasfx.ranging import Progress
from fasfx.resuming import Saved
from fasfx.student import Student
from fasfx.teaching import Lessons, Tensors

STAGES: dict[str, Callable[[GraphModule], Shapes]] = {"layer": per_layer, "neuron": per_channel}
HELD_OUT = 0.2  # share of the batches that gradients do not see
PATIENCE = 3  # epochs without progress on the held-out batches in a row
SLOWER = 0.3  # what an epoch without progress makes of the steps
LR = 0.01  # Adam's step of the logarithm of a threshold
LR_POTENTIAL = 0.02  # Adam's step of an initial potential, in units of the root of its site's mean squared error
LEAST = (0.0, 0.1, 0.3)  # how much a threshold must lower its site's own error to be changed in closed form
SETTLED = 1e-12  # of the loss: a network that differs from its teachers by float rounding has nothing to learn
SHARES = (1.0, 0.5, 0.25)  # of the mean error that the closed form may take up; errors add up along the network


def tune(
    snn: SpikingModel,
    batches: Iterable[Any],
    stages: Sequence[str] = ("layer", "neuron"),
    teacher: nn.Module | None = None,
    logits: float = 1.0,
    spikes: float = 0.0,
    epochs: int = 5,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> SpikingModel:
    """Calibrate a synchronous spiking network at its own T; the one given is unchanged.

    Memory grows with T where spikes are averaged (rate) or `spikes` counts them, unless
    `snn.gradient_checkpointing_enable()` was called.

    batches:  at least two batches of model inputs, without labels. The last fifth is held out from gradients and
              decides which state is kept.
    stages:   "layer": one threshold and one initial potential for every site; "neuron": for every channel of one.
              Each begins with what the one before found, and with the potentials that match means in closed form.
    teacher:  whose logits are the second teacher, such as the original model; None: the first teacher's own.
    logits:   weight of KL(teacher || network) of the logits, nats per position; of an output without logits, of the
              relative squared error of its main tensor.
    spikes:   weight of spikes per value, of all sites together as fasfx.energy counts them: asks for fewer.
    epochs:   at most; a stage ends earlier when the held-out loss has not fallen for PATIENCE epochs, and at once where
              it is 0 but for rounding.
    folder:   where progress is kept after the closed forms and every epoch; a second call with it goes on where the
              first one ended. Remove it when the result is safe.
    Loss:     mean over sites of |x_T - q|^2 / |q|^2, plus the terms above. x_T is the running estimate after tick T;
              q what the site transmits in the network that stage I trained, at the larger of its T and this one: in
              closed form, or after the ticks it was trained through; or the original's value where nothing was trained.
              Gradients as in fasfx.prepare(through_time=True); the held-out alignment never ends higher than it began,
              unless `spikes` asks for that.
    Returns a network whose `.tuning` has every site's error before and after each stage.
    Raises ConfigError for a sequential network or an unknown stage, CalibrationError for fewer than two batches.
    """
    _check(snn, stages)
    ranged = snn.ranged
    given = [bind(ranged, (), as_batch(snn, batch)) for batch in batches]
    if len(given) < 2:
        raise CalibrationError(f"{len(given)} batches: tuning needs two at least, one of them held out")
    held = max(1, round(HELD_OUT * len(given)))
    work = {"of": _fingerprint(ranged, given), "config": repr(snn.spike_config), "stages": [*stages]}
    saved = Saved(folder, work | {"logits": logits, "spikes": spikes})
    parts = Lessons(ranged, teacher, given[:-held]), Lessons(ranged, teacher, given[-held:])
    errors: dict[str, Tensors] = {}
    for stage in stages:
        student = Student(ranged, STAGES[stage], logits, spikes, snn.recompute)
        if not errors:
            errors["before"] = student.errors(parts[1])
        _Stage(student, stage, parts, saved, progress).run(epochs)
        errors[stage] = student.errors(parts[1])
        ranged = student.result(ranged)
    facts(ranged).tuned, facts(ranged).tuning = snn.timesteps, _rows(ranged, errors)
    return SpikingModel(ranged, snn.config)


def _fingerprint(ranged: GraphModule, given: list[Tensors]) -> str:
    """Tells networks and batches apart: a hash of all thresholds, and of all inputs."""
    found = hashlib.sha256()
    for value in [*thresholds(ranged).values(), *(value for inputs in given for value in inputs.values())]:
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _check(snn: SpikingModel, stages: Sequence[str]) -> None:
    if snn.schedule != "synchronous":
        raise ConfigError(
            "a sequential network has no temporal error to tune away: each neuron sees its final input; "
            'set model.schedule = "synchronous"'
        )
    if not stages or not set(stages) <= set(STAGES):
        raise ConfigError(f"stages={tuple(stages)!r}: choose one or more of {', '.join(map(repr, STAGES))}")


class _Stage:
    """One stage: the closed form, then gradients until the held-out loss stops falling; the best state stays."""

    def __init__(
        self,
        student: Student,
        name: str,
        parts: tuple[Lessons, Lessons],
        saved: Saved,
        progress: Progress | None,
    ) -> None:
        self._student, self._name, self._saved = student, name, saved
        self._seen, self._held = parts
        self._report = progress or (lambda stage, done, total: None)
        self._best, self._first = (math.inf, math.inf), math.inf
        student.set_units(self._seen)
        self._state = student.state()
        self._adam = torch.optim.Adam(
            [{"params": student.scales, "lr": LR}, {"params": student.shares, "lr": LR_POTENTIAL}]
        )

    def run(self, epochs: int) -> None:
        """Leaves the student in the best state found."""
        every = self._saved.load()
        kept = every.get(self._name)
        if kept is None:
            self._begin()
            epoch, waiting = 0, 0
            self._save(every, epoch, waiting)
        else:
            self._first, self._best, self._state = kept["first"], tuple(kept["best"]), kept["state"]
            self._student.load(self._state)
            self._adam.load_state_dict(kept["adam"])
            epoch, waiting = kept["epoch"], kept["waiting"]
        while epoch < epochs and waiting < PATIENCE and self._best[0] > SETTLED:
            self._epoch(epoch, epochs)
            epoch, waiting = epoch + 1, 0 if self._keep() else waiting + 1
            if waiting:  # back to the best state, with smaller steps
                self._student.load(self._state)
                for group in self._adam.param_groups:
                    group["lr"] *= SLOWER
            self._save(every, epoch, waiting)

    def _save(self, every: dict[str, Any], epoch: int, waiting: int) -> None:
        """Keep where this stage is, beside the others."""
        now = {"first": self._first, "best": self._best, "state": self._state, "adam": self._adam.state_dict()}
        self._saved.save(every | {self._name: now | {"epoch": epoch, "waiting": waiting}})

    def _begin(self) -> None:
        """Measure, then thresholds and means in closed form, as far as they help."""
        self._keep()
        _, self._first = self._best
        if self._best[0] <= SETTLED:
            return
        self._try("thresholds", partial(self._student.rescale, self._student.search(self._seen)), LEAST)
        self._try("means", partial(self._student.match_means, self._student.means(self._seen)), SHARES)

    def _try(self, what: str, change: Callable[[float], None], strengths: Sequence[float]) -> None:
        """The first strength of a change that helps; none if none does."""
        start = self._state
        for number, strength in enumerate(strengths, 1):
            self._student.load(start)
            change(strength)
            self._report(f"{what}, {self._name}", number, len(strengths))
            if self._keep():
                break
        self._student.load(self._state)

    def _epoch(self, epoch: int, epochs: int) -> None:
        for number, batch in enumerate(self._seen, 1):
            self._adam.zero_grad()
            loss, _ = self._student.loss(batch)
            loss.backward()
            self._adam.step()
            self._report(f"tune, {self._name}", epoch * len(self._seen) + number, epochs * len(self._seen))

    def _keep(self) -> bool:
        """Keep the student's state if it is the best so far; the alignment must not end above where it began."""
        loss, alignment = self._student.measure(self._held)
        better = loss < self._best[0] and (alignment <= self._first or self._student.sparse)
        if better:
            self._best, self._state = (loss, alignment), self._student.state()
        return better


def _rows(ranged: GraphModule, errors: dict[str, Tensors]) -> list[dict[str, Any]]:
    """The table of `SpikingModel.tuning`."""
    sites = facts(ranged).sites
    return [
        {"site": name, "module": sites[name].module} | {stage: float(of[name]) for stage, of in errors.items()}
        for name in errors["before"]
    ]
