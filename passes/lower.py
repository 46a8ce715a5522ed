"""FOLDED -> LOWERED: the sequential schedule in closed form, or one tick of the synchronous one.

Sequential, one pass through the graph instead of T:
fire(u, N)  ->  count(u)            (static thresholds: u is in count units)
fire(x, theta)  ->  count(x * (N / theta)) * (theta / N)   (dynamic thresholds)
Synchronous: the step graph of fasfx.step, called once per tick.
group(x)  ->  lookup(x)   (its closed form)
Dropout goes: a lowered program is for inference.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import add_tensor, arg, attribute, constants, facts, insert
from fasfx.runner import Pass
from fasfx.step import make_step_graph

aten = torch.ops.aten


class Lower(Pass):
    """Neurons become what runs: their closed form, exact because a sequential network's neurons see constant input,
    or one tick with explicit state.
    """

    name, takes, gives = "lower", "FOLDED", "LOWERED"

    def rewrite(self, gm: GraphModule) -> bool:
        """Replace every neuron; remove dropout."""
        for node in gm.graph.find_nodes(op="call_function", target=aten.dropout.default):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        if facts(gm).config.schedule == "synchronous":
            make_step_graph(gm)
        else:
            close(gm)
        look_up(gm)
        return True


def look_up(gm: GraphModule) -> None:
    """Replace every group by its table, under both schedules: a group settles within a tick."""
    program = facts(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ops.group.op):
        x, edges, _, function, _, _, left, right, scale, *_ = node.args
        found = program.groups.pop(node.name)
        table = (found.table * scale).to(attribute(gm, str(edges.target)))
        low, high = (float(found.edges[end]) for end in (0, -1))
        stored = add_tensor(gm, f"table_{function}", table, node)
        result = insert(gm, node, node, ops.lookup.op, x, stored, function, low, high, left, right, scale)
        program.groups[result.name] = found
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def close(gm: GraphModule) -> None:
    """Replace every neuron by its closed form."""
    fixed = constants(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ops.fire.op):
        unit = node.args[1] in fixed
        node.replace_all_uses_with(_unit_count(gm, node) if unit else _scaled_count(gm, node))
        gm.graph.erase_node(node)


def _unit_count(gm: GraphModule, node: Node) -> Node:
    return insert(gm, node, node, ops.count.op, node.args[0], *node.args[2:])


def _scaled_count(gm: GraphModule, node: Node) -> Node:
    x, theta, code, steps, levels, signed = node.args
    per_unit = insert(gm, node, node, aten.div.Tensor, theta, float(facts(gm).config.unit(arg(node, 3))))
    u = insert(gm, node, node, aten.div.Tensor, x, per_unit)
    count = insert(gm, node, node, ops.count.op, u, code, steps, levels, signed)
    return insert(gm, node, node, aten.mul.Tensor, count, per_unit)
