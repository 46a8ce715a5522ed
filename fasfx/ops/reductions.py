"""Bringing any float into the interval of a group, and back: shifts of the exponent, whole periods.

split: x -> (z, k), z in the core's interval; join: (core(z), k) -> f(x). Multiplying by 2^k is a shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18 as onnx
from torch import Tensor

from fasfx.ops.library import onnx_number, onnx_tensor

_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}  # integer, mantissa, bias


@dataclass(frozen=True)
class Reduction:
    """split and join in torch.

    scales:  whether a factor on the result is one on the core: not where something is added afterwards.
    relative: whether the core's error counts relative to a power of two.
    normal:   whether the smallest normal number stands for what is smaller.
    """

    split: Callable[[Tensor], tuple[Tensor, Any]]
    join: Callable[[Tensor, Any], Tensor]
    scales: bool = True
    relative: bool = False
    normal: bool = False


def power_of_two(k: Tensor, dtype: torch.dtype) -> Tensor:
    """2^k for whole k, by writing the exponent's bits; 0 below the normal range, infinity above."""
    integer, mantissa, bias = _BITS[dtype]
    return (k.clamp(-bias, bias + 1).to(integer) + bias).bitwise_left_shift(mantissa).view(dtype)


def shifted(y: Tensor, k: Tensor) -> Tensor:
    """y * 2^k in two halves, so that neither leaves the range before the product does."""
    half = torch.floor(k / 2)
    return y * power_of_two(half, y.dtype) * power_of_two(k - half, y.dtype)


def _exp_split(x: Tensor) -> tuple[Tensor, Tensor]:
    bias = _BITS[x.dtype][2]
    t = (x * math.log2(math.e)).clamp(-bias - 1.0, bias + 1.0)
    k = torch.floor(t)
    return t - k, k


def _mantissa(x: Tensor) -> tuple[Tensor, Tensor]:
    """z in [1, 2) and the exponent; below the normal range, 0 and negative numbers count as its smallest."""
    m, e = torch.frexp(x.clamp(torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).max))
    return 2 * m, (e - 1).to(x.dtype)


