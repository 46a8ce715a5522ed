"""Exact rewrites of an exported graph into forms that ONNX Runtime runs faster, with onnxscript's rewriter.

The result holds standard operators only, so it runs on every execution provider.
"""

from __future__ import annotations

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


def _clipped_exponential(op: Any, s: Any, low: Any, factor: Any, shift: Any, zero: Any, top: Any) -> Any:
    """Counts of exp(s - max s) in [0, 1]."""
    peak = op.Clip(op.ReduceMax(s, _allow_other_inputs=True, _allow_other_attributes=True), low, _outputs=["peak"])
    exponential = op.Exp(op.Sub(s, peak))
    return op.Clip(op.Floor(op.Add(op.Mul(exponential, factor), shift, _outputs=["shifted"])), zero, top)


def _bounded_exponential(op: Any, shifted: Any, **_: Any) -> Any:
    """No clip: the exponential of what is not positive is at most 1, its count at most the factor. Exact."""
    return op.Floor(shifted)


def _is_range(context: Any, factor: Any, shift: Any, zero: Any, top: Any, **_: Any) -> bool:
    found = [value.const_value for value in (factor, shift, zero, top)]
    if any(value is None for value in found):
        return False
    n, half, low, high = (float(value.numpy()) for value in found)
    return (half, low, high) == (0.5, 0.0, n)


RULES = (
    pattern.RewriteRule(_gelu, _fusible_gelu, _is_half, name="gelu"),
    pattern.RewriteRule(
        _clipped_exponential, _bounded_exponential, _is_range, name="bounded_exponential", remove_nodes=False
    ),
)
