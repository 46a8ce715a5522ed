"""Exact rewrites of an exported graph into forms that ONNX Runtime runs faster, with onnxscript's rewriter.

The result holds standard operators only, so it runs on every execution provider.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir
from onnxscript.rewriter import pattern, rewrite


def for_runtime(program: onnx_ir.Model) -> onnx_ir.Model:
    """Apply every rule wherever it matches."""
    return rewrite(program, pattern_rewrite_rules=RULES)


def _gelu(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """x * (0.5 * (1 + erf(x / sqrt 2))): what torch's exporter writes."""
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))


def _fusible_gelu(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """(x * (1 + erf(x / sqrt 2))) * 0.5: what ONNX Runtime fuses. Exact: 0.5 is a power of two."""
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _is_half(context: Any, half: Any, **_: Any) -> bool:
    return half.const_value is not None and float(half.const_value.numpy()) == 0.5


def _exponent(op: Any, s: Any, low: Any) -> Any:
    peak = op.ReduceMax(s, _allow_other_inputs=True, _allow_other_attributes=True)
    return op.Clip(peak, low, _outputs=["peak"])


def _clipped_count(op: Any, s: Any, low: Any, shift: Any, half: Any, zero: Any, top: Any) -> Any:
    """Counts of exponentials: floor(exp(s - (max s - ln N)) + 1/2)."""
    exponential = op.Exp(op.Sub(s, op.Sub(_exponent(op, s, low), shift)))
    return op.Clip(op.Floor(op.Add(exponential, half, _outputs=["shifted"])), zero, top)


def _count(op: Any, shifted: Any, **_: Any) -> Any:
    """No clip: the exponential is not negative and at most N, up to rounding that no count notices. Exact."""
    return op.Floor(shifted)


def _is_bounded(context: Any, shift: Any, half: Any, zero: Any, top: Any, **_: Any) -> bool:
    found = _numbers(shift, half, zero, top)
    return found is not None and found[1:3] == [0.5, 0.0] and math.isclose(found[0], math.log(found[3]), rel_tol=1e-6)


def _clipped_input(op: Any, s: Any, low: Any, factor: Any, zero: Any, top: Any) -> Any:
    """Exponentials that a multi-threshold neuron reads: N * exp(s - max s)."""
    return op.Clip(op.Mul(op.Exp(op.Sub(s, _exponent(op, s, low))), factor, _outputs=["u"]), zero, top)


def _input(op: Any, u: Any, **_: Any) -> Any:
    """No clip. Exact."""
    return op.Identity(u)


def _is_range(context: Any, factor: Any, zero: Any, top: Any, **_: Any) -> bool:
    found = _numbers(factor, zero, top)
    return found is not None and found[1] == 0.0 and found[0] == found[2]


def _numbers(*values: Any) -> list[float] | None:
    """The values of constants; None if one is none."""
    constants = [value.const_value for value in values]
    return None if any(c is None for c in constants) else [float(c.numpy()) for c in constants]


RULES = (
    pattern.RewriteRule(_gelu, _fusible_gelu, _is_half, name="gelu"),
    pattern.RewriteRule(_clipped_count, _count, _is_bounded, name="bounded_count", remove_nodes=False),
    pattern.RewriteRule(_clipped_input, _input, _is_range, name="bounded_input", remove_nodes=False),
)
