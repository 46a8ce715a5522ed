"""Non-linear operators of several values, written as products, sums and functions of one variable.

Every entry of COMPOSITIONS takes the arguments of its operator by name, as traced values, and builds what takes the
operator's place. Shapes are torch's; exact up to float rounding. What it returns None for stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Proxy

from fasfx.applying import may_apply
from fasfx.levels import is_skipped
from fasfx.program import arguments, constants, decline, fake
from fasfx.rewrite import emit, proxies
from fasfx.synapses import carried_values

aten = torch.ops.aten


def compose(gm: GraphModule) -> bool:
    """Write out every composition on values outside skipped modules; True if there was one."""
    fixed, values = constants(gm), carried_values(gm)
    changed = False
    for node in [n for n in gm.graph.nodes if n in values and n not in fixed and n.target in COMPOSITIONS]:
        if is_skipped(gm, node) or (node.target is aten.div.Tensor and node.args[1] not in values):
            continue
        if not may_apply("normalise", "compose", node):
            continue
        write_out = partial(COMPOSITIONS[node.target], **proxies(gm, arguments(node)))
        result = emit(gm, node, write_out)
        if result is None:
            decline(gm, "normalise", "compose", node.name, f"{node.target} is not written out with these arguments")
        else:
            node.replace_all_uses_with(result.node)
            gm.graph.erase_node(node)
            changed = True
    return changed


# --- norms: x - mean, its square and the reciprocal root of that meet as spikes ---------------------------------


def _layer_norm(input: Proxy, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float, **_: Any) -> Any:
    return _affine(_normalised(_centred(input, dims := _last(normalized_shape)), dims, eps), weight, bias)


def _rms_norm(input: Proxy, normalized_shape: Sequence[int], weight: Any, eps: float | None, **_: Any) -> Any:
    eps = torch.finfo(_value(input).dtype).eps if eps is None else eps
    return _affine(_normalised(input, _last(normalized_shape), eps), weight, None)


def _group_norm(input: Proxy, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any) -> Any:
    shape = [aten.sym_size.int(input, d) if not isinstance(s, int) else s for d, s in enumerate(_value(input).shape)]
    grouped = aten.reshape.default(input, [shape[0], num_groups, -1])
    whole = aten.reshape.default(_normalised(_centred(grouped, [-1]), [-1], eps), shape)
    per_channel = [-1] + [1] * (_value(input).dim() - 2)
    parts = (p if p is None else aten.reshape.default(p, per_channel) for p in (weight, bias))
    return _affine(whole, *parts)


def _last(normalized_shape: Sequence[int]) -> list[int]:
    return list(range(-len(normalized_shape), 0))


def _centred(x: Proxy, dims: list[int]) -> Any:
    return aten.sub.Tensor(x, aten.mean.dim(x, dims, True))


def _normalised(d: Any, dims: list[int], eps: float) -> Any:
    power = aten.mean.dim(aten.mul.Tensor(d, d), dims, True)
    return aten.mul.Tensor(d, aten.rsqrt.default(aten.add.Tensor(power, eps)))


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else aten.mul.Tensor(x, weight)
    return x if bias is None else aten.add.Tensor(x, bias)


def _batch_norm(
    input: Proxy, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, eps: float, **_: Any
) -> Any:
    """In evaluation a constant scale and shift per channel."""
    if training or running_mean is None:
        return None
    per_channel = [-1] + [1] * (_value(input).dim() - 2)
    scale = aten.rsqrt.default(aten.add.Tensor(running_var, eps))
    scale = scale if weight is None else aten.mul.Tensor(scale, weight)
    shift = aten.neg.default(aten.mul.Tensor(running_mean, scale))
    shift = shift if bias is None else aten.add.Tensor(shift, bias)
    return _affine(input, aten.reshape.default(scale, per_channel), aten.reshape.default(shift, per_channel))


# --- quotients, powers, softmax ---------------------------------------------------------------------------------


def _div(input: Proxy, other: Any) -> Any:
    return aten.mul.Tensor(input, aten.reciprocal.default(other))


def _softmax(input: Proxy, dim: int, dtype: torch.dtype | None) -> Any:
    e = aten.exp.default(_below_peak(input, dim, dtype))
    return aten.mul.Tensor(e, aten.reciprocal.default(aten.sum.dim_IntList(e, [dim], True)))


def _log_softmax(input: Proxy, dim: int, dtype: torch.dtype | None) -> Any:
    below = _below_peak(input, dim, dtype)
    return aten.sub.Tensor(below, aten.log.default(aten.sum.dim_IntList(aten.exp.default(below), [dim], True)))


def _below_peak(x: Any, dim: int, dtype: torch.dtype | None) -> Any:
    x = x if dtype is None else aten.to.dtype(x, dtype)
    return aten.sub.Tensor(x, aten.amax.default(x, [dim], True))


def _pow(input: Proxy, exponent: float) -> Any:
    """Whole powers are products, the powers +-1/2 and -1 functions of their own."""
    if exponent in _ROOTS:
        return _ROOTS[exponent](input)
    if exponent != int(exponent) or exponent < 1:
        return None
    result, square, rest = None, input, int(exponent)
    while rest:
        if rest % 2:
            result = square if result is None else aten.mul.Tensor(result, square)
        rest //= 2
        square = aten.mul.Tensor(square, square) if rest else square
    return result


_ROOTS = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}


def _glu(input: Proxy, dim: int) -> Any:
    value, gate = (aten.chunk.default(input, 2, dim)[i] for i in range(2))
    return aten.mul.Tensor(value, aten.sigmoid.default(gate))


def _vector_norm(input: Proxy, ord: float, dim: Any, keepdim: bool, **_: Any) -> Any:
    if ord != 2 or dim is None:
        return None
    return aten.sqrt.default(aten.sum.dim_IntList(aten.mul.Tensor(input, input), list(dim), keepdim))


# --- functions that others of one variable make up --------------------------------------------------------------


def _elu(input: Proxy, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale * (max(x, 0) + alpha * (exp(input_scale * min(x, 0)) - 1)); CELU and SELU with arguments of their own."""
    below = aten.exp.default(aten.mul.Tensor(aten.clamp_max.default(input, 0), input_scale))
    bent = aten.mul.Tensor(aten.sub.Tensor(below, 1.0), alpha)
    return aten.mul.Tensor(aten.add.Tensor(aten.relu.default(input), bent), scale)


