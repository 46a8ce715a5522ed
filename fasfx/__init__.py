"""fasfx: torch.fx passes that turn Hugging Face transformers into spiking neural networks.

>>> snn = fasfx.convert(model)            # doctest: +SKIP
>>> snn(**inputs).last_hidden_state       # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasfx import errors, passes, runtime, tools
    from fasfx.config import SpikeConfig
    from fasfx.conversion import convert
    from fasfx.equivalence import Equivalence, check
    from fasfx.model import SpikingModel
    from fasfx.objective import Objective
    from fasfx.quantizer import SpikeQuantizer
    from fasfx.registration import register_function
    from fasfx.runtime.energy import EnergyReport, energy
    from fasfx.tools.report import report
    from fasfx.training import ClippedModel, prepare
    from fasfx.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "ClippedModel",
    "EnergyReport",
    "Equivalence",
    "Objective",
    "SpikeConfig",
    "SpikeQuantizer",
    "SpikingModel",
    "check",
    "convert",
    "energy",
    "errors",
    "passes",
    "prepare",
    "register_function",
    "report",
    "runtime",
    "tools",
    "tune",
]

# Imported at first use, so that the command line answers without loading torch. No name here may be that of a
# module in this package: importing the module would put it in the place of the name.
_HOMES = {
    "ClippedModel": "training",
    "Objective": "objective",
    "prepare": "training",
    "EnergyReport": "runtime.energy",
    "Equivalence": "equivalence",
    "SpikeConfig": "config",
    "SpikeQuantizer": "quantizer",
    "SpikingModel": "model",
    "check": "equivalence",
    "convert": "conversion",
    "energy": "runtime.energy",
    "register_function": "registration",
    "report": "tools.report",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"fasfx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return import_module(f"fasfx.{name}")
    raise AttributeError(f"module 'fasfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
