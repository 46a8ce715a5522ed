"""Counting what sites and groups send in one run of a spiking network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import arguments, fake
from fasfx.runtime.spikes import SpikeRecorder, sent_by_group


@dataclass
class Sent:
    """What one site sent for one batch.

    spikes; values: how many it stands for; slots: steps of all neurons, each with a spike or without.
    low, high: the least and the largest event of each step.   digest: of the counts, tick by tick.
    reached:   convolution -> weights that the spikes met: fewer at the border.
    """

    spikes: int = 0
    values: int = 0
    slots: int = 0
    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.blake2b)
    reached: dict[str, float] = field(default_factory=dict)


class OperationCounter(SpikeRecorder):
    """Runs a lowered program, or a step graph tick by tick, and counts. groups: group -> spikes of all its neurons."""

    def __init__(self, gm: GraphModule, thresholds: dict[str, Tensor], convolutions: Mapping[str, list[Node]]) -> None:
        super().__init__(gm, thresholds)
        self._convolutions = convolutions
        self.sites: dict[str, Sent] = {}
        self.groups: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        """Note the spikes of a group, running it; those of a site are noted by `_record`."""
        if n.target is ops.lookup.op:
            sent = sent_by_group(self.map_nodes_to_values(n.args, n))
            name = str(n.meta["group"])
            self.groups[name] = self.groups.get(name, 0.0) + float(sent.double().sum())
        return super().run_node(n)

    def _record(self, node: Node, result: Tensor) -> None:
        """result: the counts of a neuron, or what it has sent after a tick."""
        counts = result.to(torch.int32).contiguous().numpy(force=True)
        self.sites.setdefault(str(node.meta["site"]), Sent()).digest.update(counts.tobytes())
        super()._record(node, result)

    def _keep(self, site: str, events: Tensor) -> None:
        sent = self.sites[site]
        sent.spikes += int(events.count_nonzero())
        sent.slots += events.numel()
        sent.values = events[0].numel()
        sent.low.append(events.flatten(1).amin(1))
        sent.high.append(events.flatten(1).amax(1))
        for node in self._convolutions.get(site, ()):
            met = float(((events != 0).sum(0) * fan_out(node, events[0])).sum())
            sent.reached[node.name] = sent.reached.get(node.name, 0.0) + met


def fan_out(node: Node, like: Tensor) -> Tensor:
    """How many weights of a convolution each value of its operand meets, shape of `like`: fewer at the border."""
    given = arguments(node)
    weight = fake(given["weight"])
    assert weight is not None
    given |= {"weight": torch.ones(weight.shape, device=like.device), "bias": None}
    with torch.enable_grad():
        x = torch.ones(like.shape, device=like.device, requires_grad=True)
        met: Any = node.target(**{**given, "input": x})  # type: ignore[operator]
        (found,) = torch.autograd.grad(met.sum(), x)
    return found
