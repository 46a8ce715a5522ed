"""A program is a torch.fx.GraphModule whose facts live in `gm.meta["fasfx"]`; helpers to read its nodes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._pytree import TreeSpec

from fasfx.config import SpikeConfig
from fasfx.ledger import Ledger
from fasfx.logs import channel
from fasfx.ops import GROUPS, NEURONS

FACTS = "fasfx"
aten = torch.ops.aten


@dataclass
class Site:
    """A value that becomes spikes.

    name:    the node's name.     module: path of the module that made the value.
    channel: dims with a threshold of their own under granularity "channel", counted from the end.
    signed:  whether the value can be negative (from the operator that made it, not from data).
    peak:    largest |value| seen in calibration, shape of the channel dims ([] until observed).
    tail:    99.9th percentile of |value|, largest over the batches; same shape.
    moment:  mean of x x' over the rows x seen in calibration, for blocks of adjacent channels [K, D / K, D / K]; of a
             dynamic one's over its row's largest |value|; only where weights are to be int8, until round has used it.
    lift:    what is added to the spike count before it is rounded, so that on average the rounded sum is the sum.
    fixed:   a threshold known without data (1 for exponentials of deferred softmax), or None.
    population: neurons per value, each with T spikes; twice as many where it meets another value element by element.
    dynamic: whether the threshold is each row's own, its largest |value| (granularity "token"; gated values, where
             counts are bytes).
    theta:   the threshold that stage I trained, which then holds instead of the calibrated one.
    tuned:   the one that stage II found, which holds before both.
    initial: initial membrane potential that stage II found, on top of theta / 2; same unit, broadcasts like theta.
    """

    name: str
    module: str
    channel: tuple[int, ...]
    signed: bool
    fixed: float | None = None
    population: int = 1
    dynamic: bool = False
    peak: Tensor | None = None
    tail: Tensor | None = None
    moment: Tensor | None = None
    lift: float = 0.0
    theta: Tensor | None = None
    tuned: Tensor | None = None
    initial: Tensor | None = None

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of every channel, [D], from the moment."""
        assert self.moment is not None
        return self.moment.diagonal(dim1=-2, dim2=-1).flatten().sqrt()


@dataclass(frozen=True)
class Declined:
    """A rule that matched and did not rewrite, and why."""

    pass_name: str
    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class Ran:
    """One line of history: pass, level reached, seconds, nodes after."""

    pass_name: str
    level: str
    seconds: float
    nodes: int


@dataclass
class Facts:
    """Everything a program knows about itself."""

    level: str
    config: SpikeConfig
    constants: dict[str, Any] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)  # torch's symbol -> "batch", "length"
    sites: dict[str, Site] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    declined: list[Declined] = field(default_factory=list)
    history: list[Ran] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # the passes of the stored program that this one was read from
    tick: str = ""  # the input of a step graph that holds the number of the tick
    states: dict[str, str] = field(default_factory=dict)  # site -> input that holds its state, in the graph's order
    centres: list[str] = field(default_factory=list)  # differences whose second argument observe is to find
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # function without tails -> its input's range
    trainable: bool = False  # captured for training: weights keep their names, dropout is there
    trained: int | None = None  # T of the closed forms, or of the ticks, that stage I trained with
    through_time: bool = False  # whether it trained the ticks
    tuned: int | None = None  # T that stage II tuned for
    lifted: int | None = None  # T that the lifts of sites were found for
    tuning: list[dict[str, Any]] = field(default_factory=list)  # stage II: every site's error after each stage
    outputs: TreeSpec | None = None  # how a step graph's output leaves make the model's own output

    @property
    def passed(self) -> list[str]:
        """The names of all passes that the program has been through, in order."""
        return [*self.before, *(ran.pass_name for ran in self.history)]

    @property
    def added(self) -> set[str]:
        """The inputs of a step graph that are not the model's."""
        return {self.tick, *self.states.values()}


def facts(gm: GraphModule) -> Facts:
    """The facts of a program; KeyError-free because every program has them from capture on."""
    found = gm.meta.get(FACTS)
    assert isinstance(found, Facts), "not a fasfx program: capture it first"
    return found


def decline(gm: GraphModule, pass_name: str, rule: str, node: str, reason: str) -> None:
    """Note that a rule matched at a node and did not rewrite, and why."""
    facts(gm).declined.append(Declined(pass_name, rule, node, reason))
    channel("declined").info("%s: %s at %s: %s", pass_name, rule, node, reason)


def copy_program(gm: GraphModule) -> GraphModule:
    """A copy with its own graph and facts that shares every tensor."""
    facts_copy = copy.copy(facts(gm))
    for name in ("constants", "symbols", "sites", "ranges"):
        setattr(facts_copy, name, dict(getattr(facts_copy, name)))
    facts_copy.ledger = Ledger(list(facts_copy.ledger.entries))
    facts_copy.declined, facts_copy.history = list(facts_copy.declined), list(facts_copy.history)
    graph = torch.fx.Graph()
    values: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, values))
    graph._codegen = copy.copy(gm.graph._codegen)
    output, old_output = graph.output_node(), gm.graph.output_node()
    output.meta, output.name = copy.copy(old_output.meta), old_output.name
    new = _LazyGraphModule(gm, graph)  # compiled when it is called or handed out: most copies are neither
    new.meta = {**gm.meta, FACTS: facts_copy}
    new.train(gm.training)
    return new


