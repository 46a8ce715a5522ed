"""Three planted faults, each in force inside a `with`: what the pass tools must find, down to rule and node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

from fasfx import ops
from fasfx.config import SpikeConfig
from fasfx.passes import clip, fold
from fasfx.program import facts
from fasfx.tools.bisecting import Culprit

LAYER = "layer.1.intermediate.intermediate_act_fn"


@dataclass(frozen=True)
class Fault:
    """config: under which it shows.   pass_name, rule: where it is.   kind, module: of the node that breaks first."""

    config: SpikeConfig
    pass_name: str
    rule: str
    kind: str
    module: str
    plant: Callable[[], AbstractContextManager[Any]]

    def is_named_by(self, found: Culprit | None) -> bool:
        """Whether bisect found this fault: its pass, its rule where it was applied first, and the node it broke."""
        if found is None or found.application is None or found.node is None:
            return False
        named = (found.pass_name, found.application.rule, found.node.kind) == (self.pass_name, self.rule, self.kind)
        return named and self.module in found.node.module and self.module in found.application.module


def wrong_scale() -> AbstractContextManager[Any]:
    """fold takes the scale out of a product of two values 5 % too large."""
    right = fold.product_scale

    def wrong(left: Tensor | None, righthand: Tensor | None) -> Tensor | None:
        found = right(left, righthand)
        return None if found is None else found * 1.05

    return mock.patch.object(fold, "product_scale", wrong)


def swapped_step() -> AbstractContextManager[Any]:
    """fasfx::fire sends its first two spikes of the radix code in the wrong order."""
    right = ops.CODES["radix"]

    def swapped(u: Tensor, steps: int, levels: int, signed: bool) -> Tensor:
        events = right.spikes(u, steps, levels, signed)
        return torch.cat([events[1:2], events[:1], events[2:]])

    return mock.patch.dict(ops.CODES, radix=dataclasses.replace(right, spikes=swapped))


def low_threshold() -> AbstractContextManager[Any]:
    """clip gives the sites of the second layer's intermediate linear a threshold that is 10 % too low."""
    right = clip.thresholds

    def low(gm: GraphModule) -> dict[str, Tensor]:
        sites = facts(gm).sites
        return {n: t * 0.9 if sites[n].module.endswith(LAYER) else t for n, t in right(gm).items()}

    return mock.patch.object(clip, "thresholds", low)


RADIX = SpikeConfig(code="radix", timesteps=6)
FAULTS = {
    "scale": Fault(SpikeConfig(), "fold", "scale_to_reader", "value", "layer.0.attention", wrong_scale),
    "step": Fault(RADIX, "substitute", "qcfs_to_fire", "neuron", "embeddings", swapped_step),
    "threshold": Fault(SpikeConfig(margin=1.0), "clip", "multi_neuron", "neuron", LAYER, low_threshold),
}
