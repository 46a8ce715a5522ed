"""Synaptic operations of a spiking network, counted on data, and their energy by the papers' convention.

4.6 pJ for a 32-bit multiply-accumulate, 0.9 pJ for an accumulate (Horowitz, ISSCC 2014).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import fasfx
from fasfx.coverage import coverage
from fasfx.passes import Clip
from fasfx.runner import Runner
from fasfx.synapses import operand, synapses

MAC, AC = 4.6, 0.9


class Energy(NamedTuple):
    """Shares of the original's energy, 1 for the same.

    spiking: the papers' counting: synapses that spikes drive, over the same ones in float.
    every:   ours: every multiply-accumulate of the network, those left in float included.
    spikes:  per value sent, all steps together.
    """

    spiking: float
    every: float
    spikes: float


def energy(snn: fasfx.SpikingModel, batch: dict[str, torch.Tensor]) -> Energy:
    """Count on one batch.

    A product of two spiking values costs the spikes of both sides, or of the cheaper one where the other is complete
    before it starts (sequential).
    """
    counted = snn.count_spikes(**batch)
    per_value = counted.drop(columns="values").sum(axis=1)
    clipped = Runner([Clip()]).run(snn.ranged)
    macs = {row.node: row.macs for row in coverage(clipped).rows}
    driven = operations = 0.0
    for node, live in synapses(clipped):
        sites = [operand(node.args[position]).meta.get("site") for position in live]
        if all(sites):
            sent = [float(per_value[site]) for site in sites]
            driven += macs[node.name]
            operations += macs[node.name] * (sum(sent) if snn.schedule == "synchronous" else min(sent))
    every = sum(macs.values())
    spikes = float((per_value * counted["values"]).sum() / counted["values"].sum())
    of_driven = AC * operations / (MAC * driven) if driven else float("nan")
    return Energy(of_driven, (AC * operations + MAC * (every - driven)) / (MAC * every), spikes)
