"""Residual streams: what writes to one, what passes it on, and what reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fasfx.program import Declined, arg, constants, describe, fake
from fasfx.synapses import CONVOLUTIONS, RELAYS

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
PASSED = (*RELAYS, aten.contiguous.default, aten.clone.default)


class CannotRotate(Exception):
    """Why something cannot be rotated."""


@dataclass
class Stream:
    """One residual stream of width `size`.

    nodes:   the values in it: sums, and what is added.
    writers: linear layers, embeddings and constants whose output it is.
    norms:   that read it; readers: the linear layers that read the norms, or the stream itself -> which of the two.
    """

    size: int
    nodes: set[Node] = field(default_factory=set)
    writers: dict[Node, None] = field(default_factory=dict)
    norms: dict[Node, None] = field(default_factory=dict)
    readers: dict[Node, Node] = field(default_factory=dict)

    @property
    def centred(self) -> bool:
        """Whether norms take off its mean, which the layers that write to it can do instead."""
        return any(norm.target is aten.layer_norm.default for norm in self.norms)


def find_streams(gm: GraphModule) -> list[Stream | Declined]:
    """The residual stream of every norm, each once."""
    fixed, found, seen = constants(gm), list[Stream | Declined](), set[Node]()
    for norm in gm.graph.nodes:
        if norm.target not in NORMS or norm in seen:
            continue
        try:
            stream = _stream(arg(norm, 0), fixed)
            found.append(stream)
            seen |= set(stream.norms)
        except CannotRotate as why:
            found.append(Declined("rotate", "rotate_stream", norm.name, str(why)))
    return found


def _stream(start: Node, fixed: set[Node]) -> Stream:
    size = width_of(start)
    stream, waiting = Stream(size), [start]
    while waiting:
        node = waiting.pop()
        if node in stream.nodes:
            continue
        stream.nodes.add(node)
        if node in fixed:
            stream.writers[node] = None
            continue
        if width_of(node) != size:
            raise CannotRotate(f"{describe(node)} has another width")
        waiting += _made_of(stream, node, fixed)
        for user in node.users:
            waiting += _read_by(stream, node, user, fixed)
    if stream.centred and any(source not in stream.norms for source in stream.readers.values()):
        raise CannotRotate("layers read the stream itself, where a layer norm takes off its mean")
    return stream


def tied_heads(stream: Stream) -> dict[Node, Node]:
    """The linear layers that alone read a root mean square norm, with the weights of an embedding -> that embedding.

    None where a power of two divides the width only into more blocks than a block has channels.
    """
    block = stream.size & -stream.size
    if stream.centred or block * block < stream.size:
        return {}
    embeddings = {arg(node, 0): node for node in stream.writers if node.target is aten.embedding.default}
    sources = [*stream.readers.values()]
    return {
        layer: embeddings[arg(layer, 1)]
        for layer, source in stream.readers.items()
        if source in stream.norms and sources.count(source) == 1 and arg(layer, 1) in embeddings
    }


def width_of(node: Node) -> int:
    """The static size of a value's last dim. Raises CannotRotate if it has none."""
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
    if is_layer(user, node, fixed):
        stream.readers[user] = node
        return []
    raise CannotRotate(f"it is read by {describe(user)}")


def _layers(norm: Node, fixed: set[Node]) -> list[Node]:
    """The linear layers that read a norm. Raises CannotRotate if anything else does."""
    found: list[Node] = []
    for user in norm.users:
        if _moves_rows(user):
            found += _layers(user, fixed)
        elif is_layer(user, norm, fixed):
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


def is_layer(node: Node, value: Node, fixed: set[Node]) -> bool:
    """Whether a node is a linear layer of constant weights that reads a value."""
    return node.target is aten.linear.default and node.args[0] is value and node.args[1] in fixed


def _is_scaled(node: Node) -> bool:
    return node.target is aten.mul.Tensor and isinstance(node.args[1], int | float)
