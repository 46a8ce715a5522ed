"""FOLDED -> LOWERED: the sequential schedule in closed form, or one tick of the synchronous one.

Sequential, one pass through the graph instead of T:
fire(u, N)  ->  count(u)            (static thresholds: u is in count units)
fire(x, theta)  ->  count(x * (N / theta)) * (theta / N)   (dynamic thresholds)
Synchronous: the step graph of fasfx.step, called once per tick.
group(x)  ->  lookup(x)   (its closed form)
weights="int8": weights become int8, counts bytes, their products integer (fasfx.integer).
Dropout goes: a lowered program is for inference.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.integer import scale_rows_after, send_bytes, use_int8_weights
from fasfx.ops.lookup import Cells, cells_of, table_of
from fasfx.program import add_tensor, arg, attribute, constants, facts, insert
from fasfx.runner import Pass
from fasfx.step import make_step_graph
from fasfx.synapses import RELAYS

aten = torch.ops.aten


class Lower(Pass):
    """Neurons become what runs: their closed form, exact because a sequential network's neurons see constant input,
    or one tick with explicit state.

    bytes_travel: with weights="int8", whether spike counts that fit travel as bytes and meet weights in integers; else
                  the same counts travel in float, for runtimes without integer products.
    """

    name, takes, gives = "lower", "FOLDED", "LOWERED"

    def __init__(self, bytes_travel: bool = True) -> None:
        self._bytes_travel = bytes_travel

    def rewrite(self, gm: GraphModule) -> bool:
        """Replace every neuron; remove what acts in training only."""
        for node in [node for node in gm.graph.nodes if node.target in RELAYS]:
            node.replace_all_uses_with(arg(node, 0))
            gm.graph.erase_node(node)
        if facts(gm).config.schedule == "sequential":
            close(gm)
        elif may_apply(self.name, "make_step_graph", gm.graph.output_node()):
            make_step_graph(gm)
        if facts(gm).config.weights == "int8":
            scale_rows_after(gm)
            use_int8_weights(gm)
            if self._bytes_travel:
                send_bytes(gm)
        look_up(gm)
        return True


def look_up(gm: GraphModule) -> None:
    """Replace every group by its table, under both schedules: a group settles within a tick."""
    made: dict[tuple[Any, ...], tuple[Cells, Node]] = {}  # by breakpoints and neurons: only the values differ
    for node in gm.graph.find_nodes(op="call_function", target=ops.group.op):
        if not may_apply("lower", "group_to_lookup", node):
            continue
        x, edges_node, values_node, function, unit, rest, left, right, scale, code, steps = cast(Any, node.args)
        edges, values = (attribute(gm, str(n.target)) for n in (edges_node, values_node))
        key = (edges_node, unit, rest, code, steps)
        if key not in made:
            cells = cells_of(edges.double(), unit, rest, code, steps)
            made[key] = cells, add_tensor(gm, f"spikes_{function}", cells.spikes, node)
        cells, spikes = made[key]
        table = table_of(cells, edges.double(), values.double(), unit, rest).to(values)
        stored = add_tensor(gm, f"table_{function}", table, node)
        ends = [float(edges[end]) for end in (0, -1)]
        place = (function, len(edges) - 1, *ends, left, right, scale)
        node.replace_all_uses_with(insert(gm, node, node, ops.lookup.op, x, stored, spikes, *place))
        gm.graph.erase_node(node)


def close(gm: GraphModule) -> None:
    """Replace every neuron by its closed form."""
    fixed = constants(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ops.fire.op):
        if not may_apply("lower", "fire_to_count", node):
            continue
        unit = node.args[1] in fixed
        node.replace_all_uses_with(_unit_count(gm, node) if unit else _scaled_count(gm, node))
        gm.graph.erase_node(node)


def _unit_count(gm: GraphModule, node: Node) -> Node:
    return insert(gm, node, node, ops.count.op, _current(gm, node), *node.args[2:6])


def _current(gm: GraphModule, node: Node) -> Node:
    """What a neuron is given, with what its initial potential adds to that."""
    x: Node = arg(node, 0)
    if len(node.args) <= 6:
        return x
    nothing = torch.zeros(())
    potential = attribute(gm, str(arg(node, 6).target)).detach()
    added = ops.codes.with_potential(nothing.to(potential), potential, ops.CODES[arg(node, 2)], arg(node, 3))
    return insert(gm, node, node, aten.add.Tensor, x, add_tensor(gm, f"potential_{node.name}", added, node))


def _scaled_count(gm: GraphModule, node: Node) -> Node:
    theta, code, steps, levels, signed = node.args[1:6]
    per_unit = insert(gm, node, node, aten.div.Tensor, theta, float(facts(gm).config.unit(arg(node, 3))))
    u = insert(gm, node, node, aten.div.Tensor, _current(gm, node), per_unit)
    count = insert(gm, node, node, ops.count.op, u, code, steps, levels, signed)
    return insert(gm, node, node, aten.mul.Tensor, count, per_unit)
