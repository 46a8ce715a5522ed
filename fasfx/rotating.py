"""Residual streams and attention values: what a rotation has to go through, and the weights that take it up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx.orthogonal import rotation, without_mean
from fasfx.program import Declined, add_tensor, arg, arguments, constants, describe, fake, insert
from fasfx.scales import Scaler
from fasfx.synapses import CONVOLUTIONS, sums_exponentials

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
MOVED = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default)
PASSED = (aten.dropout.default, aten.contiguous.default, aten.clone.default)
REPEATED = (aten.expand.default, aten.repeat_interleave.self_int, aten.unsqueeze.default)


class CannotRotate(Exception):
    """Why something cannot be rotated."""


@dataclass
class Stream:
    """One residual stream of width `size`.

    nodes:   the values in it: sums, and what is added.
    writers: linear layers, embeddings and constants whose output it is.
    norms:   that read it; readers: the linear layers that read the norms, or the stream itself.
    """

    size: int
    nodes: set[Node] = field(default_factory=set)
    writers: dict[Node, None] = field(default_factory=dict)
    norms: dict[Node, None] = field(default_factory=dict)
    readers: dict[Node, Node] = field(default_factory=dict)


def find_streams(gm: GraphModule) -> list[Stream | Declined]:
    """The residual stream of every norm, each once."""
    fixed, found, seen = constants(gm), list[Stream | Declined](), set[Node]()
    for norm in gm.graph.nodes:
        if norm.target not in NORMS or norm in seen:
            continue
        try:
            found.append(_stream(arg(norm, 0), fixed))
            seen |= set(found[-1].norms)  # type: ignore[union-attr]
        except CannotRotate as why:
            found.append(Declined("rotate", "rotate_stream", norm.name, str(why)))
    return found


def _stream(start: Node, fixed: set[Node]) -> Stream:
    size = _width(start)
    stream, waiting = Stream(size), [start]
    while waiting:
        node = waiting.pop()
        if node in stream.nodes:
            continue
        stream.nodes.add(node)
        if node in fixed:
            stream.writers[node] = None
            continue
        if _width(node) != size:
            raise CannotRotate(f"{describe(node)} has another width")
        waiting += _made_of(stream, node, fixed)
        for user in node.users:
            waiting += _read_by(stream, node, user, fixed)
    if (
        not stream.writers
        or any(n.target is aten.layer_norm.default for n in stream.norms)
        and any(source not in stream.norms for source in stream.readers.values())
    ):
        raise CannotRotate("layers read the stream itself, where a layer norm takes off its mean")
    return stream


def _width(node: Node) -> int:
    value = fake(node)
    if value is None or value.dim() == 0 or not isinstance(value.shape[-1], int):
        raise CannotRotate(f"{describe(node)} has no fixed width")
    return value.shape[-1]


def _made_of(stream: Stream, node: Node, fixed: set[Node]) -> list[Node]:
    """The values of the stream that a value of it is made of; its weights are noted where it is none's."""
    if node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, Node) for a in node.args):
        return [arg(node, 0), arg(node, 1)]
    if node.target is aten.cat.default and _moves_rows(node):
        return list(arg(node, 0))
    if _moves_rows(node) or _is_scaled(node):
        return [arg(node, 0)]
    if (layer := _patches(node)) is not None and layer.args[1] in fixed:
        stream.writers[layer] = None
        return []
    if node.target in (aten.linear.default, aten.embedding.default):
        if arg(node, 1 if node.target is aten.linear.default else 0) in fixed:
            stream.writers[node] = None
            return []
    raise CannotRotate(f"it is written by {describe(node)}")


def _read_by(stream: Stream, node: Node, user: Node, fixed: set[Node]) -> list[Node]:
    """The values of the stream that a value is passed on to; norms and layers that read it are noted."""
    if "sym_size" in str(user.target):
        return []
    if user.target is aten.add.Tensor or _moves_rows(user) or _is_scaled(user):
        return [user]
    if user.target in NORMS and arg(user, 0) is node and list(arg(user, 1)) == [stream.size]:
        stream.norms[user] = None
        stream.readers |= dict.fromkeys(_layers(user, fixed), user)
        return []
    if _is_layer(user, node, fixed):
        stream.readers[user] = node
        return []
    raise CannotRotate(f"it is read by {describe(user)}")


def _layers(norm: Node, fixed: set[Node]) -> list[Node]:
    """The linear layers that read a norm. Raises CannotRotate if anything else does."""
    found: list[Node] = []
    for user in norm.users:
        if _moves_rows(user):
            found += _layers(user, fixed)
        elif _is_layer(user, norm, fixed):
            found.append(user)
        elif "sym_size" not in str(user.target):
            raise CannotRotate(f"{norm.name} is read by {describe(user)}")
    return found


