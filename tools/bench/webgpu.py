"""Spike counts on ONNX Runtime's WebGPU provider and in torch, each network in a process of its own.

Several networks with masks in one process have given wrong results there (the provider's logical And).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fasfx.errors import RuntimeUnavailableError
from fasfx.tools.bench import cases, parity, sites
from fasfx.tools.bench.tables import Table

CODES = {"multi": 4, "radix": 7}  # code: T


def measure(code: str, timesteps: int) -> dict[str, tuple[float, float, float]]:
    """What is compared: shares of counts that differ, see fasfx.tools.bench.parity.shares."""
    snn, batches = cases.spiking("tales", code, timesteps), cases.evaluation("tales", 1, 3, 57)
    with tempfile.TemporaryDirectory() as folder:
        snn.to_onnx(folder)
        found = sites.tallies(snn, Path(folder), batches, "webgpu")
    return {what: parity.shares(row) for what, row in found.items()}


def webgpu(quick: bool) -> Iterator[Table]:
    """MiniLM, site by site; needs a Vulkan, Metal or Direct3D device, so not in a quick run."""
    if quick:
        return
    lines = []
    for code, steps in CODES.items():
        run = [sys.executable, "-m", __name__, code, str(steps)]
        found = subprocess.run(run, capture_output=True, text=True)
        if found.returncode:
            raise RuntimeUnavailableError(found.stderr.strip().rpartition("\n")[2])
        lines += parity.held(f"{code}, T = {steps}", json.loads(found.stdout.splitlines()[-1]))
    yield parity.table_of("WebGPU", lines)


if __name__ == "__main__":
    with cases.undisturbed():
        figures = measure(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(figures))
