"""Writes a rotation into the weights around residual streams and attention's values; gated values turn at run time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.heads import Values
from fasfx.ops.hadamard import sylvester
from fasfx.orthogonal import blockwise, rotation, without_mean
from fasfx.program import add_tensor, arg, arguments, constants, fake, insert
from fasfx.scales import Scaler
from fasfx.streams import Stream, is_layer, tied_heads, width_of
from fasfx.synapses import CONVOLUTIONS, carried_values, is_gated

aten = torch.ops.aten
BLOCK = 64  # channels that are mixed at run time, at most


def rotate_stream(gm: GraphModule, stream: Stream) -> None:
    """Write Q (and the mean that layer norms take off) into the weights around a stream.

    A head that reads with the embedding's weights goes on doing so: Q is then made of sums and differences, which are
    taken back before its norm and taken again behind it.
    """
    weights, tied = Weights(gm), tied_heads(stream)
    q = blockwise(stream.size) if tied else rotation(stream.size)
    writing = without_mean(stream.size) @ q if stream.centred else q
    for node in stream.writers:
        if node.target is aten.linear.default:
            weights.change(node, 1, lambda w: writing.T @ w)
            weights.change(node, 2, lambda b: b @ writing)
        elif node.target is aten.embedding.default:
            weights.change(node, 0, lambda w: w @ writing)
        elif node.target in CONVOLUTIONS:
            weights.change(node, 1, lambda w: (writing.T @ w.flatten(1)).view_as(w))
            weights.change(node, 2, lambda b: b @ writing)
        else:
            _rotate_constant(gm, weights, stream, node, writing)
    for layer, source in stream.readers.items():
        if layer in tied:
            layer.update_arg(1, tied[layer].args[0])
            continue
        if source in stream.norms:
            _take_up_norm(gm, weights, layer, source)
        weights.change(layer, 1, lambda w: w @ q)
    turned = {stream.readers[layer] for layer in tied}
    for norm in stream.norms:
        if norm in turned:
            _turned(gm, weights, norm, stream.size)
        else:
            _plain(gm, norm, stream.size)


def _rotate_constant(gm: GraphModule, weights: Weights, stream: Stream, node: Node, q: Tensor) -> None:
    """A learned vector that is added to the stream (position embeddings of images)."""
    value = weights.value(node)
    for user in [user for user in node.users if user in stream.nodes]:
        user.replace_input_with(node, add_tensor(gm, f"{node.name}_rotated", (value.double() @ q).to(value), user))


def _take_up_norm(gm: GraphModule, weights: Weights, layer: Node, norm: Node) -> None:
    """linear(x g + b) -> linear'(x): the weights take g, the bias takes b."""
    scale, shift = (arg(norm, at) if at < len(norm.args) else None for at in (2, 3))
    if norm.target is aten.layer_norm.default and shift is not None:
        offset = weights.value(arg(layer, 1)).double() @ weights.value(shift).double()
        if len(layer.args) > 2 and layer.args[2] is not None:
            weights.change(layer, 2, lambda b: b + offset)
        else:
            value = offset.to(weights.value(arg(layer, 1)))
            layer.args = (*layer.args[:2], add_tensor(gm, f"{layer.name}_shift", value, layer))
    if scale is not None:
        factor = weights.value(scale).double()
        weights.change(layer, 1, lambda w: w * factor)


def _plain(gm: GraphModule, norm: Node, size: int) -> None:
    """A root mean square norm with unit weights, which thresholds can still go into."""
    norm.replace_all_uses_with(_rms_norm(gm, norm, arg(norm, 0), _ones(norm, size), arguments(norm)["eps"]))
    gm.graph.erase_node(norm)


def _turned(gm: GraphModule, weights: Weights, norm: Node, size: int) -> None:
    """The norm of the stream as it was, turned again: hadamard twice, without its root of the block's size, is Q."""
    block, given = size & -size, arguments(norm)
    own = _ones(norm, size) if given["weight"] is None else weights.value(given["weight"])
    eps = given["eps"] or torch.finfo(own.dtype).eps
    stream = insert(gm, norm, norm, ops.hadamard.op, arg(norm, 0), block)
    new = _rms_norm(gm, norm, stream, own / math.sqrt(block), eps * block)
    norm.replace_all_uses_with(insert(gm, norm, norm, ops.hadamard.op, new, block))
    gm.graph.erase_node(norm)


def _ones(like: Node, size: int) -> Tensor:
    value = fake(like)
    assert value is not None
    return torch.ones(size, dtype=value.dtype, device=value.device)


def _rms_norm(gm: GraphModule, norm: Node, value: Node, weight: Tensor, eps: float | None) -> Node:
    at = add_tensor(gm, f"{norm.name}_weight", weight, norm)
    return insert(gm, norm, norm, aten.rms_norm.default, value, [len(weight)], at, eps)


class Weights:
    """Changes weights of nodes, in float64, by new tensors of their own."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm, self._scaler = gm, Scaler(gm)

    def value(self, node: Node) -> Tensor:
        """The tensor a fixed node stands for."""
        return self._scaler.value_of(node)

    def change(self, node: Node, position: int, by: Any) -> None:
        """Replace the weight at an argument position, if there is one."""
        if position < len(node.args) and node.args[position] is not None:
            old = self.value(arg(node, position))
            new = add_tensor(self._gm, f"{node.name}_arg{position}", by(old.double()).to(old).contiguous(), node)
            node.update_arg(position, new)


def rotate_values(gm: GraphModule, values: Values) -> None:
    """Rotate every head: into the rows of the layer before, and the columns of the layer after."""
    q, weights = rotation(values.size), Weights(gm)
    weights.change(values.maker, 1, lambda w: (q.T @ w.unflatten(0, (-1, values.size))).flatten(0, 1))
    weights.change(values.maker, 2, lambda b: (b.unflatten(0, (-1, values.size)) @ q).flatten())
    weights.change(values.reader, 1, lambda w: (w.unflatten(1, (-1, values.size)) @ q).flatten(1))


def find_gated(gm: GraphModule) -> list[Node]:
    """Every product of two values, of an even number of channels, that linear layers alone read."""
    fixed, values = constants(gm), carried_values(gm)
    gated = [node for node in gm.graph.nodes if node in values and node.users and is_gated(node, values)]
    read = [node for node in gated if all(is_layer(user, node, fixed) for user in node.users)]
    return [node for node in read if width_of(node) % 2 == 0]


def rotate_gated(gm: GraphModule, value: Node) -> None:
    """x W' -> hadamard(x) (W H / size)': in blocks of channels, for nothing before a product can be rotated."""
    width, weights = width_of(value), Weights(gm)
    size = min(BLOCK, width & -width)
    layers = list(value.users)
    mixed = insert(gm, value.next, value, ops.hadamard.op, value, size)
    for layer in layers:
        layer.replace_input_with(value, mixed)
        weights.change(layer, 1, lambda w: (w.unflatten(1, (-1, size)) @ sylvester(size).to(w) / size).flatten(1))
