"""Spike counts of ONNX Runtime and torch, site by site with the same inputs.

A spiking network amplifies rounding, so whole runs may part ways although both are right. Three comparisons give
both backends the same inputs, all in one forward pass of real text:

| what is compared   | same inputs                                                               |
|--------------------|---------------------------------------------------------------------------|
| neuron alone       | torch's u, fed to the neuron cut out of the exported network              |
| neuron in the net  | ONNX Runtime's own u, read out of the exported network, fed to torch      |
| everything between | the spikes of all sites before: torch runs the network, at every site its |
|                    | counts are compared and then replaced by those of ONNX Runtime            |

Reading u and the counts makes them outputs of the exported graph, which may keep ONNX Runtime from some fusions.
Every backend rounds the sums in between in its own order, so a few counts flip at the edge of a quantum. How many
flips rounding makes is measured too: torch in float32 against torch in float64, given the same spikes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import fasfx
from fasfx import ops
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.exposed import Exposed

ALONE, WITHIN, BETWEEN = "neuron alone", "neuron in the net", "everything between"
ROUNDING = "float32 against float64"
Neuron = tuple[str, int, int, bool]  # code, steps, levels, signed
Tallies = dict[str, dict[str, "Tally"]]  # comparison: site: tally


class Tally(NamedTuple):
    """How many counts of a site were compared, how many differ, and how many by more than one quantum."""

    compared: int = 0
    differing: int = 0
    beyond: int = 0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


def compare(found: Tensor, expected: Tensor, neuron: Neuron) -> Tally:
    """Counts of two backends. A quantum: 1, or for the multi code the step to the next value it can send."""
    apart = found != expected
    a, b = found[apart], expected[apart]
    if neuron[0] == "multi":  # is there a value between a and b that the neuron sends?
        between = a + (b - a) * torch.linspace(0, 1, 17, dtype=a.dtype).unsqueeze(-1)
        sent = ops.count.count(between, *neuron)
        beyond = ((sent != a) & (sent != b)).any(0)
    else:
        beyond = (a - b).abs() > 1
    return Tally(found.numel(), int(apart.sum()), int(beyond.sum()))


class _Sites(Interpreter):
    """Runs a lowered program; `visit` gets every site's node, u and count, and says what to go on with."""

    def __init__(self, gm: GraphModule, visit: Callable[[Node, Tensor, Tensor], Tensor]) -> None:
        super().__init__(gm)
        self._visit = visit

    def run_node(self, n: Node) -> Any:
        """A count goes through `visit`; any other node runs as it is."""
        value = super().run_node(n)
        if n.target is not ops.count.op:
            return value
        (u, *_), _ = self.fetch_args_kwargs_from_env(n)
        return self._visit(n, u, value)


@torch.no_grad()
def tallies(snn: fasfx.SpikingModel, folder: Path, batches: list[Batch], device: str = "cpu") -> Tallies:
    """The three comparisons over all batches. `folder` holds the export of snn; exposed.onnx is added to it."""
    exposed, total = Exposed(folder, snn.spike_config.code, device), Tallies()
    nodes = snn.graph_module.graph.find_nodes(op="call_function", target=ops.count.op)
    alone = {node.args[1:]: site for node, site in zip(nodes, exposed.sites, strict=True)}  # one site of each kind
    sessions = {neuron: exposed.alone(*site) for neuron, site in alone.items()}
    for batch in batches:
        theirs = iter(exposed(batch))

        def visit(node: Node, u: Tensor, count: Tensor) -> Tensor:
            their_u, their_count = next(theirs)  # noqa: B023
            neuron: Any = node.args[1:]
            session = sessions[neuron]
            alone = session.run(None, {session.get_inputs()[0].name: u.contiguous().numpy()})[0]
            _add(total, ALONE, node, compare(torch.from_numpy(alone), count, neuron))
            _add(total, WITHIN, node, compare(their_count, ops.count.count(their_u, *neuron), neuron))
            _add(total, BETWEEN, node, compare(their_count, count, neuron))
            return their_count

        _Sites(snn.graph_module, visit).run(*snn._inputs((), batch).values())
    return total


def _add(total: Tallies, what: str, node: Node, tally: Tally) -> None:
    row = total.setdefault(what, {})
    row[str(node.meta["site"])] = tally.plus(row.get(str(node.meta["site"]), Tally()))


@torch.no_grad()
def rounding(snn: fasfx.SpikingModel, batch: Batch) -> Tallies:
    """Counts that float32 sums flip: the same spikes summed in float32 and float64, then the same float32 neuron."""
    inputs, counts, total = tuple(snn._inputs((), batch).values()), list[Tensor](), Tallies()

    def keep(node: Node, u: Tensor, count: Tensor) -> Tensor:
        counts.append(count)
        return count

    def check(node: Node, u: Tensor, count: Tensor) -> Tensor:
        neuron: Any = node.args[1:]
        single = counts.pop(0)
        _add(total, ROUNDING, node, compare(ops.count.count(u.float(), *neuron), single, neuron))
        return single.double()

    _Sites(snn.graph_module, keep).run(*inputs)
    _Sites(_in_float64(snn.graph_module), check).run(*inputs)
    return total


def _in_float64(gm: GraphModule) -> GraphModule:
    """A copy that computes in float64, also where the graph names float32."""
    double = copy.deepcopy(gm).double()
    for node in double.graph.nodes:
        node.args = tuple(torch.float64 if value is torch.float32 else value for value in node.args)
        node.kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in node.kwargs.items()}
    return double
