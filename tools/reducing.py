"""The smallest part of a program on which a pass still breaks its promise, written as a test.

Own delta debugging: torch's fx_minifier knows neither a program's facts nor which nodes are suspected, and would run
the pass on the whole network some dozens of times. The search begins with the suspects' neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_structure

from fasfx.errors import FasfxError
from fasfx.graph_text import text
from fasfx.program import FACTS, constants, copy_program, facts
from fasfx.tools import pipeline
from fasfx.tools.bisecting import Culprit, bisect
from fasfx.tools.subjects import Batch, Subject, apply_partly, store, subject
from fasfx.tools.verifying import Broken, verify

_TEST = '''"""Pass {name} on the smallest graph that shows its fault; the graph is the text in {folder}/.

{culprit}
"""

from pathlib import Path

from fasfx.tools import replay


def test_{identifier}_keeps_its_promise() -> None:
    assert replay(Path(__file__).parent / "{folder}", "{name}") == []
'''


@dataclass(frozen=True)
class Reduced:
    """A fault made small: the program before the pass, one batch of its inputs, what bisect had found."""

    culprit: Culprit
    program: GraphModule
    batch: Batch

    @property
    def operators(self) -> list[Node]:
        """The nodes that compute: all but inputs, weights and the output."""
        return [node for node in self.program.graph.nodes if node.op == "call_function"]

    @property
    def text(self) -> str:
        """The graph."""
        return text(self.program)

    def write(self, folder: Path) -> Path:
        """Write the test and the folder with its graph, weights and inputs; returns the test's path."""
        name = self.culprit.pass_name
        identifier = name.replace("-", "_").replace(".", "_")
        store(self.program, [self.batch], folder / identifier)
        test = folder / f"test_{identifier}.py"
        source = _TEST.format(name=name, identifier=identifier, folder=identifier, culprit=self.culprit)
        test.write_text(source, encoding="utf-8")
        return test


def replay(folder: Path, name: str) -> list[Broken]:
    """What a pass breaks on a stored program."""
    found = subject(folder, name)
    return _broken(name, found.program, found.batches[0])


def reduce(subject: Subject) -> Reduced | None:
    """The first pass that breaks a promise, on the smallest part of its program where it does so; None if none does."""
    culprit = bisect(subject)
    if culprit is None:
        return None
    whole = _Recorded(culprit.before, subject.inputs)
    assert culprit.node is not None
    kinds = {"value", "output"} if culprit.node.kind in ("value", "output") else {culprit.node.kind}

    def fails(nodes: set[Node]) -> bool:
        program, batch = whole.part(nodes)
        try:
            return bool(kinds & {b.kind for b in _broken(culprit.pass_name, program, batch)})
        except (FasfxError, RuntimeError, KeyError, AssertionError):  # a part on which the pass cannot run
            return False

    suspects = {culprit.node.node} | ({culprit.application.node} if culprit.application else set())
    start = next((nodes for nodes in whole.around(suspects) if fails(nodes)), None)
    if start is None:
        raise FasfxError(f"pass {culprit.pass_name} breaks no promise on its program cut out of its model: {culprit}")
    return Reduced(culprit, *whole.part(_shrunk(start, fails)))


def _broken(name: str, program: GraphModule, batch: Batch) -> list[Broken]:
    after = apply_partly(pipeline.make(name, [batch]), program, None)
    return verify(program, after, [*batch.values()])


def _shrunk(nodes: set[Node], fails: Callable[[set[Node]], bool]) -> set[Node]:
    """Without every chunk that is not needed, from halves to single nodes (Zeller's delta debugging)."""
    kept, size = sorted(nodes), len(nodes) // 2
    while size:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if rest and fails(set(rest)):
                kept = rest
            else:
                start += size
        size //= 2
    return set(kept)


class _Recorded(Interpreter):
    """A program and the value of each node for one batch; parts of it can be cut out."""

    def __init__(self, program: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(program, garbage_collect_values=False)
        self._program, self._fixed, self._values = program, constants(program), dict[Node, Any]()
        with torch.no_grad():
            self.run(*inputs)
        varying = [n for n in program.graph.nodes if n.op == "call_function" and n not in self._fixed]
        self.operators = {n for n in varying if not isinstance(self._values[n], int)}

    def run_node(self, n: Node) -> Any:
        """Keep the value."""
        self._values[n] = super().run_node(n)
        return self._values[n]

    def around(self, names: set[str]) -> Iterator[set[Node]]:
        """Growing neighbourhoods of the nodes, sites and groups of these names; at last the whole program."""
        near = {n for n in self.operators if names & {n.name, n.meta.get("site"), n.meta.get("group")}}
        while near and len(near) < len(self.operators):
            yield near
            near = near | {m for n in near for m in (*n.all_input_nodes, *n.users) if m in self.operators}
        yield self.operators

    def part(self, nodes: set[Node]) -> tuple[GraphModule, Batch]:
        """The program of these nodes only: other values become inputs, sizes become numbers."""
        graph, copied, batch, mode = Graph(), dict[Node, Any](), dict[str, Tensor](), FakeTensorMode()

        def copy(node: Node) -> Any:
            if node not in copied:
                value = self._values[node]
                if node in nodes or node in self._fixed:
                    for one in node.all_input_nodes:
                        copy(one)
                    copied[node] = graph.node_copy(node, copy)
                elif isinstance(value, Tensor):
                    copied[node] = _first_input(graph, node.name)
                    batch[node.name] = value
                else:
                    return value
                copied[node].meta = dict(node.meta)
                if isinstance(value, Tensor):
                    copied[node].meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
            return copied[node]

        ordered = [node for node in self._program.graph.nodes if node in nodes]
        for node in ordered:
            copy(node)
        results = [node for node in ordered if isinstance(self._values[node], Tensor) and _leaves(node, nodes)]
        graph.output(tuple(copied[node] for node in results))
        names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
        given, taken = tree_structure(((), dict.fromkeys(names, 0))), tree_structure((0,) * len(results))
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, taken)))
        return self._with_facts(graph), {name: batch[name] for name in names}

    def _with_facts(self, graph: Graph) -> GraphModule:
        program = GraphModule(self._program, graph)
        program.meta[FACTS] = facts(copy_program(self._program))
        there = {name for n in graph.nodes for name in (n.name, n.meta.get("site"))}
        facts(program).sites = {name: site for name, site in facts(program).sites.items() if name in there}
        facts(program).symbols = {}
        program.delete_all_unused_submodules()
        return program.eval()


def _first_input(graph: Graph, name: str) -> Node:
    """A placeholder after those that there are."""
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(next(iter(graph.nodes), None)):
        return graph.create_node("placeholder", name, name=name)


def _leaves(node: Node, nodes: set[Node]) -> bool:
    """Whether a node's value is read outside the part, or not at all in it."""
    return any(user not in nodes for user in node.users) or not any(user in nodes for user in node.users)
