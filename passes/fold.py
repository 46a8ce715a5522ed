"""SPIKING -> FOLDED: spike counts travel; thresholds and scales live in the neighbouring weights.

fire(x, theta)  ->  fire(x * N / theta, N) = n, an integer; theta / N moves on into what reads n (N: its unit):
linear and convolution take it into their weights, products and sums pass it to their output. The factor
N / theta moves back into what made x where only the neuron reads it: norm weights, linear rows, other factors.
What cannot move stays an explicit multiplication and is noted with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.ops.library import per_threshold
from fasfx.program import add_tensor, arg, attribute, decline, facts, fake, insert
from fasfx.runner import Pass
from fasfx.scales import Scaler, strip
from fasfx.synapses import CONVOLUTIONS, RELAYS, operand

aten = torch.ops.aten
_ONE = torch.ones(())
_WIDE = (torch.float32, torch.float64, torch.bfloat16)
SUMMED = "the scale does not leave the sum"


class Fold(Pass):
    """Unit thresholds: exact up to float rounding of scaled weights.

    Rules, in order: neuron_to_unit, scale_to_reader, scale_to_maker, factor_to_factor.
    """

    name, takes, gives = "fold", "SPIKING", "FOLDED"

    def rewrite(self, gm: GraphModule) -> bool:
        """Make every static neuron a unit neuron, move both scales away, and join what stays of them with weights."""
        scaler = Scaler(gm)
        _store_biases(gm, scaler)
        neurons = [n for n in gm.graph.find_nodes(op="call_function", target=ops.fire.op) if scaler.is_fixed(n.args[1])]
        scales = dict(neuron_to_unit(gm, scaler, n) for n in neurons if may_apply(self.name, "neuron_to_unit", n))
        for reader in dict.fromkeys(reader for unit in scales for reader in _readers(unit)):
            units = dict.fromkeys(value for n in reader.all_input_nodes if (value := operand(n)) in scales)
            moves = may_apply(self.name, "scale_to_reader", reader)
            if moves and scale_to_reader(gm, scaler, scales, reader):
                continue
            for unit in units:
                _decode_before(gm, scaler, unit, scales[unit], reader)
            if moves:
                decline(gm, self.name, "scale_to_reader", reader.name, f"{SUMMED} of {reader.target}")
        for unit in scales:
            if may_apply(self.name, "scale_to_maker", unit):
                scale_to_maker(gm, scaler, unit)
        for product in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            if _is_chained(scaler, product) and may_apply(self.name, "factor_to_factor", product):
                factor_to_factor(gm, scaler, product)
        return bool(neurons)


def _store_biases(gm: GraphModule, scaler: Scaler) -> None:
    """What centre computes from the weights, once: these are about to be scaled."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        if len(node.args) > 2 and scaler.is_fixed(bias := arg(node, 2)) and bias.op != "get_attr":
            node.update_arg(2, add_tensor(gm, f"{node.name}_bias", scaler.value_of(bias), node))


def neuron_to_unit(gm: GraphModule, scaler: Scaler, node: Node) -> tuple[Node, Tensor]:
    """fire(x, theta) -> fire(x * N / theta, N); returns the unit neuron and theta / N, still to be placed."""
    x, theta_node, *neuron = node.args[:6]
    assert isinstance(theta_node, Node)
    theta = strip(attribute(gm, str(theta_node.target)).detach().clone())
    top = facts(gm).config.unit(arg(node, 3))
    up = insert(gm, node, node, aten.mul.Tensor, x, 1.0)
    scaler.set_factor(up, per_threshold(top, theta))
    one = add_tensor(gm, "unit_threshold", torch.tensor(float(top), dtype=theta.dtype, device=theta.device), node)
    given = (up, one, *neuron)
    if len(node.args) > 6:
        initial = attribute(gm, str(arg(node, 6).target)).detach() * per_threshold(top, theta)
        given += (add_tensor(gm, "unit_initial", initial, node),)
    unit = insert(gm, node, node, ops.fire.op, *given)
    node.replace_all_uses_with(unit)
    gm.graph.erase_node(node)
    return unit, theta / top


def _readers(unit: Node) -> list[Node]:
    """Nodes that compute with the counts; a relay (dropout) hands them on."""
    found: list[Node] = []
    for user in unit.users:
        found += list(user.users) if user.target in RELAYS and operand(user) is unit else [user]
    return found


