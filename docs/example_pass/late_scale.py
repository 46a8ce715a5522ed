"""NORMAL -> NORMAL: attention's scale multiplies the scores, not the queries: (q * scale) @ k  ->  (q @ k) * scale."""

from typing import Any

import torch
from torch import Tensor

from fasfx.rewrite import rewrite
from fasfx.runner import Pass

aten = torch.ops.aten


@rewrite(
    into=lambda q, k, scale: aten.mul.Tensor(aten.matmul.default(q, k), scale),
    when=lambda scale: isinstance(scale, float) or f"the scale is {scale}, no number",
)
def scale_to_scores(q: Tensor, k: Tensor, scale: float) -> Any:
    """A factor of the queries is one of the scores.

    Shape:  q [.., Lq, D], k [.., D, Lk] -> [.., Lq, Lk].   Exact but for float rounding.
    """
    return aten.matmul.default(aten.mul.Tensor(q, scale), k)


class LateScale(Pass):
    """Queries are sent as they are; the scores are scaled."""

    name, takes, gives = "late-scale", "NORMAL", "NORMAL"
    rules = (scale_to_scores,)
