"""ONNX: export through transformers' OnnxExporter, and running the result in ONNX Runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasfx.capture import dynamic_shapes
from fasfx.errors import CheckpointError, ConfigError, InputError, RuntimeUnavailableError
from fasfx.program import fake
from fasfx.runtime.rules import for_runtime
from fasfx.writing import written_beside

if TYPE_CHECKING:
    import onnxruntime

    from fasfx.model import SpikingModel

MANIFEST = "export.json"
OPSETS = range(18, 24)  # torch's exporter writes 18 and converts upwards; other numbers it ignores


def export(model: SpikingModel, folder: Path, opset_version: int = 18) -> None:
    """Write model.onnx, its weights and manifest to a folder. Dynamic batch and length.

    Raises CheckpointError if the folder cannot be written.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    if opset_version not in OPSETS:
        raise ConfigError(f"opset {opset_version} cannot be written: choose {OPSETS[0]} to {OPSETS[-1]}")
    inputs = example_inputs(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=_shapes(model, inputs), opset_version=opset_version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own treespecs
        exported = OnnxExporter().export(_Plain(model), inputs, config)
    for component in exported.components.values():
        component.program = for_runtime(component.program)
    exported.config = model.config
    with written_beside(folder) as staging:
        exported.save_pretrained(staging)


class _Plain(torch.nn.Module):
    """The lowered program with a forward that takes exactly its inputs by name."""

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        self.program = model.graph_module

    def forward(self, **inputs: Tensor) -> Any:
        return self.program(**inputs)


def example_inputs(model: SpikingModel) -> dict[str, Tensor]:
    """Small inputs of the right names, dtypes and static sizes to trace with; dynamic dims get sizes from 2 on."""
    sizes: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    for node in model.graph_module.graph.find_nodes(op="placeholder"):
        value = fake(node)
        assert value is not None
        shape = [s if isinstance(s, int) else sizes.setdefault(str(s), 2 + 3 * len(sizes)) for s in value.shape]
        found[str(node.target)] = torch.ones(shape, dtype=value.dtype)
    return found


def _shapes(model: SpikingModel, inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Dynamic shapes as captured: dims that torch.export found to be fixed stay fixed."""
    shapes = dynamic_shapes(inputs)
    for node in model.graph_module.graph.find_nodes(op="placeholder"):
        value = fake(node)
        assert value is not None
        kept = {d: torch.export.Dim.AUTO for d in shapes[str(node.target)] if not isinstance(value.shape[d], int)}
        shapes[str(node.target)] = kept
    return shapes


class OnnxModel:
    """An exported spiking network in ONNX Runtime, called like the model it came from.

    folder:  what SpikingModel.to_onnx or transformers' ExportedModel wrote.
    device:  None or "cpu"; "cuda" where this build of ONNX Runtime has the provider.
    threads: intra-op threads; None: ONNX Runtime's choice.
    Raises CheckpointError for a folder without an export, RuntimeUnavailableError for a missing provider.
    """

    def __init__(self, folder: str | Path, device: str | None = None, threads: int | None = None) -> None:
        import onnxruntime as ort
        from transformers.exporters import ExportedModel

        if not (Path(folder) / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} holds no ONNX export ({MANIFEST} is missing): make one with `fasfx export`"
            )
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = ort.get_available_providers()
        if device not in (None, "cpu") and not any(str(device).lower() in p.lower() for p in available):
            raise RuntimeUnavailableError(f"no execution provider for {device!r}; available: {', '.join(available)}")
        try:
            self.exported = ExportedModel.from_pretrained(folder, device=device or "cpu", session_options=options)
        except Exception as error:
            raise CheckpointError(f"the export in {folder} cannot be read: {str(error).splitlines()[0]}") from error

    def __call__(self, **inputs: Any) -> Any:
        """The model's own outputs for its own inputs, torch tensors in and out. Raises InputError."""
        names = list(self.exported.components["model"].metadata.kwargs)
        if missing := [name for name in names if not isinstance(inputs.get(name), Tensor)]:
            raise InputError(f"missing input {', '.join(missing)}: the model takes {', '.join(names)}")
        if unknown := sorted(k for k, v in inputs.items() if k not in names and isinstance(v, Tensor)):
            raise InputError(f"unknown input {', '.join(unknown)}: the model takes {', '.join(names)}")
        try:
            return self.exported(**{name: inputs[name] for name in names})
        except Exception as error:
            raise InputError(f"ONNX Runtime refuses these inputs: {str(error).splitlines()[0]}") from error

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The ONNX Runtime session."""
        return self.exported.runners["model"].session
