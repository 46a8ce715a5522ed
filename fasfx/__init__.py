"""fasfx: torch.fx passes that turn Hugging Face transformers into spiking neural networks.

>>> snn = fasfx.convert(model)            # doctest: +SKIP
>>> snn(**inputs).last_hidden_state       # doctest: +SKIP
"""

from fasfx import errors, passes, runtime
from fasfx.config import SpikeConfig
from fasfx.convert import convert
from fasfx.equivalence import Equivalence, check
from fasfx.model import SpikingModel
from fasfx.quantizer import SpikeQuantizer

__version__ = "0.1.0"
__all__ = [
    "Equivalence",
    "SpikeConfig",
    "SpikeQuantizer",
    "SpikingModel",
    "check",
    "convert",
    "errors",
    "passes",
    "runtime",
]
