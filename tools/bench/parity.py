"""Parity: the exported network in ONNX Runtime is as near to the original as the same network in torch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import fasfx
from fasfx.tools.bench import cases, metrics, sites
from fasfx.tools.bench.tables import Line, Table, at_most, between, plain

CODES = {"multi": 4, "radix": 8, "rate": 64}  # code: T
SHAPES = ((1, 128), (3, 57), (8, 128), (8, 16))  # batch x length; the export is traced at 2 x 5
NUM_TEXTS, QUICK_TEXTS = 24, 6
EXPORT_SECONDS = 30.0
ERROR_RATIO = (0.95, 1.05)
DIFFERING, FORM = 1e-4, "{:.1e}"
NOTE = (
    "Shares of the spike counts of all sites. Alone: the neuron's operator on the inputs it has in torch. In the "
    "net: torch's neuron on the inputs it has in {0}. Between: torch computes each site from the spikes "
    "that {0} has at the sites before; rounding of the sums flips counts here, which has no target. "
    "A quantum: 1, or the next value that a multi neuron can send."
)


def parity(quick: bool) -> Iterator[Table]:
    """Export times, errors to the original, and counts site by site; the multi code only in a quick run."""
    exports, errors, counts = list[Line](), list[Line](), list[Line]()
    shapes = SHAPES[1:2] if quick else SHAPES
    for code, steps in list(CODES.items())[: 1 if quick else None]:
        snn, name = cases.spiking("tales", code, steps, quick), f"{code}, T = {steps}"
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            with cases.undisturbed():
                snn.to_onnx(folder)
            seconds = time.perf_counter() - start
            exports.append(at_most(name, [seconds], EXPORT_SECONDS * (3 if quick else 1), "{:.1f}"))
            errors += _errors(name, snn, fasfx.runtime.OnnxModel(folder, threads=1), shapes, quick)
            counts += _counts(name, snn, Path(folder), quick)
    yield Table("Export of MiniLM-L6 to ONNX", ("", "seconds"), exports)
    columns = ("relative L2 error to the original", *(f"{b} × {s}" for b, s in shapes))
    texts = QUICK_TEXTS if quick else NUM_TEXTS
    note = f"Batch × length; {texts} texts each, calibrated and measured on tales; CPU provider, one thread."
    yield Table("MiniLM-L6 in ONNX Runtime and in torch", columns, errors, note)
    yield table_of("ONNX Runtime", counts)


def table_of(backend: str, lines: list[Line]) -> Table:
    """Lines of `held`."""
    columns = (f"{backend} and torch", "all sites", "worst site", "beyond a quantum")
    return Table("Spike counts that differ, given the same inputs", columns, lines, NOTE.format(backend))


def _errors(
    name: str, snn: fasfx.SpikingModel, onnx: fasfx.runtime.OnnxModel, shapes: tuple[tuple[int, int], ...], quick: bool
) -> list[Line]:
    found = []
    for batch_size, length in shapes:
        batches = cases.evaluation("tales", (QUICK_TEXTS if quick else NUM_TEXTS) // batch_size, batch_size, length)
        calls: dict[str, Callable[[], metrics.Model]] = {"torch": lambda: snn, "onnx": lambda: onnx}
        found.append(metrics.error_table(cases.minilm()[0], calls, batches))
    torch_row, onnx_row = ([row[key] for row in found] for key in ("torch", "onnx"))
    ratio = [a / b for a, b in zip(onnx_row, torch_row, strict=True)]
    slack = 0.2 if quick else 0.0  # six texts are too few for five percent
    return [
        plain(f"{name}, torch", torch_row, "{:.4%}"),
        plain(f"{name}, ONNX Runtime", onnx_row, "{:.4%}"),
        between(f"{name}, ratio", ratio, ERROR_RATIO[0] - slack, ERROR_RATIO[1] + slack),
    ]


def _counts(name: str, snn: fasfx.SpikingModel, folder: Path, quick: bool) -> list[Line]:
    batches = cases.evaluation("tales", 1, 3, 57) + ([] if quick else cases.evaluation("tales", 1))
    with cases.undisturbed():
        found = sites.tallies(snn, folder, batches) | sites.rounding(snn, batches[0])
    return held(name, {what: shares(row) for what, row in found.items()})


def held(name: str, found: dict[str, tuple[float, float, float]]) -> list[Line]:
    """What is compared, its shares, and for equal inputs the target.

    Between sites the inputs of the neurons differ, by the rounding of the sums before them.
    """
    lines = {what: plain(f"{name}: {what}", figures, FORM) for what, figures in found.items()}
    for what in (sites.ALONE, sites.WITHIN):
        line = at_most(f"{name}: {what}", found[what], DIFFERING, FORM)
        lines[what] = line._replace(met=line.met and line.figures[2] == 0)
    return [*lines.values()]


def shares(row: dict[str, sites.Tally]) -> tuple[float, float, float]:
    """(share of all counts that differ, the same of the worst site, share that differs by more than a quantum)."""
    total = reduce(sites.Tally.plus, row.values())
    worst = max(tally.differing / tally.compared for tally in row.values())
    return total.differing / total.compared, worst, total.beyond / total.compared
