"""RANGED -> RANGED: weights move to what int8 can hold, the error of each one fed into those rounded after it.

W  ->  W~, for which |x W' - x W~'| is small over the calibration's x, and not |W - W~|. `lower` finds the integers.
Only with weights="int8", where an input has one threshold (after smooth).
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from fasfx.applying import may_apply
from fasfx.feedback import fed_back
from fasfx.ledger import Approximate, Entry
from fasfx.ops.byte_count import pair_limit
from fasfx.program import Site, add_tensor, arg, facts, module_path
from fasfx.runner import Pass
from fasfx.scales import Scaler
from fasfx.synapses import operand, synapses

aten = torch.ops.aten
FED_BACK = Approximate("int8 weights, the error of each fed into those rounded after it")


class Round(Pass):
    """Round weights with error feedback, on the second moments that observe found.

    Error:  measured, not bounded: less than that of the nearest int8 weights on text like the calibration's.
    Source: GPTQ, Frantar et al., ICLR 2023.
    Rules:  round_layers. For the T of the conversion; another T may round once more, to the nearest.
    """

    name, takes, gives, numerics = "round", "RANGED", "RANGED", "ledger"

    def rewrite(self, gm: GraphModule) -> bool:
        """True if any weight was rounded."""
        nodes, scaler = {node.name: node for node in gm.graph.nodes}, Scaler(gm)
        readers: dict[Node, list[Node]] = {}
        for node, _ in synapses(gm):
            readers.setdefault(operand(node.args[0]), []).append(node)
        moments = [site for site in facts(gm).sites.values() if site.moment is not None]
        done = False
        for site in moments:
            if site.channel == () and may_apply(self.name, "round_layers", nodes[site.name]):
                round_layers(gm, scaler, site, readers[nodes[site.name]])
                done = True
            facts(gm).sites[site.name] = dataclasses.replace(site, moment=None)
        return done


def round_layers(gm: GraphModule, scaler: Scaler, site: Site, layers: list[Node]) -> None:
    """Round the weights of all layers that read a site: they share its moments."""
    assert site.moment is not None
    weights = [scaler.value_of(arg(layer, 1)) for layer in layers]
    pair = pair_limit(*facts(gm).config.neuron(site.population), site.signed)
    rounded = fed_back(torch.cat(weights), pair, site.moment).split([len(weight) for weight in weights])
    for layer, weight in zip(layers, rounded, strict=True):
        old = arg(layer, 1)
        new = add_tensor(gm, f"{layer.name}_rounded", weight.contiguous(), old)
        layer.update_arg(1, new)
        for lookup in [user for user in old.users if user.target is aten.embedding.default]:  # of the same weights
            lookup.update_arg(0, new)
        facts(gm).ledger.add(Entry("round", "round_layers", layer.name, module_path(layer), FED_BACK))
