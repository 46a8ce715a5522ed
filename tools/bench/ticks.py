"""The synchronous schedule: error and spikes by tick for both codes, perplexity by tick, cost of a tick."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import fasfx
from fasfx.difference import main_output
from fasfx.equivalence import by_tick, spikes_so_far
from fasfx.tools.bench import cases, cost, data, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.fidelity import ERROR, PERCENT, windows_of
from fasfx.tools.bench.tables import Line, Table, at_least, at_most, plain

MULTI = {4: 0.035, 8: 0.0015}  # tick: limit of the relative error
FALL, FALL_OVER = 2.4, (2, 7)  # geometric mean per tick, over these ticks
RATE = (32, 64, 128, 256)
RATE_LIMIT = 0.12  # after the last of them
WINDOWS = 2_044  # tokens predicted, in windows of 512
PERPLEXITY = {"smollm2": {4: 1.06, 5: 1.02, 6: 1.006, 8: 1.002}, "qwen": {4: 1.03}}
BOTH = "two neurons, centred"
SETTINGS: dict[str, dict[str, Any]] = {
    "one neuron for a value": {},
    "one neuron, centred": {"centre": True},
    "two neurons": {"population": 2},
    BOTH: {"population": 2, "centre": True},
}
HELD = 1.06  # the perplexity of the last after any tick, over the original's
TOP1, EAGER, ONNX, EXPORT = 0.98, 1.5, 1.3, 40.0


def _synchronous(kind: str, code: str, ticks: int, quick: bool = False, **changes: Any) -> fasfx.SpikingModel:
    config = fasfx.SpikeConfig.low_latency(ticks, code=code, **changes)
    return fasfx.convert(cases.minilm()[0], cases.calibration(kind, quick), config)


@torch.no_grad()
def _errors(snn: fasfx.SpikingModel, batches: list[Batch]) -> list[float]:
    """The relative error after every tick."""
    expected = [main_output(cases.minilm()[0](**batch)) for batch in batches]
    return [found.relative_l2 for found in by_tick(snn, batches, expected, lambda *_: None)]


def multi(quick: bool) -> Iterator[Table]:
    """MiniLM, SpikeConfig.low_latency, by tick."""
    kinds, size = (cases.KINDS[:1], (1, 4, 64)) if quick else (cases.KINDS, (2, 8, 128))
    slack, found, spikes = cases.SLACK if quick else 1.0, {}, []
    for kind in kinds:
        snn = _synchronous(kind, "multi", 8, quick)
        for other in cases.KINDS:
            batches = cases.evaluation(other, *size)
            found[f"{kind}, on {other}"] = _errors(snn, batches)
            spikes.append(spikes_so_far(snn, batches[0]))
    lines: list[Line] = []
    for tick in range(1, 9):
        row = [errors[tick - 1] for errors in found.values()]
        label = f"tick {tick} ({spikes[0][tick - 1]:.2f} spikes per value)"
        limit = MULTI.get(tick)
        lines.append(at_most(label, row, limit * slack, PERCENT) if limit else plain(label, row, PERCENT))
    first, last = FALL_OVER
    falls = [(e[first - 1] / e[last - 1]) ** (1 / (last - first)) for e in found.values()]
    lines.append(at_least(f"mean fall per tick, ticks {first} to {last}", falls, FALL if not quick else 1.5))
    yield Table("MiniLM-L6, synchronous, multi code", ("", *found), lines, ERROR.capitalize() + ".")


def rate(quick: bool) -> Iterator[Table]:
    """The paper's neuron on the same step graph, beside the multi code at its own numbers of ticks."""
    if quick:
        return
    (batch,) = cases.evaluation("tales", 1)
    snn = _synchronous("tales", "rate", RATE[-1], nonlinear="exact")
    errors, spikes = _errors(snn, [batch]), spikes_so_far(snn, batch)
    lines, before = [], float("inf")
    for tick in RATE:
        figures = [errors[tick - 1], spikes[tick - 1]]
        limit = min(before, RATE_LIMIT if tick == RATE[-1] else before)
        line = at_most(f"rate, tick {tick}", figures[:1], limit, PERCENT) if tick != RATE[0] else None
        plain_line = plain(f"rate, tick {tick}", figures, "{:.4f}")
        lines.append(plain_line._replace(target=line.target, met=line.met) if line else plain_line)
        before = figures[0]
    other = _synchronous("tales", "multi", 8, nonlinear="exact")
    errors, spikes = _errors(other, [batch]), spikes_so_far(other, batch)
    lines += [plain(f"multi, tick {t}", [errors[t - 1], spikes[t - 1]], "{:.4f}") for t in (2, 4, 6, 8)]
    yield Table(
        "MiniLM-L6, synchronous, both codes, functions in float",
        ("", "error", "spikes per value"),
        lines,
        "Tales, own kind.",
    )


def perplexity(quick: bool) -> Iterator[Table]:
    """Language models by tick: perplexity over the original's, and equal top-1 tokens."""
    if quick:
        return
    for name in PERPLEXITY:
        yield _perplexity(name, getattr(cases, name))


