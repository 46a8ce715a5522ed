"""The same network in torch and in ONNX Runtime: how often they predict the same, and how often each is right."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping

import torch

import fasfx
from fasfx.devices import device_of
from fasfx.tools.bench import cases
from fasfx.tools.bench.metrics import all_logits
from fasfx.tools.bench.tables import Table, at_least, at_most, plain
from fasfx.tools.bench.tasks import Task

SAME, APART = 0.998, 0.001  # of the predictions; difference of the accuracies
PERCENT = "{:.2%}"


def deployed(task: Task, networks: Mapping[str, fasfx.SpikingModel], rows: int | None, slack: float) -> Table:
    """A column for every network, on (the first) rows to measure on. slack: how much wider targets are."""
    figures = [_compared(task, snn, rows) for snn in networks.values()]
    same, torchs, onnx, seconds = zip(*figures, strict=True)
    lines = [
        at_least("same predictions", same, SAME - slack, PERCENT),
        plain("accuracy in torch", torchs, PERCENT),
        plain("accuracy in ONNX Runtime", onnx, PERCENT),
        at_most("difference", [abs(a - b) for a, b in zip(torchs, onnx, strict=True)], APART + slack, PERCENT),
        plain("wall time, s", seconds, "{:.0f}"),
    ]
    note = "Wall time: of the export and of both networks on all rows; ONNX Runtime on the CPU."
    return Table(f"{task.name}: in ONNX Runtime", ("", *networks), lines, note)


def _compared(task: Task, snn: fasfx.SpikingModel, rows: int | None) -> tuple[float, float, float, float]:
    """(share of predictions that are the same, accuracy in torch, accuracy in ONNX Runtime, seconds)"""
    start = time.perf_counter()
    batches = task.batches(task.test[:rows])
    labels = torch.cat([batch["labels"] for batch in batches])
    with tempfile.TemporaryDirectory() as folder:
        with cases.undisturbed():
            copy.deepcopy(snn).cpu().to_onnx(folder)
            network = fasfx.runtime.OnnxModel(folder, threads=torch.get_num_threads())
        there = all_logits(network, batches).argmax(-1)
    here = all_logits(snn, task.batches(task.test[:rows], device_of(snn))).argmax(-1)
    shares = [float(found.float().mean()) for found in (here == there, here == labels, there == labels)]
    return shares[0], shares[1], shares[2], time.perf_counter() - start
