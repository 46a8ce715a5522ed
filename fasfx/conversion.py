"""fasfx.convert: a model and a few batches in, a spiking network out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fasfx.calibration import first_and_all
from fasfx.capture import capture
from fasfx.config import SpikeConfig
from fasfx.errors import ConfigError
from fasfx.model import SpikingModel
from fasfx.passes import Normalise, Observe
from fasfx.runner import Runner

Progress = Callable[[str, int, int | None], None]


def convert(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    config: SpikeConfig | None = None,
    progress: Progress | None = None,
) -> SpikingModel:
    """Turn a model into a spiking network, without training.

    model:       a Hugging Face model, or any torch.nn.Module with example inputs in `calibration`. Not modified:
                 weights are shared until a pass replaces one.
    calibration: iterable of model-input dicts (a tokenizer's output, a DataLoader), streamed once. None: shipped
                 sentences for a text model with its tokenizer beside it, else random inputs and a warning.
    config:      SpikeConfig(); what it asks for and this version cannot do is a ConfigError.
    progress:    called with (stage, done, total or None).
    Raises CaptureError, CalibrationError, InputError, ConfigError, CoverageError (strict).
    Error: no bound is claimed for the whole network: `.ledger` bounds every neuron, fasfx.check measures the rest.
    """
    ranged = calibrate(model, calibration, config or SpikeConfig(), progress)
    after = (lambda name, _: progress(name, 1, 1)) if progress else None
    return SpikingModel(ranged, getattr(model, "config", None), after)


def calibrate(
    model: nn.Module, calibration: Iterable[Any] | None, config: SpikeConfig, progress: Progress | None = None
) -> GraphModule:
    """The model as a program at RANGED: captured, normalised, every site's range observed."""
    if missing := config.unavailable():
        raise ConfigError("; ".join(missing))
    report = progress or (lambda stage, done, total: None)
    first, batches, total = first_and_all(model, calibration)
    report("capture", 0, 1)
    captured = capture(model, first, config)
    report("capture", 1, 1)
    observe = Observe(batches, on_batch=lambda done: report("observe", done, total))
    with torch.no_grad():
        return Runner([Normalise(), observe], after=lambda name, _: report(name, 1, 1)).run(captured)
