"""Layers that read the same bytes become one before an export: fewer, larger products and neurons."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import add_tensor, attribute, copy_program, insert
from fasfx.runner import tidy

aten = torch.ops.aten


def merge_layers(gm: GraphModule) -> GraphModule:
    """A copy in which linear layers of the same bytes, whose output only neurons of one kind read, are one layer.

    Its neurons' bytes are split (queries, keys and values of an attention layer). Exact.
    """
    new = copy_program(gm)
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in new.graph.find_nodes(op="call_function", target=ops.byte_count.op):
        layer: Any = node.args[0]
        if layer.target is ops.integer_linear.op and len(layer.users) == 1:
            groups.setdefault((layer.args[0], layer.args[4], *node.args[1:]), []).append(node)
    for neurons in groups.values():
        if len(neurons) > 1:
            _merge(new, neurons)
    tidy(new)
    return new


def _merge(gm: GraphModule, neurons: list[Node]) -> None:
    layers: list[Any] = [neuron.args[0] for neuron in neurons]
    counts, *_, zero = layers[0].args
    weights, scales = ([attribute(gm, layer.args[at].target) for layer in layers] for at in (1, 2))
    biases = [
        torch.zeros_like(scale) if layer.args[3] is None else attribute(gm, layer.args[3].target)
        for layer, scale in zip(layers, scales, strict=True)
    ]
    first = counts.next
    stored = (torch.cat(found, -1) for found in (weights, scales, biases))
    merged = insert(gm, first, layers[0], ops.integer_linear.op, counts, *_stored(gm, stored, first), zero)
    byte = insert(gm, first, neurons[0], ops.byte_count.op, merged, *neurons[0].args[1:])
    sizes = [scale.shape[0] for scale in scales]
    parts = insert(gm, first, neurons[0], aten.split_with_sizes.default, byte, sizes, -1)
    for at, neuron in enumerate(neurons):
        neuron.replace_all_uses_with(insert(gm, first, neuron, operator.getitem, parts, at))
        gm.graph.erase_node(neuron)


def _stored(gm: GraphModule, tensors: Any, before: Node) -> list[Node]:
    return [
        add_tensor(gm, f"merged_{name}", t, before) for name, t in zip(("int8", "scale", "bias"), tensors, strict=True)
    ]
