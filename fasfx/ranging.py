"""From a model and batches to a program at RANGED, and ranges observed again after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fasfx.calibration import first_and_all
from fasfx.capture import capture
from fasfx.config import SpikeConfig
from fasfx.passes import Centre, Normalise, Observe, Rotate, Round, Smooth
from fasfx.program import facts
from fasfx.runner import PassHook, Runner

Progress = Callable[[str, int, int | None], None]


def calibrate(
    model: nn.Module,
    calibration: Iterable[Any] | None,
    config: SpikeConfig,
    progress: Progress | None = None,
    training: bool = False,
) -> GraphModule:
    """The model as a program at RANGED: captured, normalised, every site's range observed.

    training: see fasfx.capture.capture.
    """
    report = progress or (lambda stage, done, total: None)
    first, batches, total = first_and_all(model, calibration)
    report("capture", 0, 1)
    captured = capture(model, first, config, training)
    report("capture", 1, 1)
    observe = Observe(batches, on_batch=lambda done: report("observe", done, total))
    return to_ranged(captured, observe, lambda name, _: report(name, 1, 1))


def to_ranged(captured: GraphModule, observe: Observe, after: PassHook | None = None) -> GraphModule:
    """A captured program at RANGED, by the passes that lead there."""
    with torch.no_grad():
        return Runner([Normalise(), Rotate(), Centre(), observe, Smooth(), Round()], after=after).run(captured)


def observe_again(gm: GraphModule, batches: Iterable[Any], progress: Progress | None = None) -> GraphModule:
    """The program with ranges observed anew, for other weights than before; learned thresholds stay."""
    report = progress or (lambda stage, done, total: None)
    known = facts(gm).sites
    facts(gm).level, facts(gm).trainable = Observe.takes, True  # the sites that were trained, and no others
    observed = Runner([Observe(batches, on_batch=lambda done: report("observe", done, None))]).run(gm)
    of = facts(observed)
    of.sites = {n: dataclasses.replace(known[n], peak=site.peak, tail=site.tail) for n, site in of.sites.items()}
    of.trainable = False
    return observed
