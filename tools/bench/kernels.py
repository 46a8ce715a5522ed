"""Kernels: how many nodes of every form of export have no CUDA kernel; the original network beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fasfx
from fasfx.calibration import without_cache
from fasfx.runtime import missing_kernels
from fasfx.tools.bench import cases, cost, data, models
from fasfx.tools.bench.fidelity import windows_of
from fasfx.tools.bench.tables import Table, at_most, plain

INTEGER, TICKS = fasfx.SpikeConfig.integer(), fasfx.SpikeConfig.low_latency()
FORMS = {
    "functions exact": (fasfx.SpikeConfig().replace(nonlinear="exact"), "closed"),
    "functions spiking": (fasfx.SpikeConfig(), "closed"),
    "synchronous, Loop": (TICKS, "loop"),
    "synchronous, one step": (TICKS, "step"),
    "integer": (INTEGER, "integer"),
    "int8 weights, counts in float": (INTEGER, "closed"),
}
COUNT = "{:.0f}"


def _table(name: str, model: Any, batches: list[dict[str, Any]]) -> Table:
    lines = []
    with tempfile.TemporaryDirectory() as place:
        for at, (label, (config, form)) in enumerate(FORMS.items()):
            folder = Path(place) / str(at)
            with cases.undisturbed():
                fasfx.convert(model, batches, config).to_onnx(folder, form=form)
            lines.append(at_most(label, [len(missing_kernels(folder))], 0, COUNT))
        for opset in cost.OPSETS:
            folder = Path(place) / f"opset {opset}"
            with cases.undisturbed():
                cost.export_original(model, batches[0], folder, opset)
            lines.append(plain(f"original, opset {opset}", [len(missing_kernels(folder))], COUNT))
    note = "Spiking networks: opset 18. From ONNX Runtime's list of kernels; nothing ran on CUDA."
    return Table(f"{name}, nodes without a CUDA kernel", ("", "nodes"), lines, note)


def family(name: str, quick: bool) -> Iterator[Table]:
    """A tiny random model."""
    model = models.tiny(name)
    yield _table(f"Tiny {name}", model, [models.tiny_inputs(name) | without_cache(model)])


def minilm(quick: bool) -> Iterator[Table]:
    """MiniLM, calibrated on news; not in a quick run."""
    if not quick:
        yield _table("MiniLM-L6", cases.minilm()[0], cases.calibration("news", quick=True))


def smollm2(quick: bool) -> Iterator[Table]:
    """SmolLM2, calibrated on one window of tales; not in a quick run."""
    if not quick:
        model, tokenizer = cases.smollm2()
        yield _table("SmolLM2-135M", model, windows_of(tokenizer, data.split("tales")[0], 511)[:1])


PARTS = {"minilm": minilm, "smollm2": smollm2, **{name: partial(family, name) for name in models.TINY}}