def _reciprocal_split(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    z, k = _mantissa(x.abs())
    return z, (k, torch.where(x < 0, -1.0, 1.0).to(x.dtype))


def _root_split(x: Tensor) -> tuple[Tensor, Tensor]:
    z, e = _mantissa(x)
    k = torch.floor(e / 2)
    return z * (1 + e - 2 * k), k


def _period_split(x: Tensor) -> tuple[Tensor, None]:
    turns = x / (2 * math.pi)
    return turns - torch.floor(turns), None


REDUCTIONS: dict[str, Reduction] = {
    "none": Reduction(lambda x: (x, None), lambda y, _: y),
    "exp": Reduction(_exp_split, lambda y, k: y * power_of_two(k, y.dtype), relative=True),
    "reciprocal": Reduction(
        _reciprocal_split, lambda y, parts: shifted(y, -parts[0]) * parts[1], relative=True, normal=True
    ),
    "rsqrt": Reduction(_root_split, lambda y, k: y * power_of_two(-k, y.dtype), relative=True, normal=True),
    "sqrt": Reduction(_root_split, lambda y, k: y * power_of_two(k, y.dtype), relative=True, normal=True),
    "log": Reduction(_mantissa, lambda y, k: y + k * math.log(2), scales=False, normal=True),
    "period": Reduction(_period_split, lambda y, _: y),
}


# --- the same in ONNX; powers of two come from a table, exponents from a logarithm put right --------------------


def onnx_split(reduction: str, x: Any, kind: Any) -> tuple[Any, Any]:
    """(z, k) of an ONNX value of this numpy dtype."""
    if reduction == "none":
        return x, None
    if reduction == "period":
        turns = onnx.Div(x, onnx_number(2 * math.pi, kind))
        return onnx.Sub(turns, onnx.Floor(turns)), None
    if reduction == "exp":
        bias = _bias(kind)
        t = onnx.Clip(
            onnx.Mul(x, onnx_number(math.log2(math.e), kind)), onnx_number(-bias, kind), onnx_number(bias + 1, kind)
        )
        k = onnx.Floor(t)
        return onnx.Sub(t, k), k
    size = onnx.Abs(x) if reduction == "reciprocal" else x
    size = onnx.Clip(size, onnx_number(np.finfo(kind).tiny, kind), onnx_number(np.finfo(kind).max, kind))
    z, e = _onnx_mantissa(size, kind)
    if reduction == "log":
        return z, e
    if reduction == "reciprocal":
        negative = onnx.Less(x, onnx_number(0, kind))
        return z, (e, onnx.Where(negative, onnx_number(-1, kind), onnx_number(1, kind)))
    k = onnx.Floor(onnx.Mul(e, onnx_number(0.5, kind)))
    odd = onnx.Sub(e, onnx.Mul(k, onnx_number(2, kind)))
    return onnx.Mul(z, onnx.Add(odd, onnx_number(1, kind))), k


def onnx_join(reduction: str, y: Any, k: Any, kind: Any) -> Any:
    """f(x) from the core's value."""
    if reduction in ("none", "period"):
        return y
    if reduction == "log":
        return onnx.Add(y, onnx.Mul(k, onnx_number(math.log(2), kind)))
    if reduction == "reciprocal":
        return onnx.Mul(onnx.Mul(y, _onnx_power(onnx.Neg(k[0]), kind, subnormal=True)), k[1])
    return onnx.Mul(y, _onnx_power(onnx.Neg(k) if reduction == "rsqrt" else k, kind))


def _onnx_mantissa(size: Any, kind: Any) -> tuple[Any, Any]:
    """z in [1, 2) and the exponent.

    A logarithm made a little smaller than it may be rounded gives the exponent or one less, and so does a largest
    exponent of one less, whose inverse is a normal number; what lies in [2, 4) is put right.
    """
    bias = _bias(kind)
    logarithm = onnx.Mul(onnx.Log(size), onnx_number(1 / math.log(2), kind))
    below = onnx.Floor(onnx.Sub(logarithm, onnx_number(4 * bias * np.finfo(kind).eps, kind)))
    e = onnx.Min(below, onnx_number(bias - 1, kind))
    z = onnx.Mul(size, _onnx_power(onnx.Neg(e), kind))
    up = onnx.Cast(onnx.GreaterOrEqual(z, onnx_number(2, kind)), to=_onnx_type(kind))
    z = onnx.Mul(z, onnx.Sub(onnx_number(1, kind), onnx.Mul(up, onnx_number(0.5, kind))))
    return z, onnx.Add(e, up)


def _onnx_power(k: Any, kind: Any, subnormal: bool = False) -> Any:
    """2^k for whole k of the exponent's range; below the normal numbers 0, if it is not to be exact.

    The table ends with those of negative k: a negative index counts from the end.
    """
    bias = _bias(kind)
    exponents = np.r_[: bias + 2, -bias:0].astype(np.float64)
    with np.errstate(over="ignore"):
        powers = np.where((exponents > -bias) | subnormal, np.exp2(exponents), 0).astype(kind)
    return onnx_take(onnx_tensor(powers), k)


def onnx_take(table: Any, index: Any) -> Any:
    """table[index] for a table of rank 1 and an index in float.

    GatherElements on flat indices: ONNX Runtime's Gather takes nine times as long for single numbers.
    """
    whole: Any = onnx.Cast(index, to=onnx_ir.DataType.INT32)
    flat: Any = onnx.Reshape(whole, onnx_tensor(np.array([-1], np.int64)))
    return onnx.Reshape(onnx.GatherElements(table, flat, axis=0), onnx.Shape(whole))


def _bias(kind: Any) -> int:
    return int(-np.finfo(kind).minexp + 1)


def _onnx_type(kind: Any) -> Any:
    return onnx_ir.DataType.from_numpy(np.dtype(kind))
