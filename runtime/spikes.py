"""Spike trains: the events of every site of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen

from fasfx import ops
from fasfx.errors import InputError
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.reductions import REDUCTIONS
from fasfx.passes import Clip, Substitute
from fasfx.passes.lower import look_up
from fasfx.program import arg, arguments, attribute, facts
from fasfx.runner import Runner

if TYPE_CHECKING:
    from fasfx.model import SpikingModel


@dataclass(frozen=True)
class SpikeTrain:
    """The spikes one site sends.

    events: int8 [T, ...], or [2 T, ...] where two neurons send a value, two rows for every step; -1, 0, 1, and
            +-(i + 1) naming the level of a multi neuron.
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
    """Runs a lowered program, or a step graph tick by tick, and keeps the spikes of every site.

    thresholds: theta of the sites whose threshold is static; the others' is read from the run.
    """

    def __init__(self, gm: GraphModule, thresholds: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self._thresholds, self._config, self._sites = thresholds, facts(gm).config, facts(gm).sites
        self._events: dict[str, list[Tensor]] = {}
        self._scales: dict[str, Tensor] = {}  # theta of one value, by site

    @property
    def trains(self) -> dict[str, SpikeTrain]:
        """Site name -> the spikes sent in all runs so far."""
        config = self._config
        found = {}
        for site, parts in self._events.items():
            events = torch.cat(parts)
            capacity = ops.CODES[config.code].capacity(len(events), config.levels)
            found[site] = SpikeTrain(events, self._scales[site] / capacity, config.code, config.levels)
        return found

    def run_node(self, n: Node) -> Any:
        """Note the spikes of a neuron, running it, and move those of one that stands before a view of its site."""
        result = super().run_node(n)
        if n.target in ops.CLOSED | {ops.tick.op}:
            self._record(n, result)
        elif (site := n.meta.get("moves_spikes_of")) in self._events:
            move: Any = n.target
            given: Any = self.map_nodes_to_values(n.args, n)
            _, *how = given
            self._events[site][-1] = torch.stack([move(step, *how) for step in self._events[site][-1]])
        return result

    def _record(self, node: Node, result: Tensor) -> None:
        arguments: Any = self.map_nodes_to_values(node.args, node)
        site = str(node.meta["site"])
        if node.target in ops.CLOSED:
            u, code, steps, levels, signed = arguments
            events = ops.CODES[code].spikes(u, steps, levels, signed)
        else:
            u, sent, _, code, levels, _ = arguments
            events = ops.tick.ticking(code).event(result - sent, levels).unsqueeze(0)
        self._keep(site, events)
        theta = self._thresholds.get(site)
        if theta is None:  # u = x / (theta / unit), with theta the row's own maximum
            _, steps, _ = self._config.neuron(self._sites[site].population)
            theta = self.env[arg(arg(node, 0), 1)] * self._config.unit(steps)
        self._scales[site] = theta.to(u)

    def _keep(self, site: str, events: Tensor) -> None:
        self._events.setdefault(site, []).append(events)


class SpikeCounter(SpikeRecorder):
    """Keeps numbers only: T may be large. counts: site -> spikes per step; values: site -> how many it sends."""

    def __init__(self, gm: GraphModule, thresholds: dict[str, Tensor]) -> None:
        super().__init__(gm, thresholds)
        self._counts: dict[str, list[Tensor]] = {}  # a number for every step of each neuron
        self.values: dict[str, int] = {}

    @property
    def counts(self) -> dict[str, Tensor]:
        """Site name -> number of spikes in each step, int64 [T]."""
        steps = self._config.timesteps
        return {site: torch.stack(parts).view(steps, -1).sum(1) for site, parts in self._counts.items()}

    def _keep(self, site: str, events: Tensor) -> None:
        self._counts.setdefault(site, []).extend(step.count_nonzero() for step in events)
        self.values[site] = events[0].numel()


class GroupCounter(Interpreter):
    """Runs a lowered program, or a step graph tick by tick.

    spikes: group -> spikes all its neurons send for one value, in all runs together.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.spikes: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        """Note the spikes of a group, running it."""
        if n.target is ops.lookup.op:
            name, sent = str(n.meta["group"]), sent_by_group(self.map_nodes_to_values(n.args, n))
            self.spikes[name] = self.spikes.get(name, 0.0) + float(sent.double().mean())
        return super().run_node(n)


def sent_by_group(given: Any) -> Tensor:
    """Spikes that all neurons of a group together send for each value, for these arguments of `fasfx::lookup`."""
    x, table, spikes, function, _, low, high, *_ = given
    cell, _, _ = ops.lookup.cell_of(x, table, function, low, high)
    return torch.as_tensor(spikes[cell])


def group_train(snn: SpikingModel, name: str, inputs: list[Tensor]) -> Tensor:
    """The events of one group, int8 [T, ..., K], with the input that the network gives it. InputError if unknown."""
    program = Runner([Clip(), Substitute()]).run(snn.ranged)
    nodes = {str(n.meta["group"]): n for n in program.graph.find_nodes(op="call_function", target=ops.group.op)}
    if name not in nodes:
        raise InputError(f"{name!r} is no neuron group: this network has {', '.join(nodes) or 'none'}")
    given = arguments(nodes[name])
    edges = attribute(program, str(given["edges"].target))
    program.graph.output_node().args = (given["x"],)
    program.graph.set_codegen(CodeGen())
    program.graph.eliminate_dead_code()
    look_up(program)
    x = Interpreter(program).run(*inputs)
    z, _ = REDUCTIONS[FUNCTIONS[given["function"]].reduction].split(x.to(edges.dtype))
    neurons = ops.group.neurons_of(edges, given["unit"], given["rest"])
    return torch.stack([*ops.group.events(z, neurons, given["unit"], given["code"], given["steps"])], -1)