def scale_to_reader(gm: GraphModule, scaler: Scaler, scales: dict[Node, Tensor], reader: Node) -> bool:
    """Move theta / N behind the synaptic operation that reads the counts; False if it cannot leave the sum."""
    left, right = (scales.get(operand(v)) if isinstance(v, Node) else None for v in (*reader.args, None)[:2])
    scale = _ONE if left is None else left
    if reader.target is aten.linear.default and scaler.is_fixed(reader.args[1]) and scale.dim() <= 1:
        scaler.scale_weight(reader, 1, scale)
        return True
    if reader.target in CONVOLUTIONS and (by := _per_input_channel(reader, scale)) is not None:
        scaler.scale_weight(reader, 1, by)
        return True
    if reader.target is aten.sum.dim_IntList and scale.dim() == 0:
        _multiply_output(gm, scaler, reader, scale)
        return True
    if reader.target in (aten.matmul.default, aten.mul.Tensor):
        element_wise = reader.target is aten.mul.Tensor
        outer = strip(scale * (_ONE if right is None else right)) if element_wise else product_scale(left, right)
        if outer is not None:
            _multiply_output(gm, scaler, reader, outer)
            return True
    return False


def product_scale(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The scale of a product from those of its operands; None if it differs between summed channels.

    left [.., 1, D or 1], right [.., D or 1, E or 1]  ->  [.., 1, E or 1], or [] where all are alike.
    """
    a, b = (torch.ones(1, 1) if s is None else s.reshape(*[1] * max(0, 2 - s.dim()), *s.shape) for s in (left, right))
    a, b = a.to(b.device), b.to(a.device)
    summed = a.transpose(-1, -2) * b
    first = summed.narrow(-2, 0, 1)
    if a.shape[-2] > 1 or not _alike(summed, first):
        return None
    one = first.flatten()[0]
    return one if _alike(first, one) else strip(first)


def _alike(scales: Tensor, like: Tensor) -> bool:
    return torch.allclose(scales, like.expand_as(scales), rtol=1e-5, atol=0)


def _per_input_channel(node: Node, scale: Tensor) -> Tensor | None:
    """A scale per input channel in the layout of a convolution's weight [out, in / groups, ...]."""
    weight = arg(node, 1).meta["val"]
    if scale.dim() == 0:
        return scale
    if scale.numel() != scale.shape[0]:
        return None
    groups = arg(node, 6) if len(node.args) > 6 else 1
    rows = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def _multiply_output(gm: GraphModule, scaler: Scaler, node: Node, scale: Tensor) -> None:
    users = list(node.users)
    product = insert(gm, node.next, node, aten.mul.Tensor, node, 1.0)
    for user in users:
        user.replace_input_with(node, product)
    scaler.set_factor(product, scale)


def _decode_before(gm: GraphModule, scaler: Scaler, unit: Node, scale: Tensor, reader: Node) -> None:
    """Decode the counts just before this reader."""
    decoded = insert(gm, reader, unit, aten.mul.Tensor, unit, 1.0)
    scaler.set_factor(decoded, scale)
    for value in list(reader.all_input_nodes):
        if operand(value) is unit:
            reader.replace_input_with(value, decoded)


def scale_to_maker(gm: GraphModule, scaler: Scaler, unit: Node) -> None:
    """Move N / theta into what made the neuron's input, if nothing else reads that."""
    up: Node = arg(unit, 0)
    x = arg(up, 0)
    if scaler.absorb(x, scaler.constant(arg(up, 1))):
        up.replace_all_uses_with(arg(up, 0))
        gm.graph.erase_node(up)
        return
    why = "others read the value too" if len(x.users) > 1 else f"a factor does not move through {x.target}"
    decline(gm, "fold", "scale_to_maker", unit.name, why)


def _is_chained(scaler: Scaler, node: Node) -> bool:
    """Whether a node is (x * a) * b for constants a and b, alone in reading x * a, and all three are alike.

    Not in float16: a * b may leave its range where neither product does.
    """
    inner, factor = arg(node, 0), arg(node, 1)
    if not (isinstance(inner, Node) and inner.target is aten.mul.Tensor and len(inner.users) == 1):
        return False
    if not (scaler.is_constant(arg(inner, 1)) and scaler.is_constant(factor)):
        return False
    alike = {(v.dtype, *map(str, v.shape)) for n in (arg(inner, 0), inner, node) if (v := fake(n)) is not None}
    return len(alike) == 1 and next(iter(alike))[0] in _WIDE


def factor_to_factor(gm: GraphModule, scaler: Scaler, node: Node) -> None:
    """(x * a) * b -> x * (a * b), as behind a norm: the scale of its factors and its weight."""
    inner = arg(node, 0)
    factor = scaler.constant(arg(inner, 1)) * scaler.constant(arg(node, 1))
    scaler.set_factor(node, factor.to(arg(node, 0).meta["val"].dtype))
    node.update_arg(0, arg(inner, 0))
    gm.graph.erase_node(inner)
