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
    return op.Mul(op.Exp(op.Sub(s, peak)), factor, _outputs=["u"])


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


def _is_bounded(context: Any, factor: Any, zero: Any, top: Any, half: Any = None, **_: Any) -> bool:
    found = [value.const_value for value in (factor, zero, top)]
    if any(value is None for value in found):
        return False
    n, lowest, highest = (float(value.numpy()) for value in found)
    rounds = half is None or (half.const_value is not None and float(half.const_value.numpy()) == 0.5)
    return rounds and (lowest, highest) == (0.0, n)


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
)
