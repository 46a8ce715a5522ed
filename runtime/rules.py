"""Exact rewrites of an exported graph into forms that ONNX Runtime runs faster, with onnxscript's rewriter.

The result holds standard operators only, as what comes in does.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules import common as known


def for_runtime(program: onnx_ir.Model) -> onnx_ir.Model:
    """Store every constant once, compute what is known, merge what is equal, then apply every rule.

    In the place of onnxscript's own optimizer, which takes the square of the number of nodes (docs/decisions/0007).
    """
    _tidy(program)
    fold_constants_ir(program)
    program = rewrite(program, pattern_rewrite_rules=RULES)
    _tidy(program)
    return program


def _tidy(program: onnx_ir.Model) -> None:
    onnx_ir.passes.Sequential(
        common.InlinePass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(program)


def _gelu(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """x * (0.5 * (1 + erf(x / sqrt 2))): what torch's exporter writes."""
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))


def _fusible_gelu(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """(x * (1 + erf(x / sqrt 2))) * 0.5: what ONNX Runtime fuses. Exact: 0.5 is a power of two."""
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _is_half(context: Any, half: Any, **_: Any) -> bool:
    return half.const_value is not None and float(half.const_value.numpy()) == 0.5


def _exponential(op: Any, s: Any, low: Any, factor: Any) -> Any:
    """factor * exp(s - max s): not negative, at most the factor."""
    peak = op.Clip(op.ReduceMax(s, _allow_other_inputs=True, _allow_other_attributes=True), low, _outputs=["peak"])
    return op.Mul(op.Exp(op.Sub(s, peak), _outputs=["e"]), factor, _outputs=["u"])


def _clipped_count(op: Any, s: Any, low: Any, factor: Any, half: Any, zero: Any, top: Any) -> Any:
    """Counts of exponentials, floor(u + 1/2)."""
    shifted = op.Add(_exponential(op, s, low, factor), half, _outputs=["shifted"])
    return op.Clip(op.Floor(shifted), zero, top)


def _count(op: Any, shifted: Any, **_: Any) -> Any:
    """No clip: the count of what is at most the factor is at most that. Exact."""
    return op.Floor(shifted)


def _clipped_input(op: Any, s: Any, low: Any, factor: Any, zero: Any, top: Any) -> Any:
    """Exponentials that a multi-threshold neuron reads."""
    return op.Clip(_exponential(op, s, low, factor), zero, top)


def _input(op: Any, u: Any, **_: Any) -> Any:
    """No clip. Exact."""
    return op.Identity(u)


def _lifted_byte(op: Any, s: Any, low: Any, factor: Any, lift: Any, one: Any, zero: Any, top: Any) -> Any:
    """Counts of exponentials as bytes, lifted by less than half a count."""
    return op.Clip(op.QuantizeLinear(op.Add(_exponential(op, s, low, factor), lift), one, zero), zero, top)


def _quantized(op: Any, e: Any, factor: Any, lift: Any, zero: Any, **_: Any) -> Any:
    """No clip, the factor as QuantizeLinear's scale. Exact up to float rounding of the current."""
    unit = 1 / factor.const_value.numpy()
    small, scale = (op.Constant(value=onnx_ir.tensor(t)) for t in (lift.const_value.numpy() * unit, unit))
    return op.QuantizeLinear(op.Add(e, small), scale, zero)


def _byte_of_row(op: Any, x: Any, least: Any, n: Any, one: Any, zero: Any, low: Any, top: Any) -> Any:
    """Counts, as bytes, of values over the largest of their row."""
    largest = op.Clip(op.ReduceMax(op.Abs(x), _allow_other_inputs=True, _allow_other_attributes=True), least)
    byte = op.QuantizeLinear(op.Div(x, op.Div(largest, n)), one, zero, _outputs=["byte"])
    return op.Clip(byte, low, top)


def _unclipped(op: Any, byte: Any, **_: Any) -> Any:
    """No clip. Exact."""
    return op.Identity(byte)


def _scaled_quotient(op: Any, x: Any, scale: Any, total: Any, unit: Any, least: Any) -> Any:
    """Deferred normalisation: what is mixed over the sum of its weights, both in counts."""
    return op.Div(op.Mul(x, scale), op.Max(op.Mul(total, unit), least))


def _quotient(op: Any, x: Any, scale: Any, total: Any, unit: Any, least: Any) -> Any:
    """The sum stays in counts. Exact up to float rounding."""
    by = unit.const_value.numpy()
    outer, smallest = (op.Constant(value=onnx_ir.tensor(t.const_value.numpy() / by)) for t in (scale, least))
    return op.Div(op.Mul(x, outer), op.Max(total, smallest))


def _numbers(*values: Any) -> list[float] | None:
    """What constants of one element hold; None if one is none."""
    found = [value.const_value for value in values]
    if any(value is None or value.size != 1 for value in found):
        return None
    return [float(value.numpy().item()) for value in found]


def _is_bounded(context: Any, factor: Any, zero: Any, top: Any, half: Any = None, **_: Any) -> bool:
    found = _numbers(factor, zero, top)
    rounds = half is None or _numbers(half) == [0.5]
    return found is not None and rounds and found[1:] == [0.0, found[0]]


def _is_lifted(context: Any, factor: Any, zero: Any, top: Any, lift: Any, one: Any, **_: Any) -> bool:
    found = _numbers(lift, one)
    return found is not None and found[1] == 1 and 0 <= found[0] < 0.5 and _is_bounded(context, factor, zero, top)


def _is_symmetric(context: Any, n: Any, one: Any, zero: Any, low: Any, top: Any, **_: Any) -> bool:
    found = _numbers(n, one, zero, low, top)
    return found is not None and found[1] == 1 and found[2] - found[3] == found[4] - found[2] == found[0]


def _is_constant(context: Any, scale: Any, unit: Any, least: Any, **_: Any) -> bool:
    found = _numbers(unit, least)
    return found is not None and found[0] > 0 and scale.const_value is not None


RULES = (
    *(known.add_0_rule, known.sub_0_rule, known.mul_by_1_rule, known.div_by_1_rule),
    *(known.cast_cast_rule, known.no_op_cast_rule, known.no_op_expand_rule),
    *(known.no_op_transpose_rule, known.transpose_transpose_rule),
    *(known.reshape_reshape_rule, known.unsqueeze_unsqueeze_rule),
    *(known.collapse_slice_rule, known.collapse_slice2_rule),
    *(known.successive_relu_rule, known.successive_clip_rule),  # ONNX Runtime's own fail for float64
    *(known.successive_relu_clip_rule, known.successive_clip_relu_rule),
    pattern.RewriteRule(_gelu, _fusible_gelu, _is_half, name="gelu"),
    pattern.RewriteRule(_clipped_count, _count, _is_bounded, name="bounded_count", remove_nodes=False),
    pattern.RewriteRule(_clipped_input, _input, _is_bounded, name="bounded_input", remove_nodes=False),
    pattern.RewriteRule(_lifted_byte, _quantized, _is_lifted, name="lifted_byte", remove_nodes=False),
    pattern.RewriteRule(_byte_of_row, _unclipped, _is_symmetric, name="byte_of_row", remove_nodes=False),
    pattern.RewriteRule(_scaled_quotient, _quotient, _is_constant, name="quotient"),
)
