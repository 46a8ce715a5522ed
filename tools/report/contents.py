"""What the report says in words, tiles and tables."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from fasfx import ops
from fasfx.coverage import TABLE
from fasfx.equivalence import Equivalence
from fasfx.model import SpikingModel
from fasfx.program import arg, source_line
from fasfx.runtime.energy import EnergyReport

PACKAGES = ("fasfx", "torch", "transformers", "onnxruntime", "vl-convert-python")
SITE_COLUMNS = {
    "snr_db": "signal-to-noise, dB",
    "firing_rate": "firing rate",
    "clip_share": "clip share",
    "dead_share": "dead share",
    "predicted": "error it causes",
}
GROUP_COLUMNS = {
    "neurons": "neurons",
    "bound": "certified bound",
    "measured": "largest error",
    "clip_share": "clip share",
    "predicted": "error it causes",
}


def contents(
    model: nn.Module, snn: SpikingModel, graph: Graph, measured: Equivalence, spent: EnergyReport
) -> dict[str, Any]:
    """Everything the page's template reads. graph: of the network at SPIKING, groups in closed form."""
    lines = _source_lines(graph)
    return {
        "title": f"{type(model).__name__}, spiking",
        "subtitle": f"{snn.spike_config.code} code, T = {snn.timesteps}, {snn.schedule} schedule",
        "tiles": list(_tiles(snn, measured, spent)),
        "errors": _errors(measured),
        "tick": "tick" if snn.schedule == "synchronous" else "T",
        "sites": _table(measured.sites, "site", SITE_COLUMNS, lines),
        "groups": _table(measured.groups, "group", GROUP_COLUMNS, lines),
        "totals": spent.totals.to_dict("records"),
        "bits": spent.bits,
        "headline": spent.headline,
        "problems": spent.problems.to_dict("records"),
        "left": [row for row in snn.coverage.rows if row.kind != TABLE and not row.spike_driven],
        "configuration": asdict(snn.spike_config),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _tiles(snn: SpikingModel, measured: Equivalence, spent: EnergyReport) -> Iterator[tuple[str, str, str]]:
    """(figure, what it is, a remark)."""
    error = measured.table.set_index("timesteps").relative_l2[snn.timesteps]
    yield f"{error:.3%}", f"error at T = {snn.timesteps}", "relative L2 error of the output"
    reached = measured.latency(0.01)
    yield (
        f"{reached['ticks']} ticks" if reached else "not reached",
        "until an error of 1 %",
        f"T = {reached['timesteps']}, {snn.schedule}" if reached else "for no T measured",
    )
    yield f"{spent.spikes:.2f}", "spikes per value", "sites, all steps together"
    yield (
        f"{snn.coverage.spike_driven_macs:.1%}",
        "of multiply-accumulates by spikes",
        f"{snn.coverage.spike_driven_operators:.1%} of operators",
    )
    for row in spent.totals.itertuples():
        yield (
            f"{1 - row.saved:.3g} ×",
            f"the original's energy, {row.counting}",
            f"{row.not_spiking:.1%} of it not spiking",
        )


def _errors(measured: Equivalence) -> list[dict[str, float]]:
    """The table of error against T, with how many times error and bound fall for one step more."""
    rows: list[dict[str, float]] = measured.table.to_dict("records")
    for before, row in zip([rows[0], *rows], rows, strict=False):
        steps = row["timesteps"] - before["timesteps"]
        for name in ("relative_l2", "bound"):
            known = steps > 0 and row[name] > 0
            row[f"{name}_falls"] = (before[name] / row[name]) ** (1 / steps) if known else math.nan
    return rows


def _table(frame: Any, kind: str, columns: dict[str, str], lines: dict[str, str]) -> dict[str, Any]:
    """Rows with their cells: (value, how to write it, share of the column's largest)."""
    rows: list[dict[str, Any]] = frame.to_dict("records")
    spans = {name: _span([float(row[name]) for row in rows]) for name in columns}
    return {
        "columns": list(columns.values()),
        "rows": [
            {
                "name": row[kind],
                "module": row["module"],
                "function": row.get("function", ""),
                "source": _short(lines.get(row[kind], "")),
                "link": _link(lines.get(row[kind], "")),
                "cells": [_cell(name, float(row[name]), *spans[name]) for name in columns],
            }
            for row in rows
        ],
    }


def _span(values: list[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def _cell(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    """Darker is worse: a low signal-to-noise ratio, a high anything else."""
    if not math.isfinite(value):
        return {"value": "", "text": "exact" if name == "snr_db" and value > 0 else "–", "heat": 0.0}
    share = (value - low) / (high - low) if high > low else 0.0
    text = f"{value:.1f}" if name == "snr_db" else f"{value:.0f}" if name == "neurons" else f"{value:.3g}"
    return {"value": value, "text": text, "heat": round(1 - share if name == "snr_db" else share, 3)}


def _source_lines(graph: Graph) -> dict[str, str]:
    """Site or group -> the line of the model's code that made the value."""
    found = {}
    for node in graph.nodes:
        if node.target is ops.fire.op:
            made = arg(node, 0)
            found[str(node.meta["site"])] = source_line(made if isinstance(made, Node) else node)
        elif node.target is ops.lookup.op:
            found[str(node.meta["group"])] = source_line(node)
    return found


def _short(line: str) -> str:
    return line.split(" in ")[0]


def _link(line: str) -> str:
    """Where transformers' code can be read; other code has no address."""
    path, _, number = _short(line).rpartition(":")
    if not path.startswith("transformers/"):
        return ""
    release = version("transformers")
    return f"https://github.com/huggingface/transformers/blob/v{release}/src/{path}#L{number}"
