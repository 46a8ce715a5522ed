"""CAPTURED -> NORMAL: one spelling per operator; nothing but float rounding changes.

Rules: addmm, mm, bmm, baddbmm become linear or matmul; RMSNorm and tanh-GELU written out in primitives become
one operator; scaled dot-product attention is written out with deferred normalisation; views become reshapes.
With nonlinear="spiking" norms, quotients, powers and softmax are written out in products and functions of one variable.
A batch norm in evaluation goes into the convolution before it.
Assertions, guards, aliases and conversions that convert nothing go.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fasfx.applying import may_apply
from fasfx.attention import attention_to_products, softmax_to_deferred
from fasfx.batch_norms import fold_batch_norms
from fasfx.compositions import compose
from fasfx.program import arg, attribute, facts, fake
from fasfx.rewrite import proxy, replace, rewrite
from fasfx.runner import Pass

aten = torch.ops.aten


@rewrite(into=lambda bias, x, weight: aten.linear.default(x, aten.t.default(weight), bias))
def addmm_to_linear(bias: Tensor, x: Tensor, weight: Tensor) -> Any:
    """bias + x @ weight is a linear layer.  Shape: x [M, K], weight [K, N] -> [M, N].  Exact."""
    return aten.addmm.default(bias, x, weight)


@rewrite(into=lambda x, y: aten.matmul.default(x, y))
def mm_to_matmul(x: Tensor, y: Tensor) -> Any:
    """Two-dimensional product.  Exact."""
    return aten.mm.default(x, y)


@rewrite(into=lambda x, y: aten.matmul.default(x, y))
def bmm_to_matmul(x: Tensor, y: Tensor) -> Any:
    """Batched product.  Exact."""
    return aten.bmm.default(x, y)


@rewrite(into=lambda add, x, y: aten.add.Tensor(add, aten.matmul.default(x, y)))
def baddbmm_to_matmul(add: Tensor, x: Tensor, y: Tensor) -> Any:
    """Batched product added to a tensor, with unit alpha and beta.  Exact."""
    return aten.baddbmm.default(add, x, y)


@rewrite(
    into=lambda x, weight, eps: aten.rms_norm.default(x, [_last(x)], weight, eps),
    when=lambda x, weight, power, dims: _is_rms_norm(x, weight, power, dims),
)
def primitives_to_rms_norm(x: Tensor, weight: Tensor, eps: float, power: int, dims: list[int]) -> Any:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim.  Source: Zhang & Sennrich 2019.  Exact."""
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, power), dims, True)
    return aten.mul.Tensor(weight, aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps))))


@rewrite(
    into=lambda x, weight, eps: aten.rms_norm.default(x, [_last(x)], weight, eps),
    when=lambda x, weight, power, dims: _is_rms_norm(x, weight, power, dims),
)
def primitives_to_rms_norm_weight_last(x: Tensor, weight: Tensor, eps: float, power: int, dims: list[int]) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight: the other order of the product.  Exact."""
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, power), dims, True)
    return aten.mul.Tensor(aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps))), weight)


@rewrite(
    into=lambda x: aten.gelu.default(x, approximate="tanh"),
    when=lambda half, cubic, power, root, one: _is_gelu(half, cubic, power, root, one),
)
def primitives_to_tanh_gelu(x: Tensor, half: float, cubic: float, power: float, root: float, one: float) -> Any:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).  Source: Hendrycks & Gimpel 2016.  Exact."""
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, power), cubic))
    tanh = aten.tanh.default(aten.mul.Tensor(inner, root))
    return aten.mul.Tensor(aten.mul.Tensor(x, half), aten.add.Tensor(tanh, one))


@rewrite(
    into=lambda x, slope: aten.mul.Tensor(aten.silu.default(aten.mul.Tensor(x, slope)), 1 / slope),
    when=lambda slope: (isinstance(slope, int | float) and slope > 0) or f"{slope} is no positive number",
)
def primitives_to_quick_gelu(x: Tensor, slope: float) -> Any:
    """x * sigmoid(slope x) = silu(slope x) / slope; with 1.702 the quick GELU of CLIP.  Exact."""
    return aten.mul.Tensor(x, aten.sigmoid.default(aten.mul.Tensor(x, slope)))


@rewrite(
    into=lambda q, k, v, mask, scale: aten.scaled_dot_product_attention.default(q, k, v, mask, scale=scale),
    when=lambda mask, low, one, zero: _is_zeroed(mask, low, one, zero),
)
def zeroed_attention_to_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, low: float, one: int, zero: Tensor, scale: float
) -> Any:
    """Attention whose fully masked rows are set to zero by hand: ours gives zeros there anyway.  Exact."""
    kept = aten.to.dtype(mask, torch.float32)
    added = aten.mul.Tensor(aten.to.dtype(aten.bitwise_not.default(mask), torch.float32), low)
    empty = aten.lt.Scalar(aten.sum.dim_IntList(kept, [-1], True), one)
    attended = aten.scaled_dot_product_attention.default(q, k, v, added, scale=scale)
    return aten.where.self(empty, zero, attended)


def _is_zeroed(mask: Any, low: Any, one: Any, zero: Any) -> bool | str:
    value = fake(mask)
    if value is None or value.dtype != torch.bool:
        return "the mask is not boolean"
    if low > torch.finfo(torch.float32).min or one != 1:
        return f"masked scores are lowered by {low} where fewer than {one} keys are attended: that is no full mask"
    if not isinstance(zero, Node) or zero.target is not aten.zeros.default:
        return "fully masked rows are not set to zero"
    return True


