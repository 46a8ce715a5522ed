"""RANGED -> RANGED: channels of unequal range are evened out between a value and the weights that read it.

x @ W'  ->  (x / s) @ (W s)', with s_d = max|x_d|^a / max|W_d|^(1 - a); 1 / s goes into what makes x, where it can.
The exponent a is the one that is predicted to give the smallest error.
Only with weights="int8": an outlier channel's threshold, folded into int8 weights, would spoil every output channel.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.integer import evens_channels, step
from fasfx.ops.byte_count import pair_limit
from fasfx.passes.clip import floored
from fasfx.program import Site, arg, decline, facts, insert
from fasfx.runner import Pass
from fasfx.scales import Scaler
from fasfx.synapses import RELAYS, operand, synapses

aten = torch.ops.aten
EXPONENTS = tuple(tenth / 10 for tenth in range(11))  # a: how much of a channel's range moves into the weights
EPS = 1e-6


class Smooth(Pass):
    """Even out the channels of every value that only linear layers read; one threshold per value is then enough.

    Also where a row has a threshold of its own, as gated layers have (fasfx.passes.observe).

    Exact up to float rounding.   Source: SmoothQuant, Xiao et al., ICML 2023, eq. 4.
    Rules: smooth_into_maker.
    """

    name, takes, gives = "smooth", "RANGED", "RANGED"

    def rewrite(self, gm: GraphModule) -> bool:
        """True if any channel was scaled. Nothing while a network is trained: its weights keep their meaning."""
        if not evens_channels(gm):
            return False
        nodes, scaler = {node.name: node for node in gm.graph.nodes}, Scaler(gm)
        readers: dict[Node, list[Node]] = {}
        for node, _ in synapses(gm):
            for value in map(operand, node.args[:2]):
                readers.setdefault(value, []).append(node)
        new = {}
        for site in facts(gm).sites.values():
            value = nodes[site.name]
            layers = readers[value]
            fits = site.channel == (-1,) and all(_is_layer(scaler, node) for node in layers)
            if fits and value.target is ops.hadamard.op:  # whose channels are even
                site = _evened(site, value.name, torch.ones_like(site.rms))
            elif fits and may_apply(self.name, "smooth_into_maker", value):
                scale = _scale(gm, scaler, site, layers)
                value = smooth_into_maker(gm, scaler, value, layers, scale.to(site.peak))
                site = _evened(site, value.name, scale)
            new[site.name] = site
        facts(gm).sites = new
        return bool(new)


def _evened(site: Site, name: str, scale: Tensor) -> Site:
    """A site whose channels are divided by a scale [D], and now have one threshold."""
    assert site.peak is not None and site.moment is not None
    peak = (_range(site) / scale).amax().to(site.peak)
    tail = None if site.tail is None else (site.tail / scale).amax().to(site.tail)
    blocks = scale.view(*site.moment.shape[:2], 1)
    moment = site.moment / (blocks * blocks.mT)
    return dataclasses.replace(site, name=name, channel=(), peak=peak, tail=tail, moment=moment)


def _is_layer(scaler: Scaler, node: Node) -> bool:
    return node.target is aten.linear.default and scaler.is_fixed(node.args[1])


def _scale(gm: GraphModule, scaler: Scaler, site: Site, readers: list[Node]) -> Tensor:
    """s [D] of the exponent whose products are predicted to be the most exact; 1 on average."""
    weights = torch.cat([scaler.value_of(arg(node, 1)).to(site.rms.dtype) for node in readers])
    value, weight = _positive(_range(site)), _positive(weights.abs().amax(0))
    scales = []
    for exponent in EXPONENTS:
        log = exponent * value.log() - (1 - exponent) * weight.log()
        scales.append((log - log.mean()).exp())
    neuron = facts(gm).config.neuron(site.population)
    return min(scales, key=lambda scale: float(predicted_error(weights, scale, site, neuron)))


def predicted_error(weights: Tensor, scale: Tensor, site: Site, neuron: tuple[str, int, int]) -> Tensor:
    """Mean squared error of a product whose values and weights [O, D] are both rounded, up to a common factor, [].

    Rounding errors are taken to be independent and even. A threshold of a row's own is taken to be three times the
    root mean square of its strongest channel.
    """
    seen = 3 * site.rms if site.dynamic else _range(site)
    code, steps, levels = neuron
    unit = (seen / scale).amax() / ops.CODES[code].capacity(steps, levels)
    lost = (unit * scale).minimum(12**0.5 * site.rms)  # what never reaches a count is lost whole, and no more
    of_values = (lost * weights).square().sum(1)
    of_weights = step(weights * scale, pair_limit(*neuron, site.signed)).square()
    return (of_values + of_weights * (site.rms / scale).square().sum()).mean()


def _range(site: Site) -> Tensor:
    """What every channel is expected to reach, [D]; for a row's own threshold, as a share of its row's largest."""
    assert site.peak is not None
    return site.rms if site.dynamic else floored(site.peak.to(site.rms.dtype), product=False)


def _positive(found: Tensor) -> Tensor:
    """Without zeros: channels that are silent count as almost so."""
    return found.clamp(min=float(found.amax()) * EPS + EPS**4)


def smooth_into_maker(gm: GraphModule, scaler: Scaler, value: Node, readers: list[Node], scale: Tensor) -> Node:
    """Divide what the readers see of a value by s, and multiply their weights; the node they read now.

    Where nothing else reads the value, what makes it takes 1 / s; else it is an explicit multiplication.
    """
    for node in readers:
        scaler.scale_weight(node, 1, scale)
    users = [user for user in value.users if user in readers or (user.target in RELAYS and operand(user) is value)]
    divided = insert(gm, value.next, value, aten.mul.Tensor, value, 1.0)
    for user in users:
        user.replace_input_with(value, divided)
    if scaler.absorb(value, 1 / scale):
        made: Node = arg(divided, 0)  # a value that was a factor times another is gone now: the other has taken it
        divided.replace_all_uses_with(made)
        gm.graph.erase_node(divided)
        return made
    scaler.set_factor(divided, 1 / scale)
    why = "others read the value too" if len(value.users) > 1 else f"a factor does not move through {value.target}"
    decline(gm, "smooth", "smooth_into_maker", value.name, why)
    return divided
