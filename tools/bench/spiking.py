"""nonlinear="spiking" beside "exact": what it costs in accuracy, spikes and time that nothing is left in float."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fasfx
from fasfx import scores
from fasfx.equivalence import by_tick, spikes_so_far
from fasfx.tools.bench import cases, cost, data, fidelity, metrics, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.tables import Line, Table, at_least, at_most, below, plain

PERCENT = "{:.3%}"
RATIO_AT_3, LIMITS = 1.25, {4: 0.009, 6: 0.0015}  # T: limit of MiniLM's error, sequential
SYNCHRONOUS = {6: 0.006}
PERPLEXITY = 1.012  # at T = 4
EAGER, ONNX = 2.0, 1.5


def _converted(quick: bool, **changes: object) -> fasfx.SpikingModel:
    config = fasfx.SpikeConfig().replace(**changes)
    return fasfx.convert(cases.minilm()[0], cases.calibration("news", quick), config)


def price(quick: bool) -> Iterator[Table]:
    """MiniLM's error by T under both schedules, and what its neurons send."""
    steps = (3, 4) if quick else tuple(range(1, 8))
    slack = cases.SLACK if quick else 1.0
    batches = cases.evaluation("news", *((1, 4, 64) if quick else (2, 8, 128)))
    model = cases.minilm()[0]
    nets = {kind: _converted(quick, nonlinear=kind) for kind in ("exact", "spiking")}
    tables = [
        metrics.error_table(model, {t: partial(cases.at, snn, t) for t in steps}, batches) for snn in nets.values()
    ]
    sequential = _falling("MiniLM-L6, sequential", [[e[t] for e in tables] for t in steps], steps, LIMITS, slack)
    exact, spiking = (table[3] for table in tables)
    sequential.lines.append(at_most("over exact at T = 3", [1.0, spiking / exact], RATIO_AT_3 * slack))
    yield sequential
    if not quick:
        with torch.no_grad():
            expected = [model(**batch).last_hidden_state for batch in batches]
        for snn in nets.values():
            snn.schedule, snn.timesteps = "synchronous", steps[-1]
        found = [by_tick(snn, batches, expected, lambda *_: None) for snn in nets.values()]
        rows = [[differences[t - 1].relative_l2 for differences in found] for t in steps]
        yield _falling("MiniLM-L6, synchronous", rows, steps, SYNCHRONOUS, slack)
        for snn in nets.values():
            snn.schedule = "sequential"
    yield _sent({kind: cases.at(snn, 4) for kind, snn in nets.items()}, batches[0])


def _falling(
    title: str, rows: list[list[float]], steps: tuple[int, ...], limits: dict[int, float], slack: float
) -> Table:
    lines: list[Line] = []
    for step, row in zip(steps, rows, strict=True):
        line = plain(f"T = {step}", row, PERCENT)
        if lines:
            line = below(f"T = {step}", row, lines[-1].figures, "less than before", PERCENT)
        if step in limits:
            held = at_most(f"T = {step}", row[1:], limits[step] * slack, PERCENT)
            line = line._replace(target=held.target, met=held.met and line.met is not False)
        lines.append(line)
    note = f"Calibrated on news, unseen news; {fidelity.ERROR}; limits are of the spiking column."
    return Table(title, ("", "exact", "spiking"), lines, note)


def _sent(nets: dict[str, fasfx.SpikingModel], batch: Batch) -> Table:
    lines = [at_least("spike-driven multiply-accumulates", [n.coverage.spike_driven_macs for n in nets.values()], 1.0)]
    driven = [n.coverage.spike_driven_operators for n in nets.values()]
    full = at_least("", driven[1:], 1.0)
    lines.append(plain("spike-driven operators", driven)._replace(target=full.target, met=full.met))
    lines.append(plain("spikes per activation", [spikes_so_far(n, batch)[-1] for n in nets.values()]))
    groups = nets["spiking"].group_spikes(**batch)
    lines.append(plain("spikes in a group, mean over groups", [0.0, sum(groups.values()) / len(groups)]))
    return Table(
        "MiniLM-L6, T = 4", ("", "exact", "spiking"), lines, "A group's spikes go no further than its own sum."
    )


def perplexity(quick: bool) -> Iterator[Table]:
    """SmolLM2's perplexity over the original's; not in a quick run."""
    if quick:
        return
    model, tokenizer = cases.smollm2()
    own, unseen = data.split(fidelity.OWN)
    windows = fidelity.windows_of(tokenizer, unseen)
    config = fasfx.SpikeConfig(nonlinear="spiking", strict=True)
    snn = fasfx.convert(model, fidelity.windows_of(tokenizer, own), config)
    ratio = scores.perplexity(snn, windows) / scores.perplexity(model, windows)
    note = f"Calibrated on {fidelity.OWN}; {fidelity.TOKENS:,} unseen tokens of it in windows of {fidelity.WINDOW}."
    yield Table("SmolLM2-135M", ("", "ratio"), [at_most("perplexity, T = 4", [ratio], PERPLEXITY, "{:.4f}")], note)


def time(quick: bool) -> Iterator[Table]:
    """The spiking network's time over its exact self, in torch and in ONNX Runtime."""
    (batch,) = cases.evaluation("news", 1)
    nets = {kind: _converted(quick, nonlinear=kind) for kind in ("exact", "spiking")}
    rounds, slack = (3, cases.SLACK) if quick else (11, 1.0)
    with torch.no_grad():
        eager = timing.ratios(timing.interleaved({k: partial(n, **batch) for k, n in nets.items()}, rounds), "exact")
    lines = [at_most("torch eager", [eager["spiking"].median], EAGER * slack, cost.RATIO)]
    if not quick:
        with tempfile.TemporaryDirectory() as folder, cases.undisturbed():
            for kind, snn in nets.items():
                snn.to_onnx(Path(folder) / kind)
            calls = {kind: cost.session(Path(folder) / kind, batch) for kind in nets}
            found = timing.ratios(timing.interleaved(calls, rounds), "exact")["spiking"]
        lines.append(at_most("ONNX Runtime", [found.median], ONNX, cost.RATIO))
    note = f"8 x 128 tokens, T = 4; {timing.CONDITIONS}."
    yield Table("MiniLM-L6, time over that with exact functions", ("", "ratio"), lines, note)


PARTS: dict[str, Callable[[bool], Iterator[Table]]] = {"price": price, "perplexity": perplexity, "time": time}
