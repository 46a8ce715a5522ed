"""How far one model is from another. A model is a callable from a batch's entries to a ModelOutput."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import functional

from fasfx.tools.bench.data import Batch

Model = Callable[..., Any]
Name = TypeVar("Name", bound="str | int")


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a figure is about: logits, else last_hidden_state, else the (first) tensor itself."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return torch.as_tensor(getattr(output, name))
    return torch.as_tensor(output if isinstance(output, torch.Tensor) else output[0])


def output_mask(batch: Batch) -> torch.Tensor | None:
    """The mask of the output's positions: those of the decoder if there is one; images have none."""
    return batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")


def _squares(reference: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> tuple[float, float]:
    """(sum of squared differences, sum of squares of the reference), over unmasked positions, in float64."""
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(value.shape)}")
    if mask is not None:
        reference, value = reference[mask.bool()], value[mask.bool()]
    reference, value = reference.detach().double(), value.detach().double()
    return float((value - reference).square().sum()), float(reference.square().sum())


def relative_error(reference: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Relative L2 error |value - reference| / |reference|, without unit; 0.01 is one percent.

    Shapes: reference and value [..., *rest] alike, mask [...] with 0 where a position does not count.
    """
    difference, size = _squares(reference, value, mask)
    return math.sqrt(difference / size) if size else (math.inf if difference else 0.0)


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
        found = (main_output(model(**batch)) for batch in batches)
        pairs = [_squares(e, f, output_mask(b)) for e, f, b in zip(expected, found, batches, strict=True)]
        difference, size = (sum(column) for column in zip(*pairs, strict=True))
        table[name] = math.sqrt(difference / size)
    return table


@torch.no_grad()
def perplexity(model: Model, windows: Iterable[Batch]) -> float:
    """exp of the mean negative log-likelihood (in nats) of a token given its past in the window.

    `windows` as made by `data.windows`: unpadded [B, S], of which S - 1 tokens are predicted in each row.
    """
    loss, num_tokens = 0.0, 0
    for window in windows:
        logits_BSV = main_output(model(**window))[:, :-1].float()
        target_BS = window["input_ids"][:, 1:]
        nats = functional.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="sum")
        loss += float(nats)
        num_tokens += target_BS.numel()
    return math.exp(loss / num_tokens)
