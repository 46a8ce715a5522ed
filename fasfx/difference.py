"""How far one output is from another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasfx.errors import InputError


def main_output(output: Any) -> Tensor:
    """The tensor a figure is about: logits, else last_hidden_state, else the first tensor of the output."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def output_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The mask of the output's positions: the decoder's if there is one; images have none."""
    found = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return found if isinstance(found, Tensor) else None


@dataclass
class Difference:
    """Running sums of a comparison, in float64: call `add` per batch, then read the figures."""

    squared: float = 0.0
    reference: float = 0.0
    value: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, reference: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        """Shapes alike; mask [...] over the leading dims, 0 where a position does not count."""
        if reference.shape != value.shape:
            raise InputError(
                f"the networks' outputs differ in shape: {tuple(reference.shape)} and {tuple(value.shape)}"
            )
        if mask is not None and mask.shape == reference.shape[: mask.dim()]:
            reference, value = reference[mask.bool()], value[mask.bool()]
        reference, value = reference.detach().double().flatten(), value.detach().double().flatten()
        gap = value - reference
        self.squared += float(gap @ gap)
        self.reference += float(reference @ reference)
        self.value += float(value @ value)
        self.product += float(value @ reference)
        self.largest = max(self.largest, float(torch.stack(gap.aminmax()).abs().max()) if gap.numel() else 0.0)

    @property
    def relative_l2(self) -> float:
        """|value - reference| / |reference|; 0.01 is one percent."""
        return math.sqrt(self.squared / self.reference) if self.reference else (math.inf if self.squared else 0.0)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all values and all references."""
        scale = math.sqrt(self.reference * self.value)
        return self.product / scale if scale else float(self.reference == self.value)

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in decibel."""
        return 10 * math.log10(self.reference / self.squared) if self.squared and self.reference else math.inf
