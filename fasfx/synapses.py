"""Which operators are synaptic: where spikes meet weights, and how many multiply-accumulates that replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fasfx import ops
from fasfx.program import arg, constants, facts, fake

aten = torch.ops.aten


@dataclass(frozen=True)
class Synapse:
    """operands: argument positions that carry values.  macs: node -> multiply-accumulates (may be symbolic)."""

    operands: tuple[int, ...]
    macs: Callable[[Node], Any]


def _linear_macs(node: Node) -> Any:
    return math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _matmul_macs(node: Node) -> Any:
    return math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _conv_macs(node: Node) -> Any:
    return math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


def _transposed_conv_macs(node: Node) -> Any:
    return math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])


def _shape(node: Any) -> tuple[Any, ...]:
    value = fake(node)
    return tuple(value.shape) if value is not None else ()


PRODUCT = Synapse((0, 1), lambda node: math.prod(_shape(node)))  # element by element
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
CONVOLUTIONS |= {aten.conv1d.padding, aten.conv2d.padding}
TRANSPOSED_CONVOLUTIONS = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
SYNAPSES: dict[Any, Synapse] = {
    aten.linear.default: Synapse((0, 1), _linear_macs),
    ops.integer_linear.op: Synapse((0,), _linear_macs),
    ops.integer_matmul.op: Synapse((0, 1), _matmul_macs),
    aten.matmul.default: Synapse((0, 1), _matmul_macs),
    **dict.fromkeys(CONVOLUTIONS, Synapse((0,), _conv_macs)),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, Synapse((0,), _transposed_conv_macs)),
}
# Operators that multiply and accumulate, are not sent as spikes by this version, and must not go unreported.
UNSUPPORTED_WORDS = (
    "grouped_mm",
    "einsum",
    "conv",
    "bmm",
    "addmv",
    "_mm",
    "lstm",
    "gru",
    "rnn",
    "attention",
    "bilinear",
)
_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default}
_LOOKUPS |= {ops.integer_embedding.op}
# Activation functions in the sense of FAS: what coverage="activation" sends, and activation="replace" replaces.
ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.mish.default,
        aten.elu.default,
        aten.leaky_relu.default,
        aten.hardswish.default,
        aten.relu6.default,
        aten.softplus.default,
    }
)
# Value-preserving operators a spike passes unchanged; they act while a network trains.
RELAYS = (aten.dropout.default, aten.detach.default)


def operand(node: Any) -> Any:
    """The value behind an operand: a relay such as dropout is looked through if only synapses read it."""
    while isinstance(node, Node) and node.target in RELAYS and all(user.target in SYNAPSES for user in node.users):
        node = node.args[0]
    return node


def synapses(gm: GraphModule) -> Iterator[tuple[Node, tuple[int, ...]]]:
    """Synaptic nodes with the argument positions that carry values: not weights, positions or masks."""
    carriers = Carriers(gm)
    for node in gm.graph.nodes:
        synapse = PRODUCT if carriers.is_product(node) else SYNAPSES.get(node.target)
        if synapse is not None:
            live = tuple(i for i in synapse.operands if i < len(node.args) and node.args[i] in carriers.values)
            if live:
                yield node, live


class Carriers:
    """What carries the values of a program, node by node."""

    def __init__(self, gm: GraphModule) -> None:
        self.values, self._fixed = carried_values(gm), constants(gm)
        config = facts(gm).config
        self._products = config.nonlinear == "spiking" and config.coverage == "matmul"

    def is_product(self, node: Node) -> bool:
        """Whether two values, or a value and a table made of positions, are multiplied element by element as spikes.

        Not so: a constant factor, and the decoding of a count by a threshold that is computed from its row.
        """
        if not self._products or node.target is not aten.mul.Tensor or not any(a in self.values for a in node.args):
            return False
        varying = [a for a in node.args if isinstance(a, Node) and a not in self._fixed]
        return len(varying) == 2 and not self._is_decoded(node)

    def is_sent(self, node: Any) -> bool:
        """Whether a value comes out of a neuron: as a count, as a firing rate, or decoded by an explicit scale."""
        while is_byte(node) and node.target in MOVES:
            node = node.args[0]
        return isinstance(node, Node) and (
            node.target in ops.NEURONS | {ops.byte_value.op}
            or is_firing_rate(node)
            or (node.target is aten.mul.Tensor and self._is_decoded(node))
        )

    def _is_decoded(self, node: Node) -> bool:
        """count * scale, where the scale is constant or computed from values (a dynamic threshold)."""
        others = [a for a in node.args if not self.is_sent(operand(a))]
        return len(others) == 1 and all(not isinstance(a, Node) or a in self._fixed or _is_per_row(a) for a in others)


def _is_per_row(node: Node) -> bool:
    """Whether a value has one element per row: a threshold computed from its row, not a gate's other factor."""
    value = fake(node)
    return value is not None and value.dim() > 0 and value.shape[-1] == 1


