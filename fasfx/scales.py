"""Algebra of constant scales: how a factor on a value moves through views, norms and linear operators.

A scale is a tensor with the trailing dims of the value it multiplies (broadcast in front): [] for one factor,
[D] for one per feature, [H, 1, D] for one per head and feature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fasfx import ops
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.reductions import REDUCTIONS
from fasfx.program import add_tensor, arg, attribute, constants, fake
from fasfx.synapses import RELAYS, VIEWS

aten = torch.ops.aten
_THROUGH_ANY = {  # data movement and sums: one common factor passes
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    ops.hadamard.op,
}
_THROUGH_ALL = {  # element by element, positively homogeneous: any positive scale passes
    aten.contiguous.default,
    aten.clone.default,
    *RELAYS,
    aten.neg.default,
    aten.div.Tensor,
}
_NORM_WEIGHT = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
_CONV = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


class Scaler:
    """Moves scales into the weights of one program; weights are copied once, then changed in place."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm, self._fixed, self._owned = gm, constants(gm), set[Node]()

    def is_fixed(self, node: Any) -> bool:
        """Whether a node is a weight or computed from weights alone."""
        return isinstance(node, Node) and node in self._fixed

    def is_constant(self, value: Any) -> bool:
        """Whether a factor is a number or fixed."""
        return isinstance(value, int | float) or self.is_fixed(value)

    def constant(self, value: Any) -> Tensor:
        """Such a factor as a tensor of floats."""
        if isinstance(value, int | float):
            return torch.tensor(value, dtype=torch.float64)
        found = self.value_of(value)
        return found if found.is_floating_point() else found.float()

    def scale_weight(self, node: Node, position: int, factor: Tensor) -> None:
        """Multiply the weight at an argument position; the factor broadcasts to the weight."""
        weight = node.args[position]
        assert isinstance(weight, Node)
        if weight not in self._owned:
            value = self.value_of(weight)
            new = add_tensor(self._gm, f"{node.name}_arg{position}", value * factor.to(value), node)
            self._owned.add(new)
            self._fixed.add(new)
            node.update_arg(position, new)
            return
        attribute(self._gm, str(weight.target)).mul_(factor.to(attribute(self._gm, str(weight.target))))

    def value_of(self, node: Node) -> Tensor:
        """The tensor a fixed node stands for."""
        if node.op == "get_attr":
            return attribute(self._gm, str(node.target)).detach()  # type: ignore[no-any-return]
        inputs = [self.value_of(n) for n in node.all_input_nodes]
        lookup = dict(zip(node.all_input_nodes, inputs, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lookup.__getitem__)
        with torch.no_grad():
            value: Tensor = Interpreter(self._gm).call_function(node.target, args, kwargs)
        return value

    def absorb(self, node: Node, scale: Tensor) -> bool:
        """Make `node` compute scale times what it did by changing weights before it; False if it cannot.

        Only values with one reader are touched, so nothing else in the network changes.
        """
        if len(node.users) != 1 or node.op != "call_function":
            return False
        first, target = node.args[0], node.target
        if not isinstance(first, Node):
            return False
        if target in _THROUGH_ALL:
            return self.absorb(first, scale)
        if target is aten.relu.default:
            return bool((scale >= 0).all()) and self.absorb(first, scale)
        if target in _THROUGH_ANY:
            return scale.numel() == 1 and self.absorb(first, scale.reshape(()))
        if target in VIEWS:
            before = before_move(node, scale)
            return before is not None and self.absorb(first, before)
        if target is aten.sub.Tensor and self.is_fixed(node.args[1]) and _alike(first, node):
            if taken := self.absorb(first, scale):
                self.scale_weight(node, 1, scale)
            return taken
        if target is aten.mul.Tensor:
            return self._absorb_into_factor(node, scale)
        if target is ops.group.op:
            return scale.numel() == 1 and self._absorb_into_group(node, scale)
        return self._absorb_into_weights(node, scale)

    def _absorb_into_group(self, node: Node, scale: Tensor) -> bool:
        """A group's neurons weigh as much more; not where something is added to what they give."""
        function, factor = str(node.args[3]), float(scale)
        if not REDUCTIONS[FUNCTIONS[function].reduction].scales:
            return False
        self.scale_weight(node, 2, scale)
        for position in (6, 7, 8):  # the tails' slopes and the factor of the gradient
            node.update_arg(position, arg(node, position) * factor)
        return True

    def _absorb_into_factor(self, node: Node, scale: Tensor) -> bool:
        """x * constant: hand the whole factor on, or change the constant."""
        x, factor = arg(node, 0), arg(node, 1)
        if not self.is_constant(factor):  # of two values either may take it
            return any(isinstance(value, Node) and self.absorb(value, scale) for value in (factor, x))
        total = scale * self.constant(factor)
        if isinstance(x, Node) and self.absorb(x, total):
            node.replace_all_uses_with(arg(node, 0))  # x itself may have been a factor that is gone now
            self._gm.graph.erase_node(node)
            return True
        self.set_factor(node, total)
        return True

    def set_factor(self, node: Node, scale: Tensor) -> None:
        """Write a constant as the second argument of a product: a number if it is one, else a stored tensor."""
        if scale.numel() == 1:
            node.update_arg(1, scale.item())
            return
        new = add_tensor(self._gm, f"{node.name}_scale", scale.contiguous(), node)
        self._fixed.add(new)
        node.update_arg(1, new)

    def _absorb_into_weights(self, node: Node, scale: Tensor) -> bool:
        if node.target in _NORM_WEIGHT:
            positions = [p for p in _NORM_WEIGHT[node.target] if p < len(node.args) and node.args[p] is not None]
            weight = fake(node.args[2]) if 2 in positions else None
            if weight is None or scale.dim() > 1 or (scale.dim() and weight.dim() > 1):
                return False
        elif node.target is aten.linear.default and self.is_fixed(node.args[1]) and scale.dim() <= 1:
            positions = [p for p in (1, 2) if p < len(node.args) and node.args[p] is not None]
        elif node.target in _CONV and (scale.dim() == 0 or _per_output_channel(scale, _CONV[node.target])):
            positions = [p for p in (1, 2) if p < len(node.args) and node.args[p] is not None]
            scale = scale.reshape(-1) if scale.dim() else scale
        else:
            return False
        if not all(self.is_fixed(node.args[position]) for position in positions):
            return False
        for position in positions:
            weight = fake(node.args[position])
            assert weight is not None
            rows = scale.reshape(-1, *[1] * (weight.dim() - 1)) if scale.dim() and weight.dim() > 1 else scale
            self.scale_weight(node, position, rows)
        return True


def _alike(one: Node, other: Node) -> bool:
    """Whether two values have the same shape, so that nothing was broadcast between them."""
    a, b = fake(one), fake(other)
    return a is not None and b is not None and a.shape == b.shape


def _per_output_channel(scale: Tensor, spatial: int) -> bool:
    """Whether a scale of a convolution's output is [C, 1, ..]: one factor per channel, none per position."""
    return scale.dim() == 1 + spatial and scale.numel() == scale.shape[0]


def before_move(node: Node, scale: Tensor) -> Tensor | None:
    """The scale before a transpose, permute or view that is `scale` after it; None if it does not exist."""
    if scale.numel() == 1:
        return scale.reshape(())
    before, after = fake(node.args[0]), fake(node)
    if before is None or after is None:
        return None
    full = scale.reshape(*[1] * (after.dim() - scale.dim()), *scale.shape)
    if node.target is aten.transpose.int:
        return strip(full.transpose(int(node.args[1]), int(node.args[2])))  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        order = [int(d) % after.dim() for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        return strip(full.permute([order.index(d) for d in range(after.dim())]))
    return _before_view(tuple(before.shape), tuple(after.shape), strip(full))


def _before_view(before: tuple[Any, ...], after: tuple[Any, ...], scale: Tensor) -> Tensor | None:
    """Find trailing dims of both shapes that hold the same static number of elements and all of the scale."""
    for depth in range(max(scale.dim(), 1), len(after) + 1):
        tail = after[len(after) - depth :]
        if not all(isinstance(size, int) for size in tail):
            return None
        for other in range(1, len(before) + 1):
            source = before[len(before) - other :]
            if all(isinstance(size, int) for size in source) and math.prod(source) == math.prod(tail):
                return strip(scale.expand(tail).reshape(source))
    return None


def strip(scale: Tensor) -> Tensor:
    """Without leading dims of size 1, and a single dim per constant stretch kept only where values differ."""
    for dim in range(scale.dim()):
        if scale.shape[dim] > 1 and bool((scale == scale.narrow(dim, 0, 1)).all()):
            scale = scale.narrow(dim, 0, 1)
    while scale.dim() and scale.shape[0] == 1:
        scale = scale.squeeze(0)
    return scale
