"""The integer form of a closed network: spike counts as bytes, weights as int8, products in integers."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.errors import ConfigError
from fasfx.ledger import Bound, Entry
from fasfx.ops.byte_count import LARGEST, fits, pair_limit, zero_of
from fasfx.program import add_tensor, arg, arguments, decline, facts, fake, insert, module_path
from fasfx.scales import Scaler
from fasfx.synapses import VIEWS, Carriers

aten = torch.ops.aten
ROUNDED = Bound(
    sympy.Symbol("step", positive=True) / 2, "error of a weight, or of the bias; step: its output channel's"
)
WIDEST_BIAS = 2**30  # in steps: with what is summed it stays in 32 bits


def evens_channels(gm: GraphModule) -> bool:
    """Whether channels are evened out for int8 weights. Not in training: weights keep their meaning there."""
    config = facts(gm).config
    asked = config.weights == "int8" and config.granularity in (None, "tensor") and config.coverage == "matmul"
    return asked and config.activation != "replace" and not facts(gm).trainable


def scale_rows_after(gm: GraphModule) -> None:
    """(n * row scale) @ W' + bias  ->  (n @ W') * row scale + bias: the counts themselves meet the weights."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        decoded: Any = arg(node, 0)
        if decoded.target is not aten.mul.Tensor or getattr(decoded.args[0], "target", None) is not ops.count.op:
            continue
        counts, rows = decoded.args
        if (value := fake(rows)) is None or value.dim() == 0 or value.shape[-1] != 1:
            continue
        if not may_apply("lower", "scale_rows_after", node):
            continue
        product = insert(gm, node, node, aten.linear.default, counts, node.args[1])
        current = insert(gm, node, node, aten.mul.Tensor, product, rows)
        new = current if len(node.args) < 3 else insert(gm, node, node, aten.add.Tensor, current, node.args[2])
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def use_int8_weights(gm: GraphModule) -> None:
    """Round the weights of every linear layer that reads spikes, after folding, and embeddings to int8.

    One scale per output channel, or per row of an embedding. Symmetric, and two adjacent weights of a layer so small
    that a processor which sums their products in 16 bits does not saturate. A bias is int32 in the same scale; a layer
    whose bias is computed declines.
    """
    carriers, scaler = Carriers(gm), Scaler(gm)
    linear, biases = _fixed(gm, scaler, aten.linear.default, 1), _fixed(gm, scaler, aten.linear.default, 2)
    layers = {node: weight for node, weight in linear.items() if carriers.is_sent(node.args[0])}
    for node in [node for node in layers if node not in biases and arguments(node)["bias"] is not None]:
        decline(gm, "lower", "int8_weights", node.name, "its bias is computed: weights and bias stay float")
        del layers[node]
    layers = {node: weight for node, weight in layers.items() if may_apply("lower", "int8_weights", node)}
    least = {node: biases[node].abs() / WIDEST_BIAS for node in layers if node in biases}
    kept = dict[Node, tuple[Node, Tensor]]()
    for node, weight in _fixed(gm, scaler, aten.embedding.default, 0).items():
        if may_apply("lower", "int8_weights", node):
            _round_embedding(gm, node, weight, layers, least, kept)
    for node, weight in layers.items():
        stored: tuple[Any, Tensor] = kept.get(node) or rounded(weight, _pair(node), least.get(node))
        bias = None
        if node in biases:
            steps = (biases[node].double() / stored[1].double()).round().to(torch.int32)
            bias = add_tensor(gm, f"{node.name}_bias", steps, node)
        _replace(gm, node, ops.integer_linear.op, (arg(node, 0),), *stored, (bias, 0))


def _fixed(gm: GraphModule, scaler: Scaler, target: Any, position: int) -> dict[Node, Tensor]:
    """Every node of an operator whose argument at a position is fixed -> the tensor it stands for."""
    nodes = gm.graph.find_nodes(op="call_function", target=target)
    found = [node for node in nodes if len(node.args) > position and scaler.is_fixed(node.args[position])]
    return {node: scaler.value_of(arg(node, position)) for node in found}


def _round_embedding(
    gm: GraphModule,
    node: Node,
    weight: Tensor,
    layers: dict[Node, Tensor],
    least: dict[Node, Tensor],
    kept: dict[Node, tuple[Node, Tensor]],
) -> None:
    """An embedding in int8. Layers whose weights are its own, but for a factor, have the same integers."""
    twins = {layer: factor for layer, own in layers.items() if (factor := multiple(own, weight))}
    needed = [least[layer] / factor for layer, factor in twins.items() if layer in least]
    smallest = torch.stack(needed).amax(0) if needed else None
    whole, scale = rounded(weight, min(map(_pair, twins), default=2 * LARGEST), smallest)
    rows: Node | Tensor = whole.t().contiguous()
    if twins:
        at = add_tensor(gm, f"{node.name}_int8", whole, node)
        rows = insert(gm, node, node, aten.t.default, at)
        kept |= {layer: (at, scale * factor) for layer, factor in twins.items()}
    _replace(gm, node, ops.integer_embedding.op, (), rows, scale[:, None], (node.args[1],))


