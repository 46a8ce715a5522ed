"""ONNX export through transformers' OnnxExporter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx.errors import ConfigError
from fasfx.ops.precision import mantissa_bits, needs_double
from fasfx.passes import Clip, Fold, Lower, Substitute
from fasfx.program import facts, fake, freeze
from fasfx.runner import Runner
from fasfx.runtime.feeding import CONSTANTS
from fasfx.runtime.flattening import flatten_rows
from fasfx.runtime.integrity import write_sums
from fasfx.runtime.loop import TIMESTEPS, describe_states, name_states, wrap_in_loop
from fasfx.runtime.merging import merge_layers
from fasfx.runtime.rules import for_runtime
from fasfx.runtime.tabulating import tabulate
from fasfx.runtime.ticks import StepGraph
from fasfx.writing import written_beside

if TYPE_CHECKING:
    from fasfx.model import SpikingModel

MANIFEST = "export.json"
OPSETS = range(18, 24)  # torch's exporter writes 18 and converts upwards; other numbers it ignores
FORMS = {  # the first is the default
    "sequential": ("closed",),
    "sequential, int8": ("integer", "closed"),
    "synchronous": ("loop", "step"),
}


def export(model: SpikingModel, folder: Path, opset_version: int = 18, form: str | None = None) -> None:
    """Write model.onnx, its weights and manifest to a folder. Dynamic batch and length.

    Raises CheckpointError if the folder cannot be written, ConfigError for an opset or form that cannot be.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    integer = model.schedule == "sequential" and model.spike_config.weights == "int8"
    forms = FORMS["sequential, int8" if integer else model.schedule]
    form = form or forms[0]
    if form not in forms:
        raise ConfigError(f"form={form!r}: a {model.schedule} network is exported as {' or '.join(forms)}")
    if opset_version not in OPSETS:
        raise ConfigError(f"opset {opset_version} cannot be written: choose {OPSETS[0]} to {OPSETS[-1]}")
    if model.spike_config.weights == "int8":
        _require_float32(model)
    ticks = form in FORMS["synchronous"]
    if ticks:
        _require_exportable(model, form)
    inputs = example_inputs(model)
    shapes = _shapes(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset_version, optimize=False)
    module = _Step(model) if ticks else _Closed(_closed(model, form, integer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own treespecs
        exported = OnnxExporter().export(module, inputs, config)
    (component,) = exported.components.values()
    component.program = for_runtime(component.program)
    if ticks:
        name_states(component.program, facts(model.graph_module))
    if form == "loop":
        wrap_in_loop(component, facts(model.graph_module))
    if form == "step":
        describe_states(component.program, model.graph_module)
    component.program.metadata_props[CONSTANTS] = json.dumps(facts(model.ranged).constants, default=str)
    exported.config = model.config
    with written_beside(folder) as staging:
        exported.save_pretrained(staging)
        write_sums(staging)


def _require_float32(model: SpikingModel) -> None:
    for name, value in model.graph_module.named_buffers():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ConfigError(
                f"int8 weights are exported with float32 scales, and {name} is {value.dtype}: convert model.float()"
            )


def _require_exportable(model: SpikingModel, form: str) -> None:
    if TIMESTEPS in model.input_names:
        raise ConfigError(f"the model has an input {TIMESTEPS}, the name of T in an export: rename it")
    unit = model.spike_config.unit(model.timesteps)
    for node in _placeholders(model):
        value = fake(node)
        if form == "loop" and value is not None and value.is_floating_point():
            if needs_double(mantissa_bits(value.dtype), unit):  # ONNX Runtime then misplaces the first states
                raise ConfigError(
                    f"levels={model.spike_config.levels} needs more than {value.dtype}, which a Loop cannot hold: "
                    'choose fewer levels, or form="step"'
                )


class _Closed(torch.nn.Module):
    """The lowered program with a forward that takes exactly its inputs by name."""

    def __init__(self, program: GraphModule) -> None:
        super().__init__()
        self.program = program

    def forward(self, **inputs: Tensor) -> Any:
        return self.program(**inputs)


def _closed(model: SpikingModel, form: str, integer: bool) -> GraphModule:
    """The closed form to export: as it is, in integers, or of a network with int8 weights with counts in float."""
    if form == "integer":
        return tabulate(flatten_rows(merge_layers(model.graph_module)))
    if not integer:
        return model.graph_module
    program = Runner([Clip(), Substitute(), Fold(), Lower(bytes_travel=False)]).run(model.ranged)
    freeze(program)
    return program


class _Step(torch.nn.Module):
    """The step graph, likewise: the running output in the model's own type, and the next states."""

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        self.program = model.graph_module

    def forward(self, **inputs: Tensor) -> Any:
        leaves, sent = self.program(**inputs)
        return StepGraph(self.program).output(leaves), sent


def example_inputs(model: SpikingModel) -> dict[str, Tensor]:
    """Small inputs of the right names, dtypes and static sizes to trace with; dynamic dims get sizes from 2 on."""
    sizes: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    for node in _placeholders(model):
        value = fake(node)
        assert value is not None
        if str(node.target) not in model.input_names:  # the tick and the states: their sizes follow the inputs'
            break
        shape = [s if isinstance(s, int) else sizes.setdefault(str(s), 2 + 3 * len(sizes)) for s in value.shape]
        found[str(node.target)] = torch.ones(shape, dtype=value.dtype)
    if model.schedule == "synchronous":
        program = facts(model.graph_module)
        state = StepGraph(model.graph_module).state([*found.values()])
        found[program.tick] = torch.tensor(1)
        found |= zip(program.states.values(), state.sent.values(), strict=True)
    return found


def _placeholders(model: SpikingModel) -> list[Node]:
    return list(model.graph_module.graph.find_nodes(op="placeholder"))


def _shapes(model: SpikingModel) -> dict[str, dict[int, Any]]:
    """Dynamic shapes as captured: dims that torch.export found to be fixed stay fixed."""
    shapes: dict[str, dict[int, Any]] = {}
    for node in _placeholders(model):
        value = fake(node)
        assert value is not None
        dynamic = [dim for dim, size in enumerate(value.shape) if not isinstance(size, int)]
        shapes[str(node.target)] = dict.fromkeys(dynamic, torch.export.Dim.AUTO)
    return shapes
