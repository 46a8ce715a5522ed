"""Batch norms in evaluation go into the convolution before them, with torch's own formula."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fasfx.levels import is_skipped
from fasfx.program import add_tensor, arguments, attribute

aten = torch.ops.aten
_CONVOLUTIONS = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), False),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding), False),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), True),
}


def fold_batch_norms(gm: GraphModule) -> bool:
    """conv -> batch_norm becomes one conv with scaled weights where nothing else reads the conv. Exact."""
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        conv, norm = node.args[0], arguments(node)
        if norm["training"] or conv.target not in _CONVOLUTIONS or len(conv.users) != 1:
            continue
        if is_skipped(gm, node) or is_skipped(gm, conv):
            continue
        given = arguments(conv)
        stored = [given["weight"], given["bias"], *(norm[k] for k in ("running_mean", "running_var", "weight", "bias"))]
        if not all(n is None or (isinstance(n, Node) and n.op == "get_attr") for n in stored):
            continue
        w, b, mean, var, scale, shift = (cast(Any, None) if n is None else attribute(gm, str(n.target)) for n in stored)
        transposed = _CONVOLUTIONS[conv.target] and given["groups"] == 1
        if mean is None or (_CONVOLUTIONS[conv.target] and not transposed):
            continue
        with torch.no_grad():
            fused = fuse_conv_bn_weights(w, b, mean, var, norm["eps"], scale, shift, transposed)
        parts = zip(("weight", "bias"), fused, strict=True)
        conv.args = (conv.args[0], *(add_tensor(gm, f"{conv.name}_{k}", v, conv) for k, v in parts), *conv.args[3:])
        node.replace_all_uses_with(conv)
        gm.graph.erase_node(node)
        changed = True
    return changed
