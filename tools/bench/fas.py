"""FAS: fine-tuned original, stage I, stage II, at several T. Trained networks are kept (fasfx.tools.bench.trained)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean, stdev

import fasfx
from fasfx.devices import device_of
from fasfx.tools.bench.by_ticks import FIGURE, PERCENT, tables
from fasfx.tools.bench.recipes import CASES, SPARSE_LANGUAGE, SPIKES, Target, made_of, teacher_of
from fasfx.tools.bench.tables import Table, at_most, plain
from fasfx.tools.bench.tasks import TASKS
from fasfx.tools.bench.trained import calibration

Part = Callable[[bool], Iterator[Table]]
SEEDS = (0, 1, 2)
FEWER_SPIKES = 0.7  # of a language model's, at most
QUICK = ("digits",)  # what --quick trains: minutes


def seeds(quick: bool) -> Iterator[Table]:
    """The headline: movie valence, multi code, T = 1, three seeds; the network after stage I, which T = 1 is."""
    task, rows = TASKS["valence"](), []
    for seed in SEEDS:
        start, made = time.perf_counter(), made_of(CASES["valence"], seed)
        scores = [task.measure(net) for net in (made.original.model, made.trained.model, made.snn)]
        rows.append((*scores, made.original.seconds, made.trained.seconds, time.perf_counter() - start))
    columns = [*zip(*rows, strict=True)]
    names = ("fine-tuned original", "stage I", "spiking, synchronous, T = 1")
    times = ("training the original", "stage I", "measuring")
    lines = [plain(name, [*of, mean(of), stdev(of)], PERCENT) for name, of in zip(names, columns[:3], strict=True)]
    gap = mean(row[0] - row[2] for row in rows)
    lines.append(at_most("original - spiking, mean", [gap], 0.003, PERCENT))
    lines += [plain(f"wall time, {name}, s", of, "{:.0f}") for name, of in zip(times, columns[3:], strict=True)]
    header = ("", *(f"seed {seed}" for seed in SEEDS), "mean", "spread")
    note = f"{len(task.test):,} test sentences; spread: standard deviation."
    yield Table("Movie valence, multi code, T = 1", header, lines, note)


def language_sparse(quick: bool) -> Iterator[Table]:
    """Fewer spikes of a language model than the usual conversion sends at as many ticks, at the same perplexity."""
    case, usual = SPARSE_LANGUAGE, replace(SPARSE_LANGUAGE, settings={})
    task, original = TASKS[case.task](), teacher_of(case.task, 0, quick).model
    start, batch = time.perf_counter(), task.inputs(task.test[: task.size], device_of(original))
    sent = fasfx.energy(fasfx.convert(original, calibration(case.task, original), usual.config), batch).spikes
    lines = [plain(SPIKES, [sent], FIGURE), plain("wall time, s", [time.perf_counter() - start], "{:.0f}")]
    note = f"{usual.config.levels} levels, one threshold for a site; the network below is held to 30 % fewer."
    yield Table("The original converted as usual", ("", f"T = {case.trained}"), lines, note)
    few = Target(SPIKES, case.trained, most=FEWER_SPIKES * sent)
    yield from tables(replace(case, targets=(*case.targets, few)), quick)


def _part(name: str) -> Part:
    return lambda quick: tables(CASES[name], quick)


def _quickly(name: str, part: Part) -> Part:
    return lambda quick: part(quick) if not quick or name in QUICK else iter(())


PARTS: dict[str, Part] = {
    name: _quickly(name, part)
    for name, part in {
        "seeds": seeds,
        "language_sparse": language_sparse,
        **{name: _part(name) for name in CASES},
    }.items()
}
