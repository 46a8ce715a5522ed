"""Exact rewrites of an exported graph into forms that ONNX Runtime runs faster, with onnxscript's rewriter.

The result holds standard operators only, as what comes in does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
    program = rewrite(program, pattern_rewrite_rules=LAST)
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
    return _numbers(half) == [0.5]


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


def _clipped_byte(op: Any, s: Any, low: Any, factor: Any, one: Any, zero: Any, top: Any) -> Any:
    """Counts of exponentials as bytes."""
    return op.Clip(op.QuantizeLinear(_exponential(op, s, low, factor), one, zero), zero, top)


def _byte(op: Any, e: Any, factor: Any, zero: Any, **_: Any) -> Any:
    """No clip, the factor as QuantizeLinear's scale. Exact up to float rounding of the current."""
    return op.QuantizeLinear(e, _constant(op, 1 / factor.const_value.numpy()), zero)


def _lifted_byte(op: Any, s: Any, low: Any, factor: Any, lift: Any, one: Any, zero: Any, top: Any) -> Any:
    """The same, lifted by less than half a count."""
    return op.Clip(op.QuantizeLinear(op.Add(_exponential(op, s, low, factor), lift), one, zero), zero, top)


def _byte_of_lifted(op: Any, e: Any, factor: Any, lift: Any, zero: Any, **_: Any) -> Any:
    small = _constant(op, lift.const_value.numpy() / factor.const_value.numpy())
    return _byte(op, op.Add(e, small), factor, zero)


def _constant(op: Any, value: Any) -> Any:
    return op.Constant(value=onnx_ir.tensor(value))


def _byte_of_row(op: Any, x: Any, least: Any, n: Any, one: Any, zero: Any, low: Any, top: Any) -> Any:
    """Counts, as bytes, of values over the largest of their row."""
    largest = op.Clip(op.ReduceMax(op.Abs(x), _allow_other_inputs=True, _allow_other_attributes=True), least)
    byte = op.QuantizeLinear(op.Div(x, op.Div(largest, n)), one, zero, _outputs=["byte"])
    return op.Clip(byte, low, top)


def _unclipped(op: Any, byte: Any, **_: Any) -> Any:
    """No clip. Exact."""
    return op.Identity(byte)


def _times_reciprocal(op: Any, x: Any, square: Any) -> Any:
    """x / sqrt(square) as torch's exporter writes it in norms."""
    return op.Mul(x, op.Reciprocal(op.Sqrt(square)))


def _over_root(op: Any, x: Any, square: Any) -> Any:
    """One operator less, and what ONNX Runtime fuses into a norm. Exact up to float rounding."""
    return op.Div(x, op.Sqrt(square))


def _scaled_quotient(op: Any, x: Any, scale: Any, total: Any, unit: Any, least: Any) -> Any:
    """Deferred normalisation: what is mixed over the sum of its weights, both in counts."""
    return op.Div(op.Mul(x, scale), op.Max(op.Mul(total, unit), least))


def _quotient(op: Any, x: Any, scale: Any, total: Any, unit: Any, least: Any) -> Any:
    """The sum stays in counts. Exact up to float rounding."""
    by = unit.const_value.numpy()
    outer, smallest = (_constant(op, value.const_value.numpy() / by) for value in (scale, least))
    return op.Div(op.Mul(x, outer), op.Max(total, smallest))


def _scaled_product(op: Any, a: Any, one: Any, zero: Any, b: Any, scale: Any) -> Any:
    """A factor of a product of counts."""
    return op.Mul(op.MatMul(op.DequantizeLinear(a, one, zero), b), scale)


def _product(op: Any, a: Any, zero: Any, b: Any, scale: Any, **_: Any) -> Any:
    """The factor as DequantizeLinear's scale: it joins the integer product. Exact."""
    return op.MatMul(op.DequantizeLinear(a, _constant(op, scale.const_value.numpy().reshape(())), zero), b)


def _below_peak(op: Any, s: Any, low: Any) -> Any:
    """exp(s - max s), however small."""
    peak = op.Clip(op.ReduceMax(s, _allow_other_inputs=True, _allow_other_attributes=True), low)
    return op.Exp(op.Sub(s, peak, _outputs=["below"]), _outputs=["e"])


def _normal(op: Any, below: Any, **_: Any) -> Any:
    """At least the smallest normal number: for smaller ones ONNX Runtime takes twelve times as long. Exact."""
    tiny = np.finfo(below.dtype.numpy()).tiny
    return op.Exp(op.Clip(below, _constant(op, np.nextafter(np.log(tiny), tiny))))


def _numbers(*values: Any) -> list[float] | None:
    """What constants of one element hold; None if one is none."""
    found = [value.const_value for value in values]
    if any(value is None or value.size != 1 for value in found):
        return None
    return [float(value.numpy().item()) for value in found]


def _is_sent(context: Any, below: Any, e: Any, **_: Any) -> bool:
    """Whether only neurons read an exponential, to whom the smallest are no spikes; of half precision they may be."""
    return below.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE) and _is_rounded(e)


def _is_rounded(value: Any) -> bool:
    """Whether all that a value is good for, scaled, shifted or clipped by constants, is a whole number."""
    if value.is_graph_output() or not value.uses():
        return False
    return all(
        node.op_type in ("Floor", "QuantizeLinear")
        or (
            node.op_type in ("Mul", "Add", "Clip")
            and all(other is value or other is None or other.const_value is not None for other in node.inputs)
            and _is_rounded(node.outputs[0])
        )
        for node, _ in value.uses()
    )


def _is_bounded(context: Any, factor: Any, zero: Any, top: Any, half: Any = None, **_: Any) -> bool:
    found = _numbers(factor, zero, top)
    rounds = half is None or _numbers(half) == [0.5]
    return found is not None and rounds and found[1:] == [0.0, found[0]]


def _is_byte(context: Any, factor: Any, zero: Any, top: Any, one: Any, lift: Any = None, **_: Any) -> bool:
    known = _numbers(one) == [1] and _is_bounded(context, factor, zero, top)
    return known and (lift is None or ((found := _numbers(lift)) is not None and 0 <= found[0] < 0.5))


def _is_symmetric(context: Any, n: Any, one: Any, zero: Any, low: Any, top: Any, **_: Any) -> bool:
    found = _numbers(n, one, zero, low, top)
    return found is not None and found[1] == 1 and found[2] - found[3] == found[4] - found[2] == found[0]


def _is_one_factor(context: Any, one: Any, b: Any, scale: Any, **_: Any) -> bool:
    """The other side is bytes too; in the place of a factor of 1."""
    known = (maker := b.producer()) is not None and maker.op_type == "DequantizeLinear"
    return known and _numbers(one) == [1] and _numbers(scale) is not None


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
    pattern.RewriteRule(_clipped_byte, _byte, _is_byte, name="bounded_byte", remove_nodes=False),
    pattern.RewriteRule(_lifted_byte, _byte_of_lifted, _is_byte, name="lifted_byte", remove_nodes=False),
    pattern.RewriteRule(_byte_of_row, _unclipped, _is_symmetric, name="byte_of_row", remove_nodes=False),
    pattern.RewriteRule(_times_reciprocal, _over_root, name="root"),
    pattern.RewriteRule(_scaled_product, _product, _is_one_factor, name="scaled_product", remove_nodes=False),
    pattern.RewriteRule(_scaled_quotient, _quotient, _is_constant, name="quotient"),
)
# After all others, which know an exponential by what it is of.
LAST = (pattern.RewriteRule(_below_peak, _normal, _is_sent, name="normal", remove_nodes=False),)