def _perplexity(name: str, load: Callable[[], Any]) -> Table:
    limits = PERPLEXITY[name]
    ratios, equal, count = _ratios(load, max(limits))
    lines = []
    for tick, (ratio, same) in enumerate(zip(ratios, equal, strict=True), 1):
        line = plain(f"tick {tick}", [ratio, same], "{:.4f}")
        if tick in limits:
            held = at_most(f"tick {tick}", [ratio], limits[tick], "{:.4f}")
            line = line._replace(target=held.target, met=held.met and (tick < 8 or same >= TOP1))
        lines.append(line)
    note = f"{count:,} tokens of unseen tales in windows of 512; top-1 at tick 8 at least {TOP1:.0%}."
    return Table(
        f"{name}, synchronous, functions in float", ("", "perplexity / original's", "equal top-1"), lines, note
    )


@torch.no_grad()
def _ratios(load: Callable[[], Any], ticks: int, **settings: Any) -> tuple[list[float], list[float], int]:
    """A language model's perplexity over the original's, and its share of equal top-1 tokens, by tick; the tokens."""
    model, tokenizer = load()
    own, unseen = data.split("tales")
    windows = windows_of(tokenizer, unseen)[: WINDOWS // 511]
    config = fasfx.SpikeConfig.low_latency(ticks, nonlinear="exact", **settings)
    snn = fasfx.convert(model, windows_of(tokenizer, own), config)
    loss, base, equal, count = [0.0] * ticks, 0.0, [0] * ticks, 0
    for window in windows:
        target = window["input_ids"][:, 1:].flatten()
        original = main_output(model(**window))[:, :-1].float().flatten(0, 1)
        base += float(functional.cross_entropy(original, target, reduction="sum"))
        count += target.numel()
        for tick, output in enumerate(snn.ticks(**window)):
            logits = main_output(output)[:, :-1].float().flatten(0, 1)
            loss[tick] += float(functional.cross_entropy(logits, target, reduction="sum"))
            equal[tick] += int((logits.argmax(-1) == original.argmax(-1)).sum())
    return [math.exp((one - base) / count) for one in loss], [same / count for same in equal], count


def few(quick: bool) -> Iterator[Table]:
    """Few ticks: what centred values and a second neuron for every value are worth; not in a quick run."""
    if quick:
        return
    errors, spikes, ticks = [], [], (1, 2, 3)
    for name, settings in SETTINGS.items():
        snn = _synchronous("tales", "multi", ticks[-1], nonlinear="exact", **settings)
        batches = cases.evaluation("news", 2, 8, 128)
        found = _errors(snn, batches)
        errors.append(plain(name, found, PERCENT))
        spikes.append(plain(name, spikes_so_far(snn, batches[0]), "{:.2f}"))
    header, note = ("", *(f"tick {tick}" for tick in ticks)), "Calibrated on tales, measured on news."
    yield Table("MiniLM-L6, few ticks, functions in float", header, errors, f"{ERROR.capitalize()}. {note}")
    yield Table("MiniLM-L6, few ticks: spikes per value so far", header, spikes, note)
    for name in PERPLEXITY:
        load = getattr(cases, name)
        ratios = {label: _ratios(load, ticks[-1], **settings)[0] for label, settings in SETTINGS.items()}
        lines = [
            at_most(label, found, HELD, "{:.4f}") if label == BOTH else plain(label, found, "{:.4f}")
            for label, found in ratios.items()
        ]
        title = f"{name}, few ticks: perplexity over the original's, functions in float"
        yield Table(title, header, lines, "Unseen tales in windows of 512.")


def cost_of_a_tick(quick: bool) -> Iterator[Table]:
    """One tick over the original, in torch and in ONNX Runtime; the state; the export."""
    (batch,) = cases.evaluation("tales", 1)
    snn = _synchronous("tales", "multi", 4, quick, nonlinear="exact")
    state = snn.state(**batch)
    calls = {cost.ORIGINAL: lambda: cases.minilm()[0](**batch), "ticks": lambda: snn(**batch)}
    slack = cases.SLACK if quick else 1.0
    with torch.no_grad():
        eager = timing.ratios(timing.interleaved(calls, 3 if quick else 21), cost.ORIGINAL)["ticks"]
    lines = [at_most("torch eager, one tick", [eager.median / snn.timesteps], EAGER * slack, cost.RATIO)]
    if not quick:
        lines += _onnx(snn, batch)
    lines.append(plain("state, MB", [state.nbytes / 1e6], "{:.0f}"))
    note = f"Time of {snn.timesteps} ticks, divided by their number, over the original's; "
    note += f"8 x 128 tokens of tales; {timing.CONDITIONS}."
    yield Table("MiniLM-L6, cost of a tick, functions in float", ("", "figure"), lines, note)


def _onnx(snn: fasfx.SpikingModel, batch: Batch) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder, cases.undisturbed():
        calls = cost.originals(batch, Path(folder))
        start = time.perf_counter()
        snn.to_onnx(Path(folder) / "loop")
        seconds = time.perf_counter() - start
        calls["loop"] = cost.session(Path(folder) / "loop", batch)
        times = timing.interleaved(calls, 21)
    base = cost.fastest_original(times)
    loop = timing.ratios(times, base)["loop"]
    tick = at_most("ONNX Runtime, one tick", [loop.median / snn.timesteps], ONNX, cost.RATIO)
    return [tick, at_most("export as a Loop, seconds", [seconds], EXPORT, "{:.0f}")]


PARTS: dict[str, Callable[[bool], Iterator[Table]]] = {
    "multi": multi,
    "rate": rate,
    "perplexity": perplexity,
    "few": few,
    "cost": cost_of_a_tick,
}
