"""Spike counts of ONNX Runtime and torch, site by site with the same inputs.

A spiking network amplifies rounding, so whole runs may part ways although both are right. Three comparisons give
both backends the same inputs, all in one forward pass of real text:

| what is compared   | same inputs                                                               |
|--------------------|---------------------------------------------------------------------------|
| neuron alone       | torch's u, fed to the neuron cut out of the exported network               |
| neuron in the net  | ONNX Runtime's own u, read out of the exported network, fed to torch      |
| everything between | the spikes of all sites before: torch runs the network, at every site its |
|                    | counts are compared and then replaced by those of ONNX Runtime            |

Reading u and the counts makes them outputs of the exported graph, which may keep ONNX Runtime from some fusions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

import fasfx
from fasfx import ops
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.timing import session_options

ALONE, WITHIN, BETWEEN = "neuron alone", "neuron in the net", "everything between"
Neuron = tuple[str, int, int, bool]  # code, steps, levels, signed


class Tally(NamedTuple):
    """How many counts of a site were compared, how many differ, and how many by more than one quantum."""

    compared: int = 0
    differing: int = 0
    beyond: int = 0


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


class Exposed:
    """An exported network that also returns u and the count of every site, in the order of the sites."""

    def __init__(self, folder: Path, code: str) -> None:
        self.model = onnx.load(folder / "model.onnx", load_external_data=False)
        self._makers = {name: node for node in self.model.graph.node for name in node.output}
        counts = sorted((n for n in self._makers if re.fullmatch(r"count(_\d+)?", n)), key=lambda n: int(n[6:] or 0))
        hops = 7 if code == "multi" else 3  # operators of the neuron from its count back to u, see onnx_count
        self.sites = [(self._upstream(name, hops), name) for name in counts]
        exposed = onnx.ModelProto()
        exposed.CopyFrom(self.model)
        known = {value.name for value in exposed.graph.output}
        exposed.graph.output.extend(_values({name for site in self.sites for name in site} - known))
        onnx.save(exposed, folder / "exposed.onnx")
        self.session = onnxruntime.InferenceSession(folder / "exposed.onnx", session_options())

    def _upstream(self, name: str, hops: int) -> str:
        for _ in range(hops):
            name = self._makers[name].input[0]
        return name

    def alone(self, u: str, count: str) -> Any:
        """A session of one neuron, cut out of the exported network: u of any shape -> counts."""
        wanted, needed = [count], set[str]()
        while wanted:
            name = wanted.pop()
            if name != u and name not in needed:
                needed.add(name)
                wanted += self._makers[name].input if name in self._makers else ()
        graph = self.model.graph
        nodes = [node for node in graph.node if node.output[0] in needed]
        numbers = [number for number in graph.initializer if number.name in needed]
        cut = onnx.helper.make_graph(nodes, "neuron", _values({u}), _values({count}), numbers)
        model = onnx.helper.make_model(cut, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        return onnxruntime.InferenceSession(model.SerializeToString(), session_options())

    def __call__(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(u, count) of every site."""
        names = [name for site in self.sites for name in site]
        inputs = {value.name: batch[value.name].numpy() for value in self.session.get_inputs()}
        values = [torch.from_numpy(value) for value in self.session.run(names, inputs)]
        return list(zip(values[::2], values[1::2], strict=True))


def _values(names: set[str]) -> list[Any]:
    return [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(names)]


class Forced(Interpreter):
    """Runs a lowered program in torch, compares every site's counts with those given, and goes on with these."""

    def __init__(self, snn: fasfx.SpikingModel, given: list[tuple[Tensor, Tensor]], alone: dict[Neuron, Any]) -> None:
        super().__init__(snn.graph_module)
        self._given, self._alone = iter(given), alone
        self.tallies: dict[str, dict[str, Tally]] = defaultdict(dict)  # comparison: site: tally

    def run_node(self, n: Node) -> Any:
        """A site's counts are compared and replaced; any other node runs as it is."""
        value = super().run_node(n)
        if n.target is not ops.count.op:
            return value
        u, *neuron = self.fetch_args_kwargs_from_env(n)[0]
        theirs_u, theirs = next(self._given)
        kind, site = tuple(neuron), str(n.meta["site"])
        alone = self._alone[kind].run(None, {self._alone[kind].get_inputs()[0].name: u.flatten().numpy()})[0]
        self.tallies[ALONE][site] = compare(torch.from_numpy(alone), value.flatten(), kind)
        self.tallies[WITHIN][site] = compare(theirs, ops.count.count(theirs_u, *kind), kind)
        self.tallies[BETWEEN][site] = compare(theirs, value, kind)
        return theirs


@torch.no_grad()
def tallies(snn: fasfx.SpikingModel, folder: Path, batches: list[Batch]) -> dict[str, dict[str, Tally]]:
    """Comparison: site: tally over all batches. `folder` holds the export of snn; exposed.onnx is added to it."""
    exposed, total = Exposed(folder, snn.spike_config.code), dict[str, dict[str, Tally]]()
    neurons = [n.args[1:] for n in snn.graph_module.graph.find_nodes(op="call_function", target=ops.count.op)]
    one_of_a_kind: dict[Any, tuple[str, str]] = dict(zip(neurons, exposed.sites, strict=True))
    alone = {kind: exposed.alone(*site) for kind, site in one_of_a_kind.items()}
    for batch in batches:
        run = Forced(snn, exposed(batch), alone)
        run.run(*snn._inputs((), batch).values())
        for name, sites in run.tallies.items():
            row = total.setdefault(name, {})
            for site, tally in sites.items():
                row[site] = Tally(*(a + b for a, b in zip(row.get(site, Tally()), tally, strict=True)))
    return total