def is_gated(node: Node, values: set[Node]) -> bool:
    """Whether a value is the product of two values, as behind a gate, its channels perhaps centred or mixed."""
    if node.target is aten.sub.Tensor and node.args[1] not in values:
        node = arg(node, 0)
    if node.target is ops.hadamard.op:
        node = arg(node, 0)
    return node.target is aten.mul.Tensor and all(factor in values for factor in node.args)


def is_byte(node: Any) -> bool:
    """Whether a node of a lowered program is a spike count as a byte, perhaps moved."""
    value = fake(node)
    return value is not None and value.dtype == torch.uint8 and node.op == "call_function"


def is_firing_rate(node: Node) -> bool:
    """Spikes so far over ticks so far, one factor for the whole network: the running estimate of a rate code."""
    return node.target is aten.div.Tensor and getattr(node.args[0], "target", None) is ops.tick.op


def carried_values(gm: GraphModule) -> set[Node]:
    """Nodes computed from what the network is given: floating point inputs and looked-up embeddings.

    Tables made of positions, sizes and masks alone (rotary angles, biases of masked scores) are none: their
    range follows the length of the input, not the calibration.
    """
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if not any(leaf.is_floating_point() for leaf in _tensors(node)) and not is_byte(node):
            continue
        given = node.op == "placeholder" or (node.target in _LOOKUPS and _depends_on_input(node))
        if given or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _tensors(node: Node) -> list[Tensor]:
    """The fake tensors a node gives: one, or the parts of a split."""
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _depends_on_input(node: Node) -> bool:
    """Whether the values of an input, not only its sizes, reach a node."""
    seen, waiting = set[Node](), [node]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in seen and "sym_size" not in str(node.target):
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def activations(gm: GraphModule) -> dict[Node, Node]:
    """What activation functions give -> the operator; of one that is only moved (viewed), the last move."""
    values, found = carried_values(gm), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node.target in ACTIVATIONS and node in values:
            end = node
            while len(end.users) == 1 and (user := next(iter(end.users))).target in MOVES - set(RELAYS):
                end = user
            found[end] = node
    return found


def accumulations(value: Node) -> list[Node]:
    """Plain sums of a value: synaptic operations whose weights are 1 (the denominator of deferred softmax)."""
    return [user for user in value.users if user.target is aten.sum.dim_IntList]


def channel_dims(node: Node, position: int) -> tuple[int, ...]:
    """Dims of an operand, from the end, that keep a threshold of their own under granularity "channel".

    linear: the features. conv: dim 1. matmul: the static one of the last two dims (features; the other is
    positions) and the heads before them. Dims of unknown or single size never count.
    """
    value = fake(node.args[position])
    assert value is not None
    if node.target in (aten.linear.default, aten.mul.Tensor):
        wanted = [-1]
    elif node.target is aten.matmul.default:
        wanted = [-3, -1 if position == 0 or _is_mixing(node) else -2]
    else:
        spatial = 1 if "1d" in str(node.target) else 3 if "3d" in str(node.target) else 2
        wanted = [-1 - spatial]
    return tuple(d for d in wanted if -d <= value.dim() and isinstance(value.shape[d], int) and value.shape[d] > 1)


def _is_mixing(node: Node) -> bool:
    """Whether a product sums over positions (scores times values) and not over features (queries times keys)."""
    left = operand(node.args[0])
    return isinstance(left, Node) and (left.target is aten.softmax.int or sums_exponentials(node))


def sums_exponentials(node: Node) -> bool:
    """Whether a product is the numerator of a deferred softmax, which grows with the number of positions."""
    left = operand(node.args[0])
    return isinstance(left, Node) and left.target is aten.exp.default


# Rearrange dims, entry by entry.
VIEWS: tuple[Any, ...] = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default)
NON_NEGATIVE = {
    aten.exp.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.softmax.int,
    aten.abs.default,
    aten.softplus.default,
    aten.hardsigmoid.default,
    aten.relu6.default,
}
MOVES = {
    *VIEWS,
    aten.contiguous.default,
    aten.clone.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
    *RELAYS,
    aten.t.default,
    aten.repeat.default,
}


def non_negative(node: Node) -> bool:
    """Whether a value cannot be negative, by the operator that made it; data is not asked."""
    while node.target in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in NON_NEGATIVE


def reduce_peak(value: Tensor, channel: tuple[int, ...]) -> Tensor:
    """Largest |value| over all dims but `channel`; the kept dims stay, the others have size 1."""
    kept = {d % value.dim() for d in channel}
    dims = [d for d in range(value.dim()) if d not in kept]
    if value.dtype == torch.bool:
        return value.amax(dims, keepdim=True) if dims else value
    if len(dims) == value.dim():  # one pass, no copy
        return torch.stack(value.aminmax()).abs().amax().reshape([1] * value.dim())
    return torch.maximum(value.amax(dims, keepdim=True), -value.amin(dims, keepdim=True)) if dims else value.abs()
