"""Custom operators: one file each, with shape rule, closed or stepwise form, gradient and ONNX form."""

from fasfx.ops import count, fire, qcfs, tick
from fasfx.ops.codes import CODES, Code

# The shape rule of every operator here: the result is like its first argument.
LIKE_FIRST = frozenset({qcfs.op, fire.op, count.op, tick.op})

__all__ = ["CODES", "LIKE_FIRST", "Code", "count", "fire", "qcfs", "tick"]
