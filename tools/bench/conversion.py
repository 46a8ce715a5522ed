"""Conversion: seconds and peak memory, each model in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fasfx.tools.bench.tables import Line, Table, at_most, plain

LIMITS = {"minilm": ("MiniLM-L6", 20.0), "smollm2": ("SmolLM2-135M", 120.0)}  # seconds
MEMORY = 2.5  # times the weights


def measure(name: str) -> dict[str, float]:
    """Convert a loaded model that has run once: seconds and bytes of the peak above it, bytes of its weights."""
    import fasfx
    from fasfx.tools.bench import cases, fidelity, timing

    model: Any
    if name == "minilm":
        model, batches = cases.minilm()[0], cases.calibration("tales")
    else:
        from fasfx.tools.bench import data

        model, tokenizer = cases.smollm2()
        batches = fidelity.windows_of(tokenizer, data.split("tales")[0])
    with torch.no_grad():
        model(**batches[0])
    weights = sum(value.numel() * value.element_size() for value in {*model.parameters()})
    start = time.perf_counter()
    with cases.undisturbed():
        _, peak = timing.peak_rss(lambda: fasfx.convert(model, batches))
    return {"seconds": time.perf_counter() - start, "peak": peak, "weights": weights}


def conversion(quick: bool) -> Iterator[Table]:
    """Both models; MiniLM only, three times the seconds and twice the memory in a quick run."""
    lines: list[Line] = []
    for name, (title, seconds) in LIMITS.items():
        if quick and name != "minilm":
            continue
        run = [sys.executable, "-m", "fasfx.tools.bench.conversion", name]
        found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        limit, memory = (3 * seconds, 2 * MEMORY) if quick else (seconds, MEMORY)
        lines.append(at_most(f"{title}, seconds", [found["seconds"]], limit, "{:.1f}"))
        lines.append(at_most(f"{title}, peak / weights", [found["peak"] / found["weights"]], memory, "{:.2f}"))
        lines.append(plain(f"{title}, weights, MB", [found["weights"] / 1e6], "{:.0f}"))
    note = (
        "A fresh process each; the model is loaded and has run once. Peak: resident memory above that. "
        "Calibration: 64 texts of 128 tokens (MiniLM), 8 windows of 512 (SmolLM2)."
    )
    yield Table("Conversion, default settings", ("", "measured"), lines, note)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
