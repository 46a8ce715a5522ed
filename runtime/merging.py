"""Layers that read the same bytes become one before an export: fewer, larger products."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import add_tensor, attribute, copy_program, insert
from fasfx.runner import tidy
from fasfx.synapses import is_byte

aten = torch.ops.aten


def merge_layers(gm: GraphModule) -> GraphModule:
    """A copy in which linear layers of the same bytes are one layer, whose output is split.

    Queries, keys and values; a gate and what it lets through. What is split are bytes where neurons of one kind read
    every part. Exact.
    """
    new = copy_program(gm)
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for layer in new.graph.find_nodes(op="call_function", target=ops.integer_linear.op):
        if is_byte(layer.args[0]):
            groups.setdefault((layer.args[0], layer.args[4]), []).append(layer)
    for layers in groups.values():
        if len(layers) > 1:
            _merge(new, layers)
    tidy(new)
    return new


def _merge(gm: GraphModule, layers: list[Any]) -> None:
    counts, *_, zero = layers[0].args
    weights, scales = (torch.cat([attribute(gm, layer.args[at].target) for layer in layers], -1) for at in (1, 2))
    sizes = [layer.meta["val"].shape[-1] for layer in layers]
    stored = {"int8": weights, "scale": scales, "bias": _biases(gm, layers, sizes)}
    first = layers[0]
    at = [None if t is None else add_tensor(gm, f"merged_{name}", t, first) for name, t in stored.items()]
    merged = insert(gm, first, first, ops.integer_linear.op, counts, *at, zero)
    parts = layers
    if neurons := _neurons(layers):
        merged, parts = insert(gm, first, neurons[0], ops.byte_count.op, merged, *neurons[0].args[1:]), neurons
    split = insert(gm, first, first, aten.split_with_sizes.default, merged, sizes, -1)
    taken = [insert(gm, first, part, operator.getitem, split, place) for place, part in enumerate(parts)]
    for part, new in zip(parts, taken, strict=True):
        part.replace_all_uses_with(new)
        gm.graph.erase_node(part)


def _neurons(layers: list[Any]) -> list[Node]:
    """The neurons of one kind that alone read the layers, one each; else none."""
    readers = [[*layer.users] for layer in layers]
    found = [only for only, *others in readers if not others and only.target is ops.byte_count.op]
    return found if len(found) == len(layers) and len({tuple(neuron.args[1:]) for neuron in found}) == 1 else []


def _biases(gm: GraphModule, layers: list[Any], sizes: list[int]) -> Tensor | None:
    """The biases side by side, zeros where a layer has none; None if none has one."""
    found = [None if layer.args[3] is None else attribute(gm, layer.args[3].target) for layer in layers]
    like = next((bias for bias in found if bias is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_zeros(n) if bias is None else bias for n, bias in zip(sizes, found, strict=True)])
