"""An export in step form: one tick of a synchronous network per run, its states kept by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from fasfx.runtime.feeding import DTYPES, refused
from fasfx.runtime.loop import STATES
from fasfx.runtime.ticks import shape_function


class Steps:
    """What the metadata of a step form says: its inputs, its states, their shapes in terms of the inputs', and T."""

    def __init__(self, written: str) -> None:
        found = json.loads(written)
        self.tick: str = found["tick"]
        self.timesteps: int = found["timesteps"]
        self.inputs: dict[str, list[str]] = found["inputs"]
        self.states: list[str] = list(found["states"])
        sizes = [sympy.sympify(size) for shape in self.inputs.values() for size in shape]
        shapes = [tuple(sympy.sympify(size) for size in shape) for shape in found["states"].values()]
        self._shapes = shape_function(sizes, shapes)

    @classmethod
    def of(cls, session: Any) -> Steps | None:
        """Of a session whose graph is in step form, else None."""
        written = session.get_modelmeta().custom_metadata_map.get(STATES)
        return cls(written) if written else None

    def run(self, runner: Any, inputs: dict[str, Tensor], steps: int) -> Iterator[Any]:
        """The running output after every tick. States and outputs stay on the device of transformers' runner."""
        import onnxruntime as ort

        session, device = runner.session, runner.device.type
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value.numpy(force=True)))
        kinds = {value.name: value.type for value in session.get_inputs()}
        shapes = self._shapes(*(size for name in self.inputs for size in inputs[name].shape))
        for name, shape in zip(self.states, shapes, strict=True):
            zeros = torch.zeros(shape, dtype=DTYPES[kinds[name]])
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(zeros.numpy(), device))
        count = len(self.states)
        for tick in range(1, steps + 1):
            if self.tick in kinds:
                binding.bind_cpu_input(self.tick, np.array(tick, np.int64))
            for value in session.get_outputs():
                binding.bind_output(value.name, device)
            refused(lambda: session.run_with_iobinding(binding))
            results = binding.get_outputs()
            leaves = [torch.from_numpy(value.numpy()) for value in results[: len(results) - count]]
            for name, value in zip(self.states, results[len(results) - count :], strict=True):
                binding.bind_ortvalue_input(name, value)
            # The places of the states in the export's outputs: they stay where they are.
            output, _ = runner.unflatten([*leaves, *([torch.empty(0)] * count)])
            yield output
