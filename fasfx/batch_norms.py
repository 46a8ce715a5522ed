"""Batch norms in evaluation go into the convolution before them, with torch's own formula."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fasfx.applying import may_apply
from fasfx.levels import is_skipped
from fasfx.program import add_tensor, arg, arguments, attribute, facts
from fasfx.synapses import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

aten = torch.ops.aten


def fold_batch_norms(gm: GraphModule) -> bool:
    """conv -> batch_norm becomes one conv with scaled weights where nothing else reads the conv. Exact."""
    found = [n for n in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default) if _can_go(gm, n)]
    for node in [n for n in found if may_apply("normalise", "fold_batch_norms", n)]:
        conv, given, norm = node.args[0], arguments(node.args[0]), arguments(node)
        stored = [given["weight"], given["bias"], *(norm[k] for k in ("running_mean", "running_var", "weight", "bias"))]
        w, b, mean, var, scale, shift = (n if n is None else attribute(gm, str(n.target)) for n in stored)
        with torch.no_grad():
            transposed = conv.target in TRANSPOSED_CONVOLUTIONS
            fused = fuse_conv_bn_weights(w, b, mean, var, norm["eps"], scale, shift, transposed)  # type: ignore[arg-type]
        parts = zip(("weight", "bias"), fused, strict=True)
        conv.args = (conv.args[0], *(add_tensor(gm, f"{conv.name}_{k}", v, conv) for k, v in parts), *conv.args[3:])
        node.replace_all_uses_with(conv)
        sites = facts(gm).sites
        if node.name in sites:
            sites[conv.name] = dataclasses.replace(sites.pop(node.name), name=conv.name)
        gm.graph.erase_node(node)
    return bool(found)


def _can_go(gm: GraphModule, node: Node) -> bool:
    """Whether it follows a convolution of its own, both with stored weights, neither in a skipped module."""
    conv, norm = arg(node, 0), arguments(node)
    if norm["training"] or norm["running_mean"] is None or is_skipped(gm, node) or is_skipped(gm, conv):
        return False
    if conv.target not in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS or len(conv.users) != 1:
        return False
    given = arguments(conv)
    if conv.target in TRANSPOSED_CONVOLUTIONS and given["groups"] != 1:  # torch's formula is not for those
        return False
    stored = [given["weight"], given["bias"], norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"]]
    return all(n is None or n.op == "get_attr" for n in stored)
