"""fasfx.convert: a model and a few batches in, a spiking network out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fasfx.calibration import as_batch
from fasfx.config import SpikeConfig
from fasfx.errors import ConfigError
from fasfx.model import SpikingModel
from fasfx.program import facts
from fasfx.ranging import Progress, calibrate, observe_again
from fasfx.training import ClippedModel

REPLACED = (
    'activation="replace" puts QCFS in the place of activation functions: another network, until it is trained '
    '(fasfx.prepare); activation="keep" needs no training'
)


def convert(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    config: SpikeConfig | None = None,
    progress: Progress | None = None,
) -> SpikingModel:
    """Turn a model into a spiking network, without training.

    model:       a Hugging Face model, or any torch.nn.Module with example inputs in `calibration`. Not modified:
                 weights are shared until a pass replaces one. Or what fasfx.prepare gave, trained: its weights are
                 copied, its thresholds kept.
    calibration: iterable of model-input dicts (a tokenizer's output, a DataLoader), streamed once. None: shipped
                 sentences for a text model with its tokenizer beside it, else random inputs and a warning.
                 After training: batches whose ranges replace those observed before it.
    config:      SpikeConfig(); what it asks for and this version cannot do is a ConfigError.
    progress:    called with (stage, done, total or None).
    Raises CaptureError, CalibrationError, InputError, ConfigError, CoverageError (strict).
    Error: no bound is claimed for the whole network: `.ledger` bounds every neuron, fasfx.check measures the rest.
    """
    after = (lambda name, _: progress(name, 1, 1)) if progress else None
    if isinstance(model, ClippedModel):
        ranged = _trained(model, calibration, config, progress)
    else:
        wanted = config or SpikeConfig()
        if wanted.activation == "replace":
            warnings.warn(REPLACED, stacklevel=2)
        ranged = calibrate(model, calibration, wanted, progress)
    return SpikingModel(ranged, getattr(model, "config", None), after)


def _trained(
    model: ClippedModel, calibration: Iterable[Any] | None, config: SpikeConfig | None, progress: Progress | None
) -> GraphModule:
    """The program of a stage I network at RANGED, its ranges observed anew if there is data."""
    ranged = model.ranged()
    if config is not None and config != facts(ranged).config:
        raise ConfigError(
            "a trained network keeps the configuration it was prepared with: convert it without one, "
            "then set `timesteps` or `schedule` of the result"
        )
    if calibration is None:
        return ranged
    return observe_again(ranged, (model.inputs(as_batch(model, batch)) for batch in calibration), progress)