def _moves_rows(node: Node) -> bool:
    """Whether a node moves, repeats or leaves out whole rows: the last dim stays what it is."""
    value = fake(node)
    if node.target in PASSED or value is None:
        return node.target in PASSED
    if node.target in (aten.view.default, aten.reshape.default, aten.expand.default):
        before = fake(node.args[0])
        return before is not None and before.dim() > 0 and value.dim() > 0 and before.shape[-1] == value.shape[-1]
    if node.target in (aten.select.int, aten.slice.Tensor, aten.cat.default):
        first: Any = node.args[0]
        width = fake(first[0] if isinstance(first, list | tuple) else first)
        dim = arg(node, 1) if len(node.args) > 1 else 0
        return width is not None and dim not in (-1, width.dim() - 1)
    return False


def _patches(node: Node) -> Node | None:
    """The convolution whose channels a node puts last: transpose(view(conv, [B, C, -1]), 1, 2)."""
    if node.target is not aten.transpose.int or {arg(node, 1), arg(node, 2)} not in ({1, 2}, {-1, -2}):
        return None
    view: Any = node.args[0]
    layer: Any = (
        view.args[0] if view.target in (aten.view.default, aten.reshape.default, aten.flatten.using_ints) else None
    )
    if getattr(layer, "target", None) not in CONVOLUTIONS or len(view.users) > 1 or len(layer.users) > 1:
        return None
    before, after = fake(layer), fake(view)
    assert before is not None and after is not None
    return layer if after.dim() == 3 and before.shape[:2] == after.shape[:2] else None


def _is_layer(node: Node, value: Node, fixed: set[Node]) -> bool:
    return node.target is aten.linear.default and node.args[0] is value and node.args[1] in fixed


def _is_scaled(node: Node) -> bool:
    return node.target is aten.mul.Tensor and isinstance(node.args[1], int | float)


def rotate_stream(gm: GraphModule, stream: Stream) -> None:
    """Write Q (and the mean that layer norms take off) into the weights around a stream."""
    weights, centred = Weights(gm), any(n.target is aten.layer_norm.default for n in stream.norms)
    q = rotation(stream.size)
    writing = without_mean(stream.size) @ q if centred else q
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
        if source in stream.norms:
            _take_up_norm(gm, weights, layer, source)
        weights.change(layer, 1, lambda w: w @ q)
    for norm in stream.norms:
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
    eps = arguments(norm)["eps"]
    value = fake(norm)
    assert value is not None
    one = add_tensor(gm, f"{norm.name}_weight", torch.ones(size, dtype=value.dtype, device=value.device), norm)
    new = insert(gm, norm, norm, aten.rms_norm.default, arg(norm, 0), [size], one, eps)
    norm.replace_all_uses_with(new)
    gm.graph.erase_node(norm)


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
                size = _width(arg(node, 1))
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
        if _is_layer(user, value, fixed):
            return user
        per_row = user.target is aten.div.Tensor and arg(user, 0) is value and _width(arg(user, 1)) == 1
        if not (per_row or user.target in PASSED or _keeps_last(user, size)):
            break
        value = user
    raise CannotRotate(f"what it mixes is read by {', '.join(user.name for user in value.users)}")


def _keeps_last(node: Node, size: int) -> bool:
    """A view or transpose that moves whole heads: their entries stay the last dim, or side by side in it."""
    before, after = fake(node.args[0] if node.args else None), fake(node)
    if node.target not in MOVED or before is None or after is None:
        return False
    last = {before.dim() - 1, -1}
    if node.target is aten.transpose.int:
        return not last & {arg(node, 1), arg(node, 2)}
    if node.target is aten.permute.default:
        return arg(node, 1)[-1] in last
    return all(isinstance(shape[-1], int) and shape[-1] % size == 0 for shape in (before.shape, after.shape))


def rotate_values(gm: GraphModule, values: Values) -> None:
    """Rotate every head: into the rows of the layer before, and the columns of the layer after."""
    q, weights = rotation(values.size), Weights(gm)
    weights.change(values.maker, 1, lambda w: (q.T @ w.unflatten(0, (-1, values.size))).flatten(0, 1))
    weights.change(values.maker, 2, lambda b: (b.unflatten(0, (-1, values.size)) @ q).flatten())
    weights.change(values.reader, 1, lambda w: (w.unflatten(1, (-1, values.size)) @ q).flatten(1))
