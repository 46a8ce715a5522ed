"""The exported step graph inside an ONNX Loop: one file serves every T."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
from torch.fx import GraphModule
from torch.utils import _pytree

from fasfx.errors import ConfigError
from fasfx.program import Facts, facts
from fasfx.runtime.ticks import placeholder_sizes

if TYPE_CHECKING:
    from transformers.exporters.base import ExportedComponent

TIMESTEPS = "timesteps"  # the input that holds T
STATES = "fasfx.states"  # metadata of a step graph


def name_states(program: onnx_ir.Model, known: Facts) -> None:
    """Call the outputs that are states next_<input>."""
    outputs = program.graph.outputs[len(program.graph.outputs) - len(known.states) :]
    for value, name in zip(outputs, known.states.values(), strict=True):
        value.name = f"next_{name}"


def describe_states(program: onnx_ir.Model, gm: GraphModule) -> None:
    """Write down, for hosts that hold the states, their shapes in terms of the sizes of the inputs."""
    known = facts(gm)
    shapes = {name: [str(size) for size in shape] for name, shape in placeholder_sizes(gm).items()}
    program.metadata_props[STATES] = json.dumps(
        {
            "tick": known.tick,
            "inputs": {name: shape for name, shape in shapes.items() if name not in known.added},
            "states": {name: shapes[name] for name in known.states.values()},
            "timesteps": known.config.timesteps,
        }
    )


def wrap_in_loop(component: ExportedComponent, known: Facts) -> None:
    """Make the step graph the body of a Loop over ticks; what does not depend on a state is computed once before.

    Input `timesteps` ([], int64) is T and defaults to the network's own. States begin as single zeros, which the
    first tick broadcasts. The outputs are those of the last tick.
    """
    graph = component.program.graph
    states = known.states
    inner = [value for value in graph.inputs if value.name in known.added]
    _take_sizes_from_inputs(graph, inner)
    outputs, inside = list(graph.outputs), _depending(graph, inner)
    for value in inner:
        graph.inputs.remove(value)
    graph.outputs.clear()
    graph.remove(inside)
    body = _body(inner, outputs, inside, known)
    steps = _with_default(graph, known.config.timesteps)
    sizes = [0] * (len(outputs) - len(states)) + [1] * len(states)
    initial = [_zeros(graph, value, size) for value, size in zip(outputs, sizes, strict=True)]
    true = _node("Constant", [], "true", {"value": onnx_ir.tensor(np.array(True))})
    names = [str(value.name) for value in outputs]
    for value in outputs:
        value.name = f"{value.name}_of_tick"
    loop = _node("Loop", [steps, true.outputs[0], *initial], names, {"body": body})
    graph.extend([true, loop])
    for result, value in zip(loop.outputs, outputs, strict=True):
        result.type, result.shape = value.type, value.shape
    graph.outputs.extend(loop.outputs[: len(outputs) - len(states)])
    _describe(component, known)


def _take_sizes_from_inputs(graph: onnx_ir.Graph, inner: list[Any]) -> None:
    """Sizes that the exporter read off a state come from an input of the model: states begin as single zeros."""
    sources: dict[str, tuple[onnx_ir.Value, int]] = {}
    for value in graph.inputs:
        for dim, size in enumerate(value.shape or ()):
            if value not in inner and not isinstance(size, int):
                sources.setdefault(str(size), (value, dim))
    for node in [n for n in graph if n.op_type == "Shape" and n.inputs[0] in inner]:
        dim, state = node.attributes.get_int("start", 0), node.inputs[0]
        assert state is not None and state.shape is not None
        name = str(state.shape[dim])
        if name not in sources or node.attributes.get_int("end", -1) != dim + 1:
            raise ConfigError(f'size {name} is known from a state only: export with form="step"')
        value, dim = sources[name]
        node.replace_input_with(0, value)
        node.attributes.add(onnx_ir.AttrInt64("start", dim))
        node.attributes.add(onnx_ir.AttrInt64("end", dim + 1))


def _body(inner: list[Any], outputs: list[Any], inside: list[Any], known: Facts) -> onnx_ir.Graph:
    """(iteration, go on, outputs of the tick before, states) -> (go on, outputs, states)."""
    iteration, go_on = _value("iteration", onnx_ir.DataType.INT64), _value("go_on", onnx_ir.DataType.BOOL)
    iteration.shape = go_on.shape = onnx_ir.Shape([])
    one = _node("Constant", [], "one", {"value": onnx_ir.tensor(np.array(1, np.int64))})
    number = _node("Add", [iteration, one.outputs[0]], "tick_number")
    keep = _node("Identity", [go_on], "keep_on")
    (tick,) = (value for value in inner if value.name == known.tick)
    tick.replace_all_uses_with(number.outputs[0])
    states = [value for value in inner if value is not tick]
    for value in states:
        value.shape = None  # the first has one element, the others their full shape
    before = [_value(f"{value.name}_before", value.dtype) for value in outputs[: len(outputs) - len(states)]]
    made = {value for node in inside for value in node.outputs}
    # Each output is a value of its own made in here; copies cost time, so only where one is not.
    own = [value in made and value not in outputs[:place] for place, value in enumerate(outputs)]
    copies = [_node("Identity", [v], f"{v.name}_now") for v, is_own in zip(outputs, own, strict=True) if not is_own]
    copied = (copy.outputs[0] for copy in copies)
    results = [value if is_own else next(copied) for value, is_own in zip(outputs, own, strict=True)]
    for result, value in zip([keep.outputs[0], *results], [go_on, *outputs], strict=True):
        result.type = value.type
    nodes = [one, number, keep, *inside, *copies]
    return onnx_ir.Graph([iteration, go_on, *before, *states], [keep.outputs[0], *results], nodes=nodes, name="tick")


def _depending(graph: onnx_ir.Graph, sources: list[Any]) -> list[Any]:
    """The nodes that compute from these inputs, in order."""
    reached, found = set(sources), []
    for node in graph:
        if any(value in reached for value in node.inputs):
            found.append(node)
            reached |= set(node.outputs)
    return found


def _with_default(graph: onnx_ir.Graph, steps: int) -> onnx_ir.Value:
    value = _value(TIMESTEPS, onnx_ir.DataType.INT64)
    value.shape, value.const_value = onnx_ir.Shape([]), onnx_ir.tensor(np.array(steps, np.int64), name=TIMESTEPS)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def _zeros(graph: onnx_ir.Graph, like: onnx_ir.Value, size: int) -> onnx_ir.Value:
    """A stored tensor of the rank of `like`, every dim of this size."""
    assert like.shape is not None and like.dtype is not None
    zeros = np.zeros([size] * len(like.shape), like.dtype.numpy())
    node = _node("Constant", [], f"{like.name}_initial", {"value": onnx_ir.tensor(zeros)})
    graph.append(node)
    return node.outputs[0]


def _node(operator: str, inputs: list[Any], outputs: str | list[str], attributes: Any = None) -> onnx_ir.Node:
    """A node whose outputs have names of their own: graphs would each count theirs from 0."""
    names = [outputs] if isinstance(outputs, str) else outputs
    return onnx_ir.node(operator, inputs, attributes, outputs=[onnx_ir.Value(name=name) for name in names])


def _value(name: str, dtype: Any) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(dtype))


def _describe(component: ExportedComponent, known: Facts) -> None:
    """The metadata of the model itself: its inputs and output, without ticks and states."""
    metadata = component.metadata
    metadata.kwargs = {name: value for name, value in metadata.kwargs.items() if name not in known.added}
    _, spec = _pytree.tree_flatten(((), dict.fromkeys(metadata.kwargs, 0)))
    metadata.in_spec = _pytree.treespec_dumps(spec)
    assert known.outputs is not None
    metadata.out_spec = _pytree.treespec_dumps(known.outputs)