def multiple(weight: Tensor, of: Tensor) -> float:
    """The positive factor that makes one weight the other, up to float rounding; 0 if there is none."""
    if weight.shape != of.shape:
        return 0.0
    at = of.abs().argmax()
    factor = weight.flatten()[at] / of.flatten()[at]
    return float(factor) if factor > 0 and torch.allclose(weight, factor * of, rtol=1e-5, atol=0.0) else 0.0


def _pair(layer: Node) -> int:
    """What two adjacent weights of a layer may be together."""
    neuron: Any = arg(layer, 0)
    return pair_limit(*neuron.args[1:]) if neuron.target is ops.count.op else 2 * LARGEST


def _replace(
    gm: GraphModule, node: Node, target: Any, first: Any, whole: Node | Tensor, scale: Tensor, last: Any
) -> None:
    """Put an operator with int8 weights (and what comes before and after them) in the place of a node.

    The ledger says what that costs.
    """
    if isinstance(whole, Tensor):
        whole = add_tensor(gm, f"{node.name}_int8", whole, node)
    new = insert(gm, node, node, target, *first, whole, add_tensor(gm, f"{node.name}_scale", scale, node), *last)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    facts(gm).ledger.add(Entry("lower", "int8_weights", new.name, module_path(new), ROUNDED, float(scale.max()) / 2))


def rounded(weight: Tensor, pair: int, least: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> (int8 [I, O], scale [O]): the nearest, in [-127, 127], two adjacent ones of at most `pair`.

    least: what scale must be, [O]; only rows of almost nothing are below it.
    """
    if weight.dtype == torch.float16:
        raise ConfigError("scales of int8 weights are too small for float16: convert model.float() or model.bfloat16()")
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scale = step(wide, pair) if least is None else torch.maximum(step(wide, pair), least.to(wide))
    return (wide / scale[:, None]).round().to(torch.int8).t().contiguous(), scale.to(weight)


def step(weight: Tensor, pair: int) -> Tensor:
    """The distance [O] between two int8 weights of an output channel of weight [O, I]."""
    adjacent = F.pad(weight.abs(), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2)
    two = adjacent.amax(1) / (pair - 1)  # rounding may add 1 to the sum
    return torch.maximum(two, weight.abs().amax(1) / LARGEST).clamp(min=torch.finfo(weight.dtype).tiny)


def send_bytes(gm: GraphModule) -> None:
    """Counts that meet int8 weights, or each other, travel as bytes where they fit; other readers see their value."""
    sent: dict[Node, Node] = {}
    for neuron in gm.graph.find_nodes(op="call_function", target=ops.count.op):
        if readers := [user for user in neuron.users if _is_product(user)]:
            if why := why_not_bytes(neuron):
                for reader in readers:
                    decline(gm, "lower", "send_bytes", reader.name, why)
            elif may_apply("lower", "send_bytes", neuron):
                sent[neuron] = _as_byte(gm, neuron)
    for node in list(gm.graph.nodes):
        bytes_read = [sent.get(value) for value in node.args[:2]] if _is_product(node) else []
        if node.target is aten.matmul.default and all(bytes_read):
            a, b = bytes_read
            product = insert(gm, node, node, ops.integer_matmul.op, a, b, _zero(a), _zero(b))
            node.replace_all_uses_with(product)
            gm.graph.erase_node(node)
        elif node.target is ops.integer_linear.op and bytes_read[0]:
            node.update_arg(0, bytes_read[0])
            node.update_arg(4, _zero(bytes_read[0]))
    for neuron, byte in sent.items():
        if neuron.users:
            neuron.replace_all_uses_with(insert(gm, neuron, neuron, ops.byte_value.op, byte, _zero(byte)))
        gm.graph.erase_node(neuron)


def _is_product(node: Node) -> bool:
    return node.target in (ops.integer_linear.op, aten.matmul.default)


def _as_byte(gm: GraphModule, neuron: Node) -> Node:
    """The same neuron with a byte as output; before a view or transpose of its input, so that bytes are moved."""
    moves: list[Any] = []
    value: Any = neuron.args[0]
    while value.target in VIEWS and len(value.users) == 1:
        moves.append(value)
        value = value.args[0]
    first = moves[-1] if moves else neuron
    byte = insert(gm, first, neuron, ops.byte_count.op, value, *neuron.args[1:])
    for move in reversed(moves):
        byte = insert(gm, move, move, move.target, byte, *move.args[1:])
        byte.meta["moves_spikes_of"] = neuron.meta["site"]
    return byte


def _zero(byte: Any) -> int:
    """The byte of no spikes of the neuron behind a value."""
    while byte.target is not ops.byte_count.op:
        byte = byte.args[0]
    return zero_of(*byte.args[1:])


def why_not_bytes(neuron: Node) -> str:
    """Why the counts of a neuron do not travel as bytes; "" if they do."""
    code, steps, levels, _ = tuple[Any, ...](neuron.args[1:])
    if fits(code, steps, levels):
        return ""
    top = ops.CODES[code].capacity(steps, levels)
    if not ops.CODES[code].rounds:
        return f"a {code} neuron sends powers of two up to {top}: its counts stay float"
    return f"counts up to {top} do not fit in a byte: they stay float; {code} with fewer time steps fits"
