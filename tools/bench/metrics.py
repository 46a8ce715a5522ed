"""How far one model is from another. A model is a callable from a batch's entries to a ModelOutput."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fasfx.difference import Difference, main_output, output_mask
from fasfx.tools.bench.data import Batch

Model = Callable[..., Any]
Name = TypeVar("Name", bound="str | int")


def relative_error(reference: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Relative L2 error |value - reference| / |reference|, without unit; 0.01 is one percent.

    Shapes: reference and value [..., *rest] alike, mask [...] with 0 where a position does not count.
    """
    found = Difference()
    found.add(reference, value, mask)
    return found.relative_l2


@torch.no_grad()
def error_table(
    reference: Model, candidates: Mapping[Name, Callable[[], Model]], batches: Sequence[Batch]
) -> dict[Name, float]:
    """Relative L2 error of each candidate's main output over all batches together.

    A candidate is made by a call, one after the other, so that it may be one model set to another T.
    """
    expected = [main_output(reference(**batch)) for batch in batches]
    table = {}
    for name, make in candidates.items():
        model = make()
        found = Difference()
        for reference_output, batch in zip(expected, batches, strict=True):
            found.add(reference_output, main_output(model(**batch)), output_mask(batch))
        table[name] = found.relative_l2
    return table


@torch.no_grad()
def all_logits(model: Model, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The logits of all batches, [rows, classes], on the CPU; labels among the entries are left out."""
    inputs = ({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
    return torch.cat([main_output(model(**given)).cpu() for given in inputs])
