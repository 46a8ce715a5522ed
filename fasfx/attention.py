"""Attention written out: scaled dot products, masks, and softmax with deferred normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy

from fasfx.program import arg, fake
from fasfx.rewrite import emit, proxy, replace

aten = torch.ops.aten


def attention_to_products(gm: GraphModule, node: Node) -> None:
    """sdpa(q, k, v) = softmax(q k' scale + mask) v, with the softmax kept whole; see softmax_to_deferred.

    Shape: q [.., Lq, D], k [.., Lk, D], v [.., Lk, E] -> [.., Lq, E].  Exact.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (proxy(gm, given[name]) for name in names[:3])
    features = fake(given["query"])
    assert features is not None
    scale = given.get("scale") or 1 / math.sqrt(features.shape[-1])

    def build() -> Any:
        keys, values = k, v
        if given.get("enable_gqa"):
            keys, values = (_repeat_heads(x, features.shape[-3]) for x in (k, v))
        scores = aten.matmul.default(aten.mul.Tensor(q, scale), aten.transpose.int(keys, -2, -1))
        if (mask := given.get("attn_mask")) is not None:
            scores = aten.add.Tensor(scores, _bias(gm, mask, features.dtype))
        elif given.get("is_causal"):
            scores = aten.where.ScalarOther(_causal(q, k), scores, -math.inf)
        weights = aten.softmax.int(scores, -1)
        if given.get("dropout_p"):
            weights = aten.dropout.default(weights, given["dropout_p"], False)  # `set_dropout` switches it on
        return aten.matmul.default(weights, values)

    replace(gm, node, build)


def _bias(gm: GraphModule, mask: Node, dtype: torch.dtype) -> Any:
    """What a mask adds to the scores: 0 and -inf for a boolean one, made once for all layers that share it."""
    value = fake(mask)
    assert value is not None
    if value.dtype != torch.bool:
        return proxy(gm, mask)
    made = [user for user in mask.users if user.target is aten.where.Scalar and user.args[1:] == (0.0, -math.inf)]
    if made:
        bias = proxy(gm, made[0])
    else:
        bias = emit(gm, mask.next, lambda: aten.where.Scalar(proxy(gm, mask), 0.0, -math.inf))
    return bias if dtype == torch.get_default_dtype() else aten.to.dtype(bias, dtype)


def _causal(q: Proxy, k: Proxy) -> Any:
    value = fake(q.node)
    device = value.device if value is not None else None
    rows, columns = (aten.arange.default(aten.sym_size.int(x, -2), device=device) for x in (q, k))
    return aten.le.Tensor(columns, aten.unsqueeze.default(rows, -1))


def _repeat_heads(x: Proxy, heads: int) -> Any:
    value = fake(x.node)
    assert value is not None
    return aten.repeat_interleave.self_int(x, heads // value.shape[-3], -3)


def softmax_to_deferred(gm: GraphModule, node: Node) -> bool:
    """softmax(s) v = (e v) / sum(e) with e = exp(s - max s): what travels is e in [0, 1], not small probabilities.

    The maximum is bounded below and the sum by 1 (its value where anything is attended), so that fully masked
    rows give zeros. Applies to a softmax over the last dim that enters a product; other users get e / sum(e).
    Shape: s [.., Lq, Lk], v [.., Lk, E].  Exact.
    """
    value = fake(node)
    before = fake(node.args[0])
    if value is None or before is None or value.dtype != before.dtype or node.args[1] not in (-1, value.dim() - 1):
        return False
    products = _product_users(node)
    if not products:
        return False
    low = torch.finfo(value.dtype).min

    def exponentials() -> tuple[Any, Any]:
        s = proxy(gm, arg(node, 0))
        e = aten.exp.default(aten.sub.Tensor(s, aten.clamp.default(aten.amax.default(s, [-1], True), low)))
        return e, aten.clamp.default(aten.sum.dim_IntList(e, [-1], True), 1)

    e, total = emit(gm, node, exponentials)
    for relay, product in products:

        def deferred(relay: Node | None = relay, product: Node = product) -> Any:
            weights = e if relay is None else aten.dropout.default(e, *relay.args[1:])
            return aten.div.Tensor(aten.matmul.default(weights, proxy(gm, arg(product, 1))), total)

        replace(gm, product, deferred)
    for relay in {relay for relay, _ in products if relay is not None and not relay.users}:
        gm.graph.erase_node(relay)  # dead code elimination keeps what is random
    replace(gm, node, lambda: aten.div.Tensor(e, total))
    return True


def _product_users(node: Node) -> list[tuple[Node | None, Node]]:
    """(dropout or None, product) for every product whose left operand is this softmax."""
    found: list[tuple[Node | None, Node]] = []
    for user in node.users:
        if user.target is aten.matmul.default and user.args[0] is node:
            found.append((None, user))
        if user.target is aten.dropout.default:
            found += [(user, u) for u in user.users if u.target is aten.matmul.default and u.args[0] is user]
    return found