def _last(x: Proxy) -> int:
    value = fake(x.node)
    assert value is not None
    return int(value.shape[-1])


def _is_rms_norm(x: Node, weight: Any, power: Any, dims: Any) -> bool | str:
    value, scale = fake(x), fake(weight)
    if power != 2 or list(dims) not in ([-1], [value.dim() - 1 if value is not None else -1]):
        return f"mean of x^{power} over dims {dims} is no RMSNorm"
    if value is None or scale is None or scale.dim() != 1 or scale.shape[0] != value.shape[-1]:
        return "the weight has not one element per feature"
    return True


def _is_gelu(half: Any, cubic: Any, power: Any, root: Any, one: Any) -> bool | str:
    expected = (0.5, 0.044715, 3.0, math.sqrt(2 / math.pi), 1.0)
    found = (half, cubic, power, root, one)
    same = all(
        isinstance(f, float | int) and math.isclose(f, e, rel_tol=1e-6) for f, e in zip(found, expected, strict=True)
    )
    return same or f"constants {found} are not those of tanh-GELU"


class Normalise(Pass):
    """One spelling per operator."""

    name, takes, gives = "normalise", "CAPTURED", "NORMAL"
    rules = (
        addmm_to_linear,
        mm_to_matmul,
        bmm_to_matmul,
        baddbmm_to_matmul,
        primitives_to_rms_norm,
        primitives_to_rms_norm_weight_last,
        primitives_to_tanh_gelu,
        primitives_to_quick_gelu,
        zeroed_attention_to_attention,
    )

    def rewrite(self, gm: GraphModule) -> bool:
        """Clean, apply the rules, then write attention out."""
        changed = remove_assertions(gm)
        changed |= views_to_reshapes(gm)
        changed |= remove_identities(gm)
        changed |= super().rewrite(gm)
        changed |= scaled_products_to_matmul(gm)
        if not facts(gm).trainable:
            changed |= fold_batch_norms(gm)
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if may_apply(self.name, "attention_to_products", node):
                attention_to_products(gm, node)
                changed = True
        for node in gm.graph.find_nodes(op="call_function", target=aten.softmax.int):
            changed |= may_apply(self.name, "softmax_to_deferred", node) and softmax_to_deferred(gm, node)
        if facts(gm).config.nonlinear == "spiking":
            changed |= compose(gm)
        return changed


def remove_assertions(gm: GraphModule) -> bool:
    """Assertions and guards state what capture has checked already."""
    gone = [n for n in gm.graph.nodes if n.op == "call_module" or re.search(r"_assert|sym_constrain", str(n.target))]
    for node in reversed(gone):
        gm.graph.erase_node(node)
    return bool(gone)


def remove_identities(gm: GraphModule) -> bool:
    """Aliases, conversions to the dtype and device and reshapes to the shape a value already has; detaches.

    While a network trains, a detach stays where parameters are behind it.
    """
    same = (aten.alias.default, aten.lift_fresh_copy.default)
    convert = (
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    )
    learned = _learned(gm) if facts(gm).trainable else set[Node]()
    gone = [
        n
        for n in gm.graph.nodes
        if n.target in same
        or (n.target is aten.detach.default and arg(n, 0) not in learned)
        or (n.target in convert and _unchanged(n))
        or (n.target is aten.clone.default and not n.kwargs)
        or (n.target is aten.slice.Tensor and _whole(n))
        or (n.target is aten.reshape.default and _same_shape(n))
    ]
    for node in gone:
        node.replace_all_uses_with(arg(node, 0))
        gm.graph.erase_node(node)
    return bool(gone)


def views_to_reshapes(gm: GraphModule) -> bool:
    """A view depends on strides, which a rewrite may change; a reshape does not."""
    views = [n for n in gm.graph.nodes if n.target in (aten.view.default, aten._unsafe_view.default)]
    for node in views:
        node.target = aten.reshape.default
    return bool(views)


def _learned(gm: GraphModule) -> set[Node]:
    """What parameters are behind: detached from it, a value passes no gradient on."""
    found = set[Node]()
    for node in gm.graph.nodes:
        parameter = node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), nn.Parameter)
        if parameter or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _unchanged(node: Node) -> bool:
    before, after = fake(node.args[0]), fake(node)
    return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)


def _same_shape(node: Node) -> bool:
    before, after = fake(node.args[0]), fake(node)
    return before is not None and after is not None and statically_known_true(sym_eq(before.shape, after.shape))


def _whole(node: Node) -> bool:
    """A slice from the start to the end of a dim: [:]."""
    start, end, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])[:3]
    return bool(start in (None, 0) and end in (None, 2**63 - 1) and step == 1)


def scaled_products_to_matmul(gm: GraphModule) -> bool:
    """addmm and baddbmm with alpha or beta, and products of a value with itself: no pattern matches those."""
    sums, plain = (aten.addmm.default, aten.baddbmm.default), (aten.mm.default, aten.bmm.default)
    found = [n for n in gm.graph.nodes if n.target in sums + plain]
    for node in [n for n in found if may_apply("normalise", "scaled_products_to_matmul", n)]:

        def product(node: Node = node) -> Any:
            *added, x, y = (proxy(gm, arg(node, i)) for i in range(len(node.args)))
            alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
            out = aten.matmul.default(x, y)
            out = out if alpha == 1 else aten.mul.Tensor(out, alpha)
            if not added or beta == 0:
                return out
            return aten.add.Tensor(out, added[0] if beta == 1 else aten.mul.Tensor(added[0], beta))

        replace(gm, node, product)
    return bool(found)
