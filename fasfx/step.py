"""The step graph: one tick of the synchronous schedule, with explicit state.

forward(*inputs, tick, *states) -> (output leaves, states): a state is what one neuron has sent so far; `tick` is the
number of this tick, from 1 on. Everything between neurons is applied to running estimates, as it stands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.graph import CodeGen

from fasfx import ops
from fasfx.config import SpikeConfig
from fasfx.errors import ConfigError
from fasfx.program import arg, constants, describe, facts, fake, fake_mode, insert
from fasfx.synapses import carried_values

aten = torch.ops.aten
_PICKING: dict[Any, int] = {  # rows move by an index; which argument is that
    aten.index.Tensor: 1,
    aten.index_select.default: 2,
    aten.gather.default: 2,
    aten.scatter.src: 2,
    aten.scatter_add.default: 2,
    aten.index_add.default: 2,
    aten.index_copy.default: 2,
    aten.index_put.default: 1,
    aten.masked_select.default: 1,
}
_CLAMPS = {aten.clamp.default, aten.clamp_min.default}
_SORTING = {aten.sort.default, aten.sort.stable, aten.topk.default, aten.unique_consecutive.default}


def make_step_graph(gm: GraphModule, folded: bool = True) -> None:
    """Turn a program into its step graph. Raises ConfigError for a site whose rows do not keep their place.

    folded: whether static thresholds are units already; else they stay in the graph, as tuning needs them.
    """
    neurons = gm.graph.find_nodes(op="call_function", target=ops.fire.op)
    _require_still(gm, neurons)
    _quotients_of_nothing(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    tick = _input(gm, inputs[-1], "tick", _number(gm))
    last, states = tick, {}
    for node in neurons:
        last = states[node] = _input(gm, last, f"sent_{node.meta['site']}", fake(node))
    fixed, sent = constants(gm), []
    for node, state in states.items():
        sent.append(_tick(gm, node, state, tick, folded and node.args[1] in fixed))
        gm.graph.erase_node(node)
    facts(gm).tick = str(tick.target)
    facts(gm).states = {node.meta["site"]: str(state.target) for node, state in states.items()}
    output = gm.graph.output_node()
    facts(gm).outputs = gm.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    output.args = ((tuple(arg(output, 0)), tuple(sent)),)
    gm.graph.set_codegen(CodeGen())


def _tick(gm: GraphModule, node: Node, state: Node, tick: Node, unit: bool) -> Node:
    """fire -> tick; readers get the running estimate. Returns what has been sent, the next state."""
    x, theta, code, _, levels, signed = node.args[:6]
    steps = int(arg(node, 3))
    config: SpikeConfig = facts(gm).config
    averages, population = ops.tick.ticking(str(code)).averages, steps // config.timesteps
    if len(node.args) > 6:
        x = _with_potential(gm, node, tick if averages else None, population)
    per_unit, u = None, x
    if not unit:  # a dynamic threshold: x in units of it, and back
        per_unit = insert(gm, node, node, aten.div.Tensor, theta, float(config.unit(steps)))
        u = insert(gm, node, node, aten.div.Tensor, x, per_unit)
    sent = state
    for _ in range(population):  # every neuron of the population, one after the other
        sent = insert(gm, node, node, ops.tick.op, u, sent, tick, code, levels, signed)
    value = sent
    if averages:
        value = insert(gm, node, node, aten.div.Tensor, sent, tick)
    if per_unit is not None:
        value = insert(gm, node, node, aten.mul.Tensor, value, per_unit)
    value.meta["sends"] = node.meta["site"]
    node.replace_all_uses_with(value)
    return sent


def _with_potential(gm: GraphModule, node: Node, tick: Node | None, population: int) -> Node:
    """A neuron's input plus what its initial potential amounts to; where spikes are averaged, over the ticks so far."""
    potential = arg(node, 6)
    if tick is not None:
        potential = insert(gm, node, node, aten.div.Tensor, potential, tick)
        if population > 1:
            potential = insert(gm, node, node, aten.div.Tensor, potential, float(population))
    return insert(gm, node, node, aten.add.Tensor, node.args[0], potential)


def _quotients_of_nothing(gm: GraphModule) -> None:
    """0 / 0 is 0: before its first spikes a denominator may be 0, and a state would never forget a NaN."""
    values = carried_values(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.div.Tensor):
        below = arg(node, 1)
        if below not in values or (below.target in _CLAMPS and (below.args[1] or 0) > 0):
            continue
        users = list(node.users)
        safe = insert(gm, node.next, node, aten.nan_to_num.default, node, 0.0, math.inf, -math.inf)
        for user in users:
            user.replace_input_with(node, safe)


def _input(gm: GraphModule, after: Node, name: str, value: Tensor | None) -> Node:
    """A new input of the graph, under a name that no other has."""
    taken = {str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
    while name in taken:
        name += "_"
    with gm.graph.inserting_after(after):
        node = gm.graph.placeholder(name)
    node.meta["val"] = value
    return node


def _number(gm: GraphModule) -> Tensor:
    with fake_mode(gm.graph):
        return torch.ones((), dtype=torch.int64)


def _require_still(gm: GraphModule, neurons: list[Node]) -> None:
    """A state belongs to a place: refuse sites behind an order that values decide, as in MoE routing."""
    moved = _moved(gm)
    for node in neurons:
        value = fake(node)
        assert value is not None
        origin = moved.get(node)
        if origin is not None or any(free_unbacked_symbols(size) for size in value.shape):
            raise ConfigError(
                'schedule="synchronous" needs rows that keep their place from tick to tick; those of site '
                f"{node.meta['site']} are placed by values, at {describe(origin or node)}\n    "
                'use schedule="sequential", or skip the module'
            )


def _moved(gm: GraphModule) -> dict[Node, Node]:
    """Values whose rows are placed by other values -> the operator that does it."""
    values, decided, moved = carried_values(gm), set[Node](), dict[Node, Node]()
    for node in gm.graph.nodes:
        origin = next((moved[n] for n in node.all_input_nodes if n in moved), None)
        index = _index_nodes(node)
        if origin is None and (node.target in _SORTING and arg(node, 0) in values or any(n in decided for n in index)):
            origin = node
        if origin is not None:
            moved[node] = origin
        elif any(n in decided or n in values for n in node.all_input_nodes) and node not in values:
            decided.add(node)  # an integer or a truth computed from values
    return moved


def _index_nodes(node: Node) -> list[Node]:
    position = _PICKING.get(node.target)
    if position is None:
        return []
    found: Any = node.args[position]
    return [n for n in (found if isinstance(found, list | tuple) else [found]) if isinstance(n, Node)]
