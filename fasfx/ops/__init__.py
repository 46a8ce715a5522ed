"""Custom operators: one file each, with shape rule, closed or stepwise form, gradient and ONNX form."""

from fasfx.ops import count, fire, group, lookup, qcfs, tick
from fasfx.ops.codes import CODES, Code

# The shape rule of every operator here: the result is like its first argument.
NEURONS = frozenset({qcfs.op, fire.op, count.op, tick.op})
GROUPS = frozenset({group.op, lookup.op})
LIKE_FIRST = NEURONS | GROUPS

__all__ = ["CODES", "GROUPS", "LIKE_FIRST", "NEURONS", "Code", "count", "fire", "group", "lookup", "qcfs", "tick"]
