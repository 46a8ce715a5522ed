"""Attention's values: the layer that makes them, and the one that reads them mixed, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fasfx.program import Declined, arg, constants, describe, fake
from fasfx.streams import PASSED, CannotRotate, is_layer, width_of
from fasfx.synapses import VIEWS, sums_exponentials

aten = torch.ops.aten
REPEATED = (aten.expand.default, aten.repeat_interleave.self_int, aten.unsqueeze.default)


@dataclass(frozen=True)
class Values:
    """Attention's values: the layer that makes them, the one that reads them mixed, and the size of a head."""

    maker: Node
    reader: Node
    size: int


def find_values(gm: GraphModule) -> list[Values | Declined]:
    """Of every product of attention weights and values."""
    fixed, found = constants(gm), list[Values | Declined]()
    for node in gm.graph.find_nodes(op="call_function", target=aten.matmul.default):
        if sums_exponentials(node) or getattr(arg(node, 0), "target", None) is aten.softmax.int:
            try:
                size = width_of(arg(node, 1))
                found.append(Values(_maker(arg(node, 1), fixed, size), _reader(node, fixed, size), size))
            except CannotRotate as why:
                found.append(Declined("rotate", "rotate_values", node.name, str(why)))
    return found


def _maker(value: Node, fixed: set[Node], size: int) -> Node:
    """The linear layer behind views that keep a head's entries side by side."""
    while len(value.users) == 1 and value.target is not aten.linear.default:
        if not (value.target in PASSED + REPEATED or _keeps_last(value, size)):
            raise CannotRotate(f"its values come through {describe(value)}")
        value = arg(value, 0)
    if len(value.users) != 1 or value.args[1] not in fixed:
        raise CannotRotate(f"others read its values at {describe(value)}")
    return value


def _reader(value: Node, fixed: set[Node], size: int) -> Node:
    """The linear layer that alone reads what was mixed."""
    while len(value.users) == 1:
        (user,) = value.users
        if is_layer(user, value, fixed):
            return user
        per_row = user.target is aten.div.Tensor and arg(user, 0) is value and width_of(arg(user, 1)) == 1
        if not (per_row or user.target in PASSED or _keeps_last(user, size)):
            break
        value = user
    raise CannotRotate(f"what it mixes is read by {', '.join(user.name for user in value.users)}")


def _keeps_last(node: Node, size: int) -> bool:
    """A view or transpose that moves whole heads: their entries stay the last dim, or side by side in it."""
    before, after = fake(node.args[0] if node.args else None), fake(node)
    if node.target not in VIEWS or before is None or after is None:
        return False
    last = {before.dim() - 1, -1}
    if node.target is aten.transpose.int:
        return not last & {arg(node, 1), arg(node, 2)}
    if node.target is aten.permute.default:
        return arg(node, 1)[-1] in last
    return all(isinstance(shape[-1], int) and shape[-1] % size == 0 for shape in (before.shape, after.shape))
