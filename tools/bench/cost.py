"""Cost: the time of the spiking networks over that of the original, in the same process, on one thread."""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fasfx.tools.bench import cases, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.tables import Line, Table, at_most, plain

CODES = {"radix": 8, "multi": 4}  # code: T
EAGER = {"radix": 1.3, "multi": 4.5}  # limits of time / time of the original
ONNX = {"radix": 1.08, "multi": 4.0}
COMPILED = {"multi": 1.5}
OPSETS = (18, 23)  # the original is exported at both; the faster one is the base
ORIGINAL = "original"
RATIO = "{:.2f}"
Calls = Mapping[str, Callable[[], object]]


def cost(quick: bool) -> Iterator[Table]:
    """torch eager; then ONNX Runtime and torch.compile unless the run is quick."""
    (batch,) = cases.evaluation("tales", 1)
    yield _table("torch eager", _eager(batch, quick), EAGER, 3 if quick else 21, quick)
    if quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        calls = _onnx(batch, Path(folder))
        times = timing.interleaved(calls, 21)
        base = fastest_original(times)
    yield _lines("ONNX Runtime", timing.ratios(times, base), ONNX, f"Base: the {base}, made by OnnxExporter.")
    compiled, seconds = _compiled(batch)
    took = ", ".join(f"{second:.0f} s ({name})" for name, second in seconds.items())
    note = f"dynamic=False, one graph; compiling took {took}."
    yield _lines("torch.compile", timing.ratios(timing.interleaved(compiled, 21), ORIGINAL), COMPILED, note)


def _table(title: str, calls: Calls, limits: dict[str, float], rounds: int, quick: bool) -> Table:
    wider = {name: limit * (cases.SLACK if quick else 1) for name, limit in limits.items()}
    return _lines(title, timing.ratios(timing.interleaved(calls, rounds), ORIGINAL), wider, "")


def _lines(title: str, ratios: Mapping[str, timing.Ratio], limits: dict[str, float], note: str) -> Table:
    """A line for every call: median and quartiles; the median is held to the limit."""
    lines: list[Line] = []
    for name, ratio in ratios.items():
        label = f"{name}, T = {CODES[name]}" if name in CODES else name
        line = plain(label, ratio, RATIO)
        if name in limits:
            held = at_most(label, [ratio.median], limits[name], RATIO)
            line = line._replace(target=held.target, met=held.met)
        lines.append(line)
    columns = ("time / time of the original", "median", "quartile", "quartile")
    note = f"{note} 8 × 128 tokens of tales; {timing.CONDITIONS}.".strip()
    return Table(f"MiniLM-L6, cost in {title}, functions in float", columns, lines, note)


def _eager(batch: Batch, quick: bool) -> dict[str, Callable[[], object]]:
    models = {name: cases.spiking("tales", name, steps, quick) for name, steps in CODES.items()}
    return {name: _call(model, batch) for name, model in {ORIGINAL: cases.minilm()[0], **models}.items()}


def _call(model: Callable[..., object], batch: Batch) -> Callable[[], object]:
    return lambda: model(**batch)


def _onnx(batch: Batch, folder: Path) -> dict[str, Callable[[], object]]:
    """Sessions of the original at each opset and of both spiking networks."""
    with cases.undisturbed():
        calls = originals(batch, folder)
        for name, steps in CODES.items():
            cases.spiking("tales", name, steps).to_onnx(folder / name)
            calls[name] = session(folder / name, batch)
    return calls


def originals(batch: Batch, folder: Path) -> dict[str, Callable[[], object]]:
    """Sessions of the original at each opset."""
    calls = {}
    (inputs,) = cases.evaluation("tales", 1, 2, 5)
    for opset in OPSETS:
        export_original(cases.minilm()[0], inputs, folder / str(opset), opset)
        calls[f"{ORIGINAL}, opset {opset}"] = session(folder / str(opset), batch)
    return calls


def fastest_original(times: Mapping[str, Sequence[float]]) -> str:
    """The original that everything is held to: the faster of its exports."""
    return min((name for name in times if name.startswith(ORIGINAL)), key=lambda name: statistics.median(times[name]))


def export_original(model: Any, inputs: dict[str, Any], folder: Path, opset: int) -> None:
    """A model itself through transformers' exporter, dynamic batch and length."""
    exporters: Any = importlib.import_module("transformers.exporters.exporter_onnx")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {name: sizes for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
    exporters.OnnxExporter().export(model, inputs, config).save_pretrained(folder)


def session(folder: Path, batch: Batch, opened: Any = None) -> Callable[[], object]:
    """A run of model.onnx on one thread, inputs in place; in a session of its own unless one is given."""
    import onnxruntime

    found = opened or onnxruntime.InferenceSession(folder / "model.onnx", timing.session_options())
    inputs = {value.name: batch[value.name].numpy() for value in found.get_inputs()}
    return lambda: found.run(None, inputs)


def _compiled(batch: Batch) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The original and the multi network under torch.compile, and the seconds the first call took."""
    snn = cases.spiking("tales", "multi", CODES["multi"])
    inputs = snn._inputs((), batch)
    models: dict[str, Any] = {ORIGINAL: cases.minilm()[0], "multi": snn.graph_module}
    calls: dict[str, Callable[[], object]] = {}
    seconds = {}
    with torch.no_grad(), timing.one_thread():
        for name, model in models.items():
            calls[name] = _call(torch.compile(model, dynamic=False, fullgraph=True), inputs)
            start = time.perf_counter()
            calls[name]()
            seconds[name] = time.perf_counter() - start
    return calls, seconds
