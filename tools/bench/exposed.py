"""An exported network whose neurons can be read: every site's input u and spike count become outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from fasfx.runtime.providers import open_session
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.timing import session_options


class Exposed:
    """An exported network that also returns u and the count of every site, in the order of the sites, on a device."""

    def __init__(self, folder: Path, code: str, device: str) -> None:
        self._folder, self._device = folder, device
        self.model = onnx.load(folder / "model.onnx", load_external_data=False)
        self._makers = {name: node for node in self.model.graph.node for name in node.output}
        counts = sorted((n for n in self._makers if re.fullmatch(r"count(_\d+)?", n)), key=lambda n: int(n[6:] or 0))
        self.sites = [(self._input(name, code), name) for name in counts]
        exposed = onnx.ModelProto()
        exposed.CopyFrom(self.model)
        known = {value.name for value in exposed.graph.output}
        exposed.graph.output.extend(_values({name for site in self.sites for name in site} - known))
        self.session = self._open(exposed, "exposed.onnx")

    def _open(self, model: onnx.ModelProto, name: str) -> Any:
        """A session of a graph, which lies beside the weights."""
        onnx.save(model, self._folder / name)
        return open_session(self._folder / name, self._device, session_options())

    def _input(self, name: str, code: str) -> str:
        """u: back from the count over the neuron's operators, see onnx_count; exponentials need no Clip."""
        hops = 7 if code == "multi" else 3 if self._makers[name].op_type == "Clip" else 2
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
        return self._open(model, "neuron.onnx")

    def __call__(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(u, count) of every site."""
        names = [name for site in self.sites for name in site]
        inputs = {value.name: batch[value.name].numpy() for value in self.session.get_inputs()}
        values = [torch.from_numpy(value) for value in self.session.run(names, inputs)]
        return list(zip(values[::2], values[1::2], strict=True))


def _values(names: set[str]) -> list[Any]:
    return [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(names)]
