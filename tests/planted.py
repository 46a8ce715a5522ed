"""Three planted faults, each a monkeypatch: what the pass tools must find, down to rule and node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fasfx import ops
from fasfx.config import SpikeConfig
from fasfx.passes import clip, fold

LAYER = "layer.1.intermediate.intermediate_act_fn"


@dataclass(frozen=True)
class Fault:
    """config: under which it shows.   pass_name, rule: where it is.   kind, module: of the node that breaks first."""

    config: SpikeConfig
    pass_name: str
    rule: str
    kind: str
    module: str
    plant: Callable[[pytest.MonkeyPatch], None]


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    """fold takes the scale out of a product of two values 5 % too large."""
    right = fold.product_scale

    def wrong(left: Tensor | None, righthand: Tensor | None) -> Tensor | None:
        found = right(left, righthand)
        return None if found is None else found * 1.05

    patch.setattr(fold, "product_scale", wrong)


def swapped_step(patch: pytest.MonkeyPatch) -> None:
    """fasfx::fire sends its first two spikes of the radix code in the wrong order."""
    right = ops.CODES["radix"]

    def swapped(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
        events = right.spikes(u, steps, levels, signed)
        return torch.cat([events[1:2], events[:1], events[2:]])

    patch.setitem(ops.CODES, "radix", dataclasses.replace(right, spikes=swapped))


def low_threshold(patch: pytest.MonkeyPatch) -> None:
    """clip gives the sites of the second layer's intermediate linear a threshold that is 10 % too low."""
    right = clip.thresholds

    def low(gm: Any) -> dict[str, Tensor]:
        sites = clip.facts(gm).sites
        return {n: t * 0.9 if sites[n].module.endswith(LAYER) else t for n, t in right(gm).items()}

    patch.setattr(clip, "thresholds", low)


RADIX = SpikeConfig(code="radix", timesteps=6)
FAULTS = {
    "scale": Fault(SpikeConfig(), "fold", "scale_to_reader", "value", "layer.0.attention", wrong_scale),
    "step": Fault(RADIX, "substitute", "qcfs_to_fire", "neuron", "embeddings", swapped_step),
    "threshold": Fault(SpikeConfig(margin=1.0), "clip", "multi_neuron", "neuron", LAYER, low_threshold),
}
