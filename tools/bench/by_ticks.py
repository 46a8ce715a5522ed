"""A case of FAS at every T: uncalibrated, after either part of stage II, errors, spikes, energy; and its wall times."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

import fasfx
from fasfx.devices import device_of
from fasfx.tools.bench.deployed import deployed
from fasfx.tools.bench.jelly import beside
from fasfx.tools.bench.recipes import SEQUENTIAL, SPIKES, TUNED, Case, Made, Target, made_of
from fasfx.tools.bench.tables import Line, Table, at_least, at_most, plain
from fasfx.tools.bench.tasks import TASKS, Task
from fasfx.tools.bench.trained import Kept, measured, tuned

PERCENT, FIGURE, ERROR = "{:.2%}", "{:.3f}", "{:.3e}"
CLOSE = 0.05  # what a quick run may lose
QUICK_ROWS, QUICK_TUNING = 128, 4
PAPER = 0.9663  # the energy that FAS saves by its own counting, of the layers that spike


class Cell(NamedTuple):
    """A figure and the seconds it took; NaN: it came with the row above."""

    figure: float
    form: str
    seconds: float = math.nan


@dataclass(frozen=True)
class Judge:
    """Measures networks beside the original: by accuracy, or by perplexity over the original's.

    own: the original's accuracy or perplexity.
    """

    task: Task
    rows: int | None
    own: float

    @property
    def form(self) -> str:
        """Of an accuracy or perplexity."""
        return PERCENT if self.task.score == "accuracy" else FIGURE

    def cell(self, of: Any, network: nn.Module, seconds: float = 0.0) -> Cell:
        """What a network reaches, measured once; `of` is all that made it, `seconds` what making it took."""
        found, took = measured([of, self.rows], lambda: self.task.measure(network, self.rows))
        return Cell(found if self.task.score == "accuracy" else found / self.own, self.form, seconds + took)

    def held(self, figure: float, target: Target) -> Line:
        """Whether a figure meets its target."""
        if target.most is not None:
            return at_most("", [figure], target.most)
        assert target.loss is not None
        if self.task.score == "accuracy":
            return at_least("", [figure], self.own - target.loss, self.form)
        return at_most("", [figure], 1 + target.loss, self.form)


def tables(case: Case, quick: bool) -> Iterator[Table]:
    """One case, one seed: the table, its wall times, and for predictions the deployed network and SpikingJelly 2."""
    task, made = TASKS[case.task](), made_of(case, 0, quick)
    ticks, rows = (case.ticks[1:2], QUICK_ROWS) if quick else (case.ticks, None)
    judge = Judge(task, rows, task.measure(made.original.model, rows))
    columns = {t: _column(case, judge, made, t, quick) for t in ticks}
    title, header = f"{task.name}, {case.code} code, {case.coverage}", ("", *(f"T = {t}" for t in ticks))
    lines = [_line(case, judge, name, columns, quick) for name in columns[ticks[0]]]
    yield Table(title, header, lines, _note(case, judge, made))
    times = [plain(name, [c[name].seconds for c in columns.values()], "{:.0f}") for name in columns[ticks[0]]]
    note = "–: comes with the row above. Tuning counts where it was done (neuron goes on from layer), training not."
    yield Table(f"{title}: wall time of every cell, s", header, times, note)
    if task.score == "accuracy":
        at = case.trained if case.trained in ticks else ticks[-1]
        snn = _tuned(case, made, at, quick)[1].model
        yield deployed(task, _both_forms(made, snn, at), rows, CLOSE if quick else 0.0)
        yield beside(task, made.original.model, snn, rows)


def _note(case: Case, judge: Judge, made: Made) -> str:
    own, sparse = judge.form.format(judge.own), f", weight {case.spikes} on spikes" if case.spikes else ""
    stage = "no stage I"
    if case.epochs:
        cell = judge.cell(_made_by(case, made, case.trained, "stage I"), made.trained.model)
        reached = cell.form.format(cell.figure)
        stage = f"stage I at T = {case.trained} {reached} ({made.trained.seconds:.0f} s to train){sparse}"
    settings = "".join(f", {name} {value}" for name, value in case.settings.items())
    return (
        f"{case.code} code, coverage {case.coverage}{settings}; original {judge.task.score} {own} "
        f"({made.original.seconds:.0f} s to train), {stage}; one seed. "
        f"Energy: share of the original's, 0.9 pJ / 4.6 pJ; the paper says {1 - PAPER:.2%} of the layers that spike."
    )


def _made_by(case: Case, made: Made, ticks: int, row: str) -> Any:
    """All that makes the network of a row at this T."""
    return [made.of, asdict(case.config), ticks, row, case.tuning]


def _tuned(case: Case, made: Made, ticks: int, quick: bool) -> tuple[Kept, Kept]:
    """The synchronous network at this T after either part of stage II; the second goes on from the first."""
    made.snn.schedule, made.snn.timesteps = "synchronous", ticks
    batches = QUICK_TUNING if quick else case.tuning
    layer = tuned(case.task, made.snn, "layer", [made.of, ticks], batches, case.spikes)
    return layer, tuned(case.task, layer.model, "neuron", [made.of, ticks], batches, case.spikes)


def _both_forms(made: Made, tuned: fasfx.SpikingModel, ticks: int) -> dict[str, fasfx.SpikingModel]:
    """The tuned network, whose export is a loop, and the closed form of the sequential one, at the T of stage I."""
    made.snn.schedule, made.snn.timesteps = "sequential", ticks
    return {f"loop, {TUNED}, T = {ticks}": tuned, f"closed form, {SEQUENTIAL}, T = {ticks}": made.snn}


def _column(case: Case, judge: Judge, made: Made, ticks: int, quick: bool) -> dict[str, Cell]:
    """The column of one T: row -> cell."""
    made.snn.schedule, made.snn.timesteps = "synchronous", ticks
    of = partial(_made_by, case, made, ticks)
    cell = judge.cell(of("uncalibrated"), made.snn)
    found = {"uncalibrated": cell}
    layer, neuron = _tuned(case, made, ticks, quick)
    for name, stage, kept in (("after layer", "layer", layer), (TUNED, "neuron", neuron)):
        # What every site transmits is as far from the teacher's as before, to the bit: the network is as it was.
        same = kept.model.tuning[stage].equals(kept.model.tuning["before"])
        cell = cell._replace(seconds=kept.seconds) if same else judge.cell(of(name), *kept)
        found[name] = cell
    errors = {"before": layer.model.tuning["before"], "layer": layer.model.tuning["layer"]}
    errors["neuron"] = neuron.model.tuning["neuron"]
    found |= {f"alignment error, {stage}": Cell(float(error.mean()), ERROR) for stage, error in errors.items()}
    made.snn.schedule = "sequential"
    found[SEQUENTIAL] = judge.cell(of(SEQUENTIAL), made.snn)
    start = time.perf_counter()
    task = judge.task
    cost = fasfx.energy(neuron.model, task.inputs(task.test[: task.size], device_of(neuron.model)))
    return found | {
        SPIKES: Cell(cost.spikes, FIGURE, time.perf_counter() - start),
        "energy, layers that spike": Cell(1 - cost.headline, PERCENT),
        "energy, every product": Cell(1 - float(cost.totals.saved[0]), PERCENT),
    }


def _line(case: Case, judge: Judge, name: str, columns: dict[int, dict[str, Cell]], quick: bool) -> Line:
    """A row with its targets, at the T they name; a quick run has one, at its last T."""
    cells = {ticks: column[name] for ticks, column in columns.items()}
    line = plain(name, [cell.figure for cell in cells.values()], next(iter(cells.values())).form)
    targets = [target for target in case.targets if target.row == name]
    if quick:
        targets = [target._replace(at=[*cells][-1], loss=CLOSE) for target in targets[:1]]
    held = {target.at: judge.held(cells[target.at].figure, target) for target in targets}
    if not held:
        return line
    wanted = ", ".join(f"T = {ticks} {one.target}" for ticks, one in held.items())
    return line._replace(target=wanted, met=all(one.met for one in held.values()))
