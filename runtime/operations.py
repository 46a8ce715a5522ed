"""What every operator of a spiking network does with a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.coverage import FLOAT, FUNCTION, SYNAPSE, Row, coverage
from fasfx.program import arguments, facts, fake
from fasfx.runtime.counting import OperationCounter, Sent
from fasfx.synapses import CONVOLUTIONS, PRODUCT, SYNAPSES, TRANSPOSED_CONVOLUTIONS, operand

if TYPE_CHECKING:
    from fasfx.model import SpikingModel

NEURON = "neuron"
QUANTITIES = ("macs", "acs", "float_macs", "functions", "float_functions", "values", "spikes", "neuron_steps")


class Operations:
    """The operators of a network, and what each does for a batch."""

    def __init__(self, snn: SpikingModel, program: GraphModule) -> None:
        self._snn, self._program = snn, program
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._rows = [row for row in coverage(program).rows if row.kind in (SYNAPSE, FUNCTION, FLOAT)]
        self._convolutions: dict[str, list[Node]] = {}
        for row in self._rows:
            node = self._nodes[row.node]
            if row.spike_driven and node.target in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS:
                self._convolutions.setdefault(_site(node.args[0]), []).append(node)

    def count(self, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Sent]]:
        """(a row for every site and operator, what each site sent)."""
        counter = OperationCounter(self._snn.graph_module, self._snn._static_thresholds(), self._convolutions)
        inputs = self._snn._inputs((), batch)
        self._snn._record(counter, inputs)
        sizes = self._sizes([*inputs.values()])
        operators_ = [self._operator(row, counter, sizes) for row in self._rows]
        return [*self._neurons(counter), *operators_], counter.sites

    def _neurons(self, counter: OperationCounter) -> Iterator[dict[str, Any]]:
        for name, site in facts(self._snn.ranged).sites.items():
            sent = counter.sites[name]
            found = {"values": sent.values, "spikes": sent.spikes, "neuron_steps": sent.slots}
            yield _row(name, site.module, "fire", NEURON, True, **found)

    def _operator(self, row: Row, counter: OperationCounter, sizes: dict[Any, int]) -> dict[str, Any]:
        node = self._nodes[row.node]
        value = fake(node)
        assert value is not None
        given = _number(value.numel(), sizes)
        if row.kind == SYNAPSE:
            macs = _number(SYNAPSES.get(node.target, PRODUCT).macs(node), sizes)
            acs = self._accumulates(node, macs, counter) if row.spike_driven else 0.0
            found = {"macs": macs, "acs": acs, "float_macs": 0 if row.spike_driven else macs}
        elif row.kind == FUNCTION:
            group = arguments(node)
            ticks = self._snn.timesteps if self._snn.schedule == "synchronous" else 1
            neurons = len(group["edges"].meta["val"]) - 1
            spikes = counter.groups[str(node.meta["group"])]
            slots = given * neurons * group["steps"] * ticks
            found = {"functions": given, "spikes": spikes, "acs": spikes, "neuron_steps": slots}
        elif row.macs:  # multiplies and accumulates, in a way that no spike can drive
            found = {"macs": given, "float_macs": given}
        else:
            found = {"functions": given, "float_functions": given}
        return _row(row.node, row.module, row.operator, row.kind, row.spike_driven, **found)

    def _accumulates(self, node: Node, macs: int, counter: OperationCounter) -> float:
        """Spikes that meet a weight.

        Of two spiking operands both sides' where both change from tick to tick (synchronous); sequentially one is held
        as accumulated counts, like weights, and the fewer spikes of the other meet it.
        """
        live = SYNAPSES.get(node.target, PRODUCT).operands
        sent = [counter.sites[site] for p in live if p < len(node.args) if (site := _site(node.args[p]))]
        met = [s.reached.get(node.name, macs * s.spikes / s.values if s.values else 0.0) for s in sent]
        return sum(met) if self._snn.schedule == "synchronous" else min(met)

    def _sizes(self, inputs: list[Tensor]) -> dict[Any, int]:
        """The symbols of the program's shapes, for these inputs."""
        found: dict[Any, int] = {}
        for node, value in zip(self._program.graph.find_nodes(op="placeholder"), inputs, strict=True):
            for dim, size in zip(node.meta["val"].shape, value.shape, strict=True):
                if isinstance(dim, torch.SymInt):
                    found[dim.node.expr] = size
        return found


def upstream(program: GraphModule) -> dict[str, set[str]]:
    """Site -> the sites before it with no other in between."""
    before: dict[Node, set[str]] = {}
    found = {}
    for node in program.graph.nodes:
        before[node] = set[str]().union(*(before[n] for n in node.all_input_nodes))
        if node.target is ops.fire.op:
            found[str(node.meta["site"])] = before[node]
            before[node] = {str(node.meta["site"])}
    return found


def _site(node: Any) -> str:
    """The site of an operand; "" for a weight or a table."""
    value = operand(node)
    return str(value.meta.get("site", "")) if isinstance(value, Node) else ""


def _row(node: str, module: str, operator: str, kind: str, driven: bool, **found: float) -> dict[str, Any]:
    named = {"node": node, "module": module, "operator": operator, "kind": kind, "spike_driven": driven}
    return named | dict.fromkeys(QUANTITIES, 0) | found


def _number(size: Any, sizes: dict[Any, int]) -> int:
    return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else int(size)
