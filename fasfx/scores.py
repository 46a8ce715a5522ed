"""How well a network does its task: accuracy, perplexity. A model is a callable from a batch's entries to an output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasfx.difference import main_output


@torch.no_grad()
def accuracy(model: Callable[..., Any], batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of rows whose largest logit is their label's."""
    right = rows = 0
    for batch in batches:
        labels = batch["labels"]
        logits = main_output(model(**{n: v for n, v in batch.items() if n != "labels"}))
        right, rows = right + int((logits.argmax(-1) == labels).sum()), rows + len(labels)
    return right / rows


@torch.no_grad()
def perplexity(model: Callable[..., Any], batches: Iterable[Mapping[str, Tensor]]) -> float:
    """exp of the mean negative log-likelihood (nats) of a token given those before it in its row, [B, S] unpadded."""
    nats = tokens = 0.0
    for batch in batches:
        logits = main_output(model(**{n: v for n, v in batch.items() if n != "labels"}))[:, :-1].float()
        following = batch["input_ids"][:, 1:]
        nats += float(F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
        tokens += following.numel()
    return math.exp(nats / tokens)
