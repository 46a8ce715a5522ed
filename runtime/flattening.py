"""Rows of all batches and positions become one dim: a layer of bytes and its bias are then one product of matrices."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fasfx import ops
from fasfx.program import arg, fake, insert, operators
from fasfx.runner import tidy
from fasfx.synapses import is_byte

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_RESHAPES = (aten.view.default, aten.reshape.default)


def flatten_rows(gm: GraphModule) -> GraphModule:
    """The program, changed: [.., D]  ->  [rows, D] from the layers of bytes that have a bias as far as rows stay apart.

    What follows element by element, norms and splits stay flat too, so few views are left. Exact.
    """
    flat: dict[Node, Node] = {}  # a value [.., D], or the parts of one -> the same as [rows, D]
    sizes: dict[str, Node] = {}  # a symbol -> the node that knows its size
    for node in list(operators(gm)):
        if node.target is aten.sym_size.int:
            sizes.setdefault(str(node.meta["val"]), node)
        elif node.target in _RESHAPES and arg(node, 0) in flat:
            node.update_arg(0, flat[arg(node, 0)])
        elif _is_layer(node) or (any(n in flat for n in node.all_input_nodes) and _is_row_wise(node)):
            _flatten(gm, node, flat, sizes)
    tidy(gm)
    return gm


def _is_layer(node: Node) -> bool:
    biased = node.target is ops.integer_linear.op and node.args[3] is not None
    return biased and is_byte(node.args[0]) and len(node.meta["val"].shape) > 2


def _is_row_wise(node: Any) -> bool:
    """Whether every row of what a node gives is made of the same rows of what it is given, and constants for all."""
    if node.target is operator.getitem:
        return True
    if node.target is aten.split_with_sizes.default:
        return bool(node.args[2] == -1)
    if node.target in _NORMS:
        return len(node.args[1]) == 1
    if node.target not in ops.NEURONS | {ops.integer_linear.op} and torch.Tag.pointwise not in node.target.tags:
        return False
    values = [value for value in map(fake, (node, *node.all_input_nodes)) if value is not None and value.dim() > 1]
    return all(_rows(value) == _rows(fake(node)) and isinstance(value.shape[-1], int) for value in values)


def _rows(value: Any) -> list[str]:
    return [str(size) for size in value.shape[:-1]]


def _flatten(gm: GraphModule, node: Any, flat: dict[Node, Node], sizes: dict[str, Node]) -> None:
    """The node on [rows, D] in its place, followed by a view to the shape it had."""
    for value in node.all_input_nodes:
        found = fake(value)
        if value not in flat and found is not None and found.dim() > 2:
            flat[value] = insert(gm, node, value, aten.reshape.default, value, [-1, found.shape[-1]])
    args: Any = map_arg(node.args, lambda n: flat.get(n, n))
    new = insert(gm, node, node, node.target, *args, **node.kwargs)
    shaped = fake(node)
    if shaped is None:  # a split: its parts follow
        flat[node] = new
        return
    shape = [_size(gm, node, dim, size, sizes) for dim, size in enumerate(shaped.shape)]
    back = insert(gm, node, node, aten.reshape.default, new, shape)
    flat[back] = new
    node.replace_all_uses_with(back)
    gm.graph.erase_node(node)


def _size(gm: GraphModule, node: Node, dim: int, size: Any, sizes: dict[str, Node]) -> Any:
    """A static size, or the node that gives it."""
    if isinstance(size, int):
        return size
    if str(size) not in sizes:
        source = next(n for n in node.all_input_nodes if (v := fake(n)) is not None and v.dim() > 2)
        sizes[str(size)] = insert(gm, node, node, aten.sym_size.int, source, dim)
    return sizes[str(size)]
