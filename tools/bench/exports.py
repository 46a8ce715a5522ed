"""The exports that are compared: made, weighed, opened."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fasfx
from fasfx.runtime import OnnxModel
from fasfx.tools.bench import cases, cost, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.tables import Line, Table, at_most, plain

DYNAMIC = "ONNX Runtime's dynamic int8"
INTEGER, SPIKING, FLOAT = "integer form", "integer form, functions spiking", "the same counts in float"
EXPORT, NODES, SIZE = {"MiniLM-L6": 15.0, "SmolLM2-135M": 60.0}, 1.5, 0.3
SECONDS, RATIO = "{:.1f}", "{:.2f}"


class Network(NamedTuple):
    """A model, its calibration, inputs to trace it with, opsets of its own exports, and rounds of timing.

    ONNX Runtime cannot run Llama at opset 23 for more than one row.
    """

    name: str
    model: Any
    calibration: list[dict[str, Any]]
    inputs: dict[str, Any]
    opsets: tuple[int, ...]
    rounds: int


def build(
    network: Network, forms: dict[str, fasfx.SpikeConfig], folder: Path, slack: float = 1.0
) -> tuple[Table, dict[str, fasfx.SpikingModel]]:
    """Every form in a folder of its name; what exporting them took, in at most `slack` times the seconds allowed."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    lines: list[Line] = []
    nets: dict[str, fasfx.SpikingModel] = {}
    with cases.undisturbed():
        for opset in network.opsets:
            cost.export_original(network.model, network.inputs, folder / f"{cost.ORIGINAL}, opset {opset}", opset)
        base = folder / f"{cost.ORIGINAL}, opset {network.opsets[0]}"
        (folder / DYNAMIC).mkdir()
        quantize_dynamic(
            base / "model.onnx", folder / DYNAMIC / "model.onnx", weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )  # fmt: skip
        for name, config in forms.items():
            nets[name] = fasfx.convert(network.model, network.calibration, config)
            seconds = _seconds(partial(nets[name].to_onnx, folder / name))
            nodes, size = _nodes(folder / name) / _nodes(base), _bytes(folder / name) / _bytes(base)
            loading = _seconds(partial(OnnxModel, folder / name, threads=1))
            limits = (slack * EXPORT[network.name], NODES, SIZE) if name == INTEGER else (None, None, None)
            lines += [
                _held(f"{name}: export, s", seconds, limits[0], SECONDS),
                _held(f"{name}: nodes / original's", nodes, limits[1], RATIO),
                _held(f"{name}: bytes / original's", size, limits[2], RATIO),
                plain(f"{name}: load, s", [loading], SECONDS),
            ]
        nets[INTEGER].to_onnx(folder / FLOAT, form="closed")
    return Table(f"{network.name}, export", ("", "measured"), lines, f"Original: opset {network.opsets[0]}."), nets


def _held(label: str, figure: float, limit: float | None, form: str) -> Line:
    """What is promised is promised of the integer form with its defaults."""
    return plain(label, [figure], form) if limit is None else at_most(label, [figure], limit, form)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _nodes(folder: Path) -> int:
    import onnx

    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def memory(network: Network, folder: Path, batch: Batch) -> Table:
    """What loading an export and calling it once takes."""
    peaks = {place.name: timing.peak_rss(partial(_called, place, batch))[1] for place in _places(folder)}
    base = min(peak for name, peak in peaks.items() if name.startswith(cost.ORIGINAL))
    lines = [plain(name, [peak / base], RATIO) for name, peak in peaks.items()]
    size = " × ".join(map(str, batch["input_ids"].shape))
    note = (
        f"Peak of resident memory above that before, {size} tokens. Base: the smaller original, {base / 2**20:.0f} MB."
    )
    return Table(f"{network.name} in ONNX Runtime, peak memory / original's", ("", "load and one call"), lines, note)


def _places(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _session(place: Path, batch: Batch) -> Callable[[], object]:
    ours = place.name in (INTEGER, SPIKING, FLOAT)
    return cost.session(place, batch, OnnxModel(place, threads=1).session if ours else None)


def _called(place: Path, batch: Batch) -> object:
    return _session(place, batch)()


def sessions(folder: Path, batch: Batch) -> dict[str, Callable[[], object]]:
    """A call of every export in a folder, by its name."""
    return {place.name: _session(place, batch) for place in _places(folder)}
