"""Exponentials of a softmax, which a neuron sends as bytes, are looked up as bytes in an export."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import add_tensor, arg, attribute, insert
from fasfx.runner import tidy

aten = torch.ops.aten
OCTAVES = range(-127, 128)  # of float32


def tabulate(gm: GraphModule) -> GraphModule:
    """The program, changed: byte_count(lookup(x) + potential)  ->  byte_lookup(x), for a group of exponentials.

    Few of them are neither no spikes nor all of them, so one table holds what exponent and half count together give.
    """
    for neuron in gm.graph.find_nodes(op="call_function", target=ops.byte_count.op):
        group, potential = _parts(neuron)
        if group is None:
            continue
        table, *place = _table(gm, group, potential, neuron)
        stored = add_tensor(gm, "table_bytes", table, neuron)
        neuron.replace_all_uses_with(insert(gm, neuron, neuron, ops.byte_lookup.op, arg(group, 0), stored, *place))
        gm.graph.erase_node(neuron)
    tidy(gm)
    return gm


def _parts(neuron: Node) -> tuple[Node | None, Node | None]:
    """The group of exponentials that a neuron alone reads, and the potential, one for all, that is added between."""
    value, potential = arg(neuron, 0), None
    if value.target is aten.add.Tensor and len(value.users) == 1:
        value, potential = value.args
        if not isinstance(potential, Node) or potential.op != "get_attr" or potential.meta["val"].numel() > 1:
            return None, None
    alone = value.target is ops.lookup.op and len(value.users) == 1
    return (value if alone and value.args[3] == "exp" else None), potential


def _table(gm: GraphModule, group: Node, potential: Node | None, neuron: Node) -> tuple[Tensor, float, int, int]:
    """(bytes of every cell that is not like all beyond it, cells per unit of x, the first cell, the last).

    Asked of the operators themselves, in the middle of every cell.
    """
    core, spikes = (attribute(gm, str(arg(group, at).target)) for at in (1, 2))
    cells = core.numel() - 1
    places = torch.arange(OCTAVES[0] * cells, (OCTAVES[-1] + 1) * cells)
    x = ((places.double() + 0.5) * (math.log(2) / cells)).to(core.dtype)
    values = ops.lookup.op(x, core, spikes, *group.args[3:])
    if potential is not None:
        values = values + attribute(gm, str(potential.target)).flatten()
    found = ops.byte_count.op(values, *neuron.args[1:])
    changes = found.diff().nonzero().flatten()
    first, last = int(changes[0]), int(changes[-1]) + 1
    low, high = min(int(places[first]), 0), max(int(places[last]), 0)
    kept = found[low - int(places[0]) : high - int(places[0]) + 1]
    return kept.roll(low), cells * math.log2(math.e), low, high
