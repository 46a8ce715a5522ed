"""Custom operators: one file each, with shape rule, closed or stepwise form, gradient and ONNX form."""

from fasfx.ops import (
    byte_count,
    byte_lookup,
    byte_value,
    count,
    fire,
    group,
    hadamard,
    integer_embedding,
    integer_linear,
    integer_matmul,
    lookup,
    qcfs,
    tick,
)
from fasfx.ops.codes import CODES, Code

CLOSED = frozenset({count.op, byte_count.op})  # closed forms of a sequential network's neurons
NEURONS = CLOSED | {qcfs.op, fire.op, tick.op}
GROUPS = frozenset({group.op, lookup.op})
OPERATORS = (
    NEURONS
    | GROUPS
    | {hadamard.op, byte_lookup.op, byte_value.op, integer_embedding.op, integer_linear.op, integer_matmul.op}
)

__all__ = [
    "CLOSED",
    "CODES",
    "GROUPS",
    "NEURONS",
    "OPERATORS",
    "Code",
    "byte_count",
    "byte_lookup",
    "byte_value",
    "count",
    "fire",
    "group",
    "hadamard",
    "integer_embedding",
    "integer_linear",
    "integer_matmul",
    "lookup",
    "qcfs",
    "tick",
]
