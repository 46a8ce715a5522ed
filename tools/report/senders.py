"""What the report shows of every site: some of its spikes, and its values beside its thresholds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasfx import ops
from fasfx.local_errors import LocalErrors
from fasfx.model import SpikingModel
from fasfx.runtime.spikes import SpikeTrain

ROWS, NEURONS, BINS = 4, 40, 24  # of a batch, of a row, of a histogram


@torch.no_grad()
def senders(snn: SpikingModel, exact: LocalErrors, batch: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """rows: a label for each; code; sites: name -> spikes of every row, histograms of |value| and thresholds."""
    inputs = snn._inputs((), batch)
    exact.run(*inputs.values())
    rows = min(ROWS, min(len(value) for value in inputs.values() if value.dim()))
    found = {
        name: {**_spikes(train, rows), **_histograms(train, exact.values["site", name])}
        for name, train in snn.spikes(**batch).items()
    }
    labels = [texts[row] if row < len(texts) else f"row {row + 1}" for row in range(rows)]
    return {"rows": labels, "sites": found}


def _spikes(train: SpikeTrain, rows: int) -> dict[str, Any]:
    """int8 events of each row in base64, [steps, neurons], neurons evenly taken."""
    kept = []
    for row in range(rows):
        events = train.events[:, min(row, train.events.shape[1] - 1)].flatten(1)
        events = events[:, :: max(1, events.shape[1] // NEURONS)][:, :NEURONS]
        kept.append(base64.b64encode(events.contiguous().numpy(force=True).tobytes()).decode())
    return {"steps": len(train.events), "events": kept}


def _histograms(train: SpikeTrain, value: Tensor) -> dict[str, Any]:
    """Numbers of |value| and of thresholds between 0 and the largest of both, in BINS bins."""
    theta = (train.scale * ops.CODES[train.code].capacity(len(train.events), train.levels)).float().flatten()
    size = value.abs().float().flatten()
    size = size[size.isfinite()]
    top = max(float(theta.max()), float(size.max()) if len(size) else 0.0) or 1.0
    return {
        "top": top,
        "values": torch.histc(size, BINS, 0, top).int().tolist(),
        "thresholds": torch.histc(theta, BINS, 0, top).int().tolist(),
    }
