"""SpikeQuantizer: the same passes as a plug-in of Hugging Face's own exporters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers import ExportQuantizer

from fasfx.capture import program
from fasfx.config import SpikeConfig
from fasfx.errors import ConfigError
from fasfx.model import SpikingModel
from fasfx.passes import Observe
from fasfx.ranging import to_ranged


class SpikeQuantizer(ExportQuantizer):  # type: ignore[misc]
    """Makes any export of transformers' exporters spiking.

    >>> config = OnnxConfig(dynamic=True, opset_version=18, quantizer=SpikeQuantizer(cfg, batches))  # doctest: +SKIP
    >>> OnnxExporter().export(model, inputs, config).save_pretrained(folder)                         # doctest: +SKIP

    config: SpikeConfig(); what it asks for and this version cannot do is a ConfigError.
    calibration_dataset: model-input dicts; None: the export's own sample inputs (transformers warns).
    """

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.ONNX, ExportFormat.DYNAMO)
    required_packages = ("torch",)

    def __init__(
        self, config: SpikeConfig | None = None, calibration_dataset: Iterable[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(calibration_dataset)
        self.config = config or SpikeConfig()
        if self.config.schedule == "synchronous":
            raise ConfigError("a synchronous network's inputs are not the model's alone: use SpikingModel.to_onnx")

    def quantize(self, model: GraphModule, sample_inputs: dict[str, Any], export_format: ExportFormat) -> GraphModule:
        """The lowered program of an exported graph module, observed on the calibration set."""
        captured = program(model, self.config, {})
        return SpikingModel(to_ranged(captured, Observe(self.traced_calibration(sample_inputs)))).graph_module
