"""Spike trains: the events of every site of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fasfx import ops
from fasfx.program import arg


@dataclass(frozen=True)
class SpikeTrain:
    """The spikes one site sends.

    events: int8 [T, ...]; -1, 0, 1, and +-(i + 1) naming the level of a multi neuron.
    scale:  value of one count, theta / N, broadcastable to the site's value.
    code, levels: how to decode.
    """

    events: Tensor
    scale: Tensor
    code: str
    levels: int

    def counts(self) -> Tensor:
        """The integers the synaptic operation computes with, shape of the site's value, int32."""
        return ops.CODES[self.code].decode(self.events, self.levels)

    def decode(self) -> Tensor:
        """The values transmitted: counts * theta / N, in the unit of the site."""
        return self.counts().to(self.scale.dtype) * self.scale

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and time step, in [0, 1]."""
        return float((self.events != 0).to(torch.float32).mean())

    def __repr__(self) -> str:
        return f"SpikeTrain({self.code}, {list(self.events.shape)}, firing rate {self.firing_rate:.3f})"


class SpikeRecorder(Interpreter):
    """Runs a lowered program and keeps the spike train of every site.

    thresholds: theta of the sites whose threshold is static; the others' is read from the run.
    """

    def __init__(self, gm: GraphModule, thresholds: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self._thresholds = thresholds
        self.trains: dict[str, SpikeTrain] = {}

    def run_node(self, n: Node) -> Any:
        """Note the spikes of a neuron, then run it."""
        if n.target is ops.count.op:
            self._record(n)
        return super().run_node(n)

    def _record(self, node: Node) -> None:
        arguments: Any = self.map_nodes_to_values(node.args, node)
        u, code, steps, levels, signed = arguments
        row, site = ops.CODES[code], str(node.meta["site"])
        events = row.spikes(u, steps, levels, signed)
        theta = self._thresholds.get(site)
        if theta is not None:
            scale = theta.to(u) / row.capacity(steps, levels)
        else:  # u = x / (theta / N), with theta the row's own maximum
            scale = self.env[arg(arg(node, 0), 1)]
        self.trains[site] = SpikeTrain(events, scale, code, levels)