_SELU = (1.6732632423543772, 1.0507009873554805)  # alpha, scale; Klambauer et al., NeurIPS 2017


def _log_sigmoid(input: Proxy) -> Any:
    return aten.neg.default(aten.softplus.default(aten.neg.default(input)))


def _of_log(input: Proxy, base: float) -> Any:
    return aten.mul.Tensor(aten.log.default(input), 1 / math.log(base))


def _value(x: Proxy) -> torch.Tensor:
    value = fake(x.node)
    assert value is not None
    return value


COMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    aten.div.Tensor: _div,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten.pow.Tensor_Scalar: _pow,
    aten.square.default: lambda input: aten.mul.Tensor(input, input),
    aten.glu.default: _glu,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.elu.default: _elu,
    aten.celu.default: lambda input, alpha: _elu(input, alpha, input_scale=1 / alpha),
    aten.selu.default: lambda input: _elu(input, *_SELU),
    aten.log_sigmoid.default: _log_sigmoid,
    aten.tan.default: lambda input: _div(aten.sin.default(input), aten.cos.default(input)),
    aten.exp2.default: lambda input: aten.exp.default(aten.mul.Tensor(input, math.log(2))),
    aten.expm1.default: lambda input: aten.sub.Tensor(aten.exp.default(input), 1.0),
    aten.log1p.default: lambda input: aten.log.default(aten.add.Tensor(input, 1.0)),
    aten.log2.default: lambda input: _of_log(input, 2),
    aten.log10.default: lambda input: _of_log(input, 10),
    aten.erfc.default: lambda input: aten.rsub.Scalar(aten.erf.default(input), 1.0),
}