def operators(gm: GraphModule) -> Iterator[Node]:
    """All call_function nodes in order."""
    return (node for node in gm.graph.nodes if node.op == "call_function")


def arg(node: Node, position: int) -> Any:
    """An argument of a node; torch.fx types it as a union of everything."""
    return node.args[position]


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of a call by its name in the operator's schema, defaults filled in."""
    found = node.normalized_arguments(torch.nn.Module(), normalize_to_only_use_kwargs=True)
    assert found is not None
    return dict(found.kwargs)


def drops(gm: GraphModule) -> bool:
    """Whether any dropout of a program is on."""
    return any(node.args[2] for node in gm.graph.find_nodes(op="call_function", target=aten.dropout.default))


def set_dropout(gm: GraphModule, active: bool) -> None:
    """Switch every dropout of a program on or off."""
    nodes = [n for n in gm.graph.find_nodes(op="call_function", target=aten.dropout.default) if n.args[2] != active]
    for node in nodes:
        node.update_arg(2, active)
    if nodes:
        gm.recompile()


def fake(node: Any) -> Tensor | None:
    """The fake tensor a node stands for, if it is one."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def module_path(node: Node) -> str:
    """Path of the innermost user module the node came from ("" for the top)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return (
        path.removeprefix("L['self'].")
        .replace("L['self']", "")
        .replace("_empty_nn_module_stack_from_metadata_hook", "")
    )


def source_line(node: Node) -> str:
    """The innermost line of the user's own code that made the node, as path:line in function: code; or ""."""
    trace = str(node.meta.get("stack_trace") or "")
    frames = re.findall(r'File "(.*?)", line (\d+), in (\S+)\n?\s*(.*)', trace)
    if not frames:
        return trace.strip()
    path, line, function, code = ([f for f in frames if "/torch/" not in f[0]] or frames)[-1]
    return f"{path.split('site-packages/')[-1]}:{line} in {function}: {code}".strip(" :")


def describe(node: Node) -> str:
    """One line for errors: node, its call, its module and source line."""
    where = module_path(node)
    text = f"{node.name} = {node.format_node() or node.name}".split(" : ")[0]
    text = f"{text} [{getattr(node.target, '__name__', node.target)}]"
    return text + (f" in {where}" if where else "") + (f"\n    {line}" if (line := source_line(node)) else "")


def constants(gm: GraphModule) -> set[Node]:
    """Nodes whose value depends on no input: weights, and what is computed from weights alone."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def attribute(gm: torch.nn.Module, path: str) -> Any:
    """The tensor behind a get_attr path."""
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value


def set_attribute(gm: torch.nn.Module, path: str, value: Tensor) -> None:
    """Put a tensor in the place of the one behind a get_attr path; parameters stay parameters."""
    *parents, name = path.split(".")
    holder = attribute(gm, ".".join(parents)) if parents else gm
    setattr(holder, name, torch.nn.Parameter(value, value.requires_grad) if name in holder._parameters else value)


def freeze(gm: GraphModule) -> None:
    """No gradients, by parameters of its own that share their storage: the caller's stay trainable."""
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach(), requires_grad=False)


def add_tensor(gm: GraphModule, name: str, value: Tensor, like: Node, trainable: bool = False) -> Node:
    """Register a new tensor under a free name and read it just before `like`; the old one stays untouched."""
    free, number = name.replace(".", "_"), 0
    while hasattr(gm, candidate := free if number == 0 else f"{free}_{number}"):
        number += 1
    if trainable:
        gm.register_parameter(candidate, torch.nn.Parameter(value))
    else:
        gm.register_buffer(candidate, value.detach())
    with gm.graph.inserting_before(like):
        node = gm.graph.get_attr(candidate)
    mode = fake_mode(gm.graph)
    node.meta["val"] = (
        mode.from_tensor(value.detach(), static_shapes=True) if isinstance(mode, FakeTensorMode) else value
    )
    return node


def insert(gm: GraphModule, before: Node, origin: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new call just before a node, with the provenance of `origin` and its shape inferred."""
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(target, args, kwargs)
    inherit(node, origin)
    infer_node(node)
    return node


def inherit(node: Node, origin: Node) -> None:
    """Give a new node the provenance of the node it came from."""
    for key in ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack"):
        if key in origin.meta and key not in node.meta:
            node.meta[key] = origin.meta[key]
    for kind, carriers in (("site", NEURONS), ("group", GROUPS)):
        if node.target in carriers and kind in origin.meta:
            node.meta[kind] = origin.meta[kind]


def infer_node(node: Node) -> None:
    """Compute meta["val"] of one node from those of its inputs, symbols kept."""
    inputs = node.all_input_nodes
    if node.op != "call_function" or any("val" not in n.meta for n in inputs):
        return
    if _is_multiple(node):
        node.meta["val"] = inputs[0].meta["val"]
        return
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with fake_mode(node.graph), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _is_multiple(node: Node) -> bool:
    """Whether a node is a floating point value times a number: what folding inserts most."""
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], float):
        return False
    value = fake(node.args[0])
    return value is not None and value.is_floating_point()


def fake_mode(graph: torch.fx.Graph) -> AbstractContextManager[Any]:
    """The mode of the graph's fake tensors; its inputs know it."""
    inputs = (fake(node) for node in graph.find_nodes(op="placeholder"))
    return next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), nullcontext())
