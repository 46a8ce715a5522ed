"""Spike rasters: neurons against time steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fasfx.errors import InputError
from fasfx.runtime.spikes import SpikeTrain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES, NEURONS = 6, 60


def raster(trains: Mapping[str, SpikeTrain], path: str | Path | None = None, neurons: int = NEURONS) -> Figure:
    """A dot for every spike, blue for positive, red for negative, larger where it weighs more; up to six sites.

    trains: what SpikingModel.spikes gives. neurons: how many of a site, evenly taken. Saved if a path is given.
    Raises InputError if there is no site.
    """
    from matplotlib.figure import Figure

    if not trains:
        raise InputError("nothing to draw: the network has no spiking site")
    names = [*trains]
    chosen = [names[i * len(names) // min(SITES, len(names))] for i in range(min(SITES, len(names)))]
    figure = Figure(figsize=(11, 1.2 + 2.4 * ((len(chosen) + 2) // 3)), layout="constrained")
    axes = figure.subplots((len(chosen) + 2) // 3, min(3, len(chosen)), squeeze=False).flatten()
    for axis, name in zip(axes, chosen, strict=False):
        train = trains[name]
        events = train.events.flatten(1)
        events = events[:, :: max(1, events.shape[1] // neurons)][:, :neurons].to(torch.int32)
        steps, rows = events.nonzero(as_tuple=True)
        found = events[steps, rows]
        size = 40 * 0.8 ** (found.abs() - 1).float() if train.code == "multi" else torch.full(found.shape, 12.0)
        colors = ["tab:blue" if event > 0 else "tab:red" for event in found.tolist()]
        axis.scatter(steps + 1, rows, s=size, c=colors)
        axis.set(title=name, xlim=(0.5, len(events) + 0.5), ylim=(-1, events.shape[1]))
        axis.set(xlabel="time step", ylabel="neuron")
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
