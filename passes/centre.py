"""NORMAL -> NORMAL: layers are sent how far a value is from where it usually is, and their biases hold the rest.

x @ W' + b  ->  (x - c) @ W' + (c @ W' + b), with c_d the median of channel d in calibration (observe finds it).
Only with centre=True. A neuron errs by a share of what it is sent, and what is usual need not be sent.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fasfx.applying import may_apply
from fasfx.levels import spiking_operands
from fasfx.program import add_tensor, arg, constants, decline, facts, fake, insert
from fasfx.runner import Pass
from fasfx.synapses import channel_dims, non_negative, operand

aten = torch.ops.aten


class Centre(Pass):
    """Take the usual value off everything that only linear layers read.

    Exact up to float rounding, whatever c is and however the weights change.   Source: channel-wise shifting, Outlier
    Suppression+, Wei et al., EMNLP 2023, by the middle of the range; the median here, of rows that no attention mask
    takes out.
    Rules: centre_layers. It declines, with the reason, for values that products or convolutions read (padding is not
    centred), and for those that cannot be negative: they rest at 0, where silence costs nothing.
    """

    name, takes, gives = "centre", "NORMAL", "NORMAL"

    def rewrite(self, gm: GraphModule) -> bool:
        """True if any value was centred."""
        if not facts(gm).config.centre:
            return False
        read, fixed = dict[Node, list[tuple[Node, int]]](), constants(gm)
        for node, position in spiking_operands(gm):
            read.setdefault(operand(node.args[position]), []).append((node, position))
        centred = list[str]()
        for value, readers in read.items():
            if (why := _why_not(value, readers, fixed)) is not None:
                decline(gm, self.name, "centre_layers", value.name, why)
            elif may_apply(self.name, "centre_layers", value):
                centred.append(centre_layers(gm, [node for node, _ in readers]).name)
        facts(gm).centres = centred
        return bool(centred)


def _why_not(value: Node, readers: list[tuple[Node, int]], fixed: set[Node]) -> str | None:
    if non_negative(value):
        return "it cannot be negative"
    for node, position in readers:
        if node.target is not aten.linear.default or position or not fixed.issuperset(node.all_input_nodes[1:]):
            return f"{node.target} reads it"
        if not channel_dims(node, position):
            return "it has no channels of a fixed number"
    if len({node.args[0] for node, _ in readers}) > 1:
        return "its readers see it through different operators"
    return None


def centre_layers(gm: GraphModule, layers: list[Node]) -> Node:
    """Take c, for now zeros [D], off what these layers read; the difference they read now, whose second argument is c.

    Their biases stay computed from their weights, which may be trained.
    """
    value = arg(layers[0], 0)
    seen = fake(value)
    assert seen is not None
    zeros = torch.zeros(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    centre = add_tensor(gm, f"centre_{value.name}", zeros, layers[0])
    centred = insert(gm, layers[0], value, aten.sub.Tensor, value, centre)
    for layer in layers:
        bias = insert(gm, layer, layer, aten.linear.default, centre, *layer.args[1:])
        layer.args = (centred, arg(layer, 1), bias)
    return centred
