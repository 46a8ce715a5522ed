"""An exported spiking network in ONNX Runtime."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
from torch import Tensor

from fasfx.errors import CheckpointError, ConfigError, InputError, RuntimeUnavailableError
from fasfx.runtime.export import MANIFEST
from fasfx.runtime.loop import STATES, TIMESTEPS
from fasfx.runtime.profiling import read_profile
from fasfx.runtime.ticks import shape_function

if TYPE_CHECKING:
    import onnxruntime
    import pandas


SLOW = "SkipLayerNormFusion"  # ONNX Runtime's fused sum and norm takes longer on a CPU than the two do


class OnnxModel:
    """An exported spiking network in ONNX Runtime, called like the model it came from.

    folder:  what SpikingModel.to_onnx or transformers' ExportedModel wrote.
    device:  None or "cpu"; "cuda" where this build of ONNX Runtime has the provider.
    threads: intra-op threads; None: ONNX Runtime's choice.
    Raises CheckpointError for a folder without an export, RuntimeUnavailableError for a missing provider.
    """

    def __init__(self, folder: str | Path, device: str | None = None, threads: int | None = None) -> None:
        import onnxruntime as ort

        if not (Path(folder) / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} holds no ONNX export ({MANIFEST} is missing): make one with `fasfx export`"
            )
        available = ort.get_available_providers()
        if device not in (None, "cpu") and not any(str(device).lower() in p.lower() for p in available):
            raise RuntimeUnavailableError(f"no execution provider for {device!r}; available: {', '.join(available)}")
        self._opened = folder, device, threads
        self.exported = self._open(_options(threads))
        written = self.session.get_modelmeta().custom_metadata_map.get(STATES)
        self._states: dict[str, Any] | None = json.loads(written) if written else None
        if self._states is not None:
            known = {name: [sympy.sympify(size) for size in shape] for name, shape in self._states["inputs"].items()}
            shapes = [tuple(sympy.sympify(size) for size in shape) for shape in self._states["states"].values()]
            self._shapes = shape_function([size for shape in known.values() for size in shape], shapes)

    def _open(self, options: Any) -> Any:
        from transformers.exporters import ExportedModel

        folder, device, _ = self._opened
        try:
            return ExportedModel.from_pretrained(folder, device=device or "cpu", session_options=options)
        except Exception as error:
            raise CheckpointError(f"the export in {folder} cannot be read: {str(error).splitlines()[0]}") from error

    def profile(self, **inputs: Any) -> pandas.DataFrame:
        """Call once, in a session of its own: which node ran on which execution provider, and its microseconds.

        A row for every node that ran, in order, as ONNX Runtime fused them. Raises what a call raises.
        """
        with tempfile.TemporaryDirectory() as place:
            options = _options(self._opened[2])
            options.enable_profiling, options.profile_file_prefix = True, str(Path(place) / "run")
            watched = copy.copy(self)
            watched.exported = self._open(options)
            watched(**inputs)
            return read_profile(Path(watched.session.end_profiling()))

    def __call__(self, *, timesteps: Any = None, **inputs: Any) -> Any:
        """The model's own outputs for its own inputs, torch tensors in and out.

        timesteps: T of a synchronous network; None: the one it was exported with. (A sequential network may have an
        input of that name; then it is that.)
        Raises InputError for inputs, ConfigError for a T that this export does not take.
        """
        if self._states is not None:
            return deque(self.ticks(timesteps=timesteps, **inputs), maxlen=1).pop()
        if TIMESTEPS in self.exported.components["model"].metadata.kwargs:
            inputs, timesteps = {**inputs, TIMESTEPS: timesteps}, None
        given = self._checked(inputs)
        if timesteps is None:
            return _refused(lambda: self.exported(**given))
        if TIMESTEPS not in {value.name for value in self.session.get_overridable_initializers()}:
            raise ConfigError("this export has a fixed T: only a synchronous network's takes timesteps")
        feeds = {name: value.numpy(force=True) for name, value in given.items()}
        feeds[TIMESTEPS] = np.array(_positive(timesteps), np.int64)
        leaves = _refused(lambda: self.session.run(None, feeds))
        return self.exported.runners["model"].unflatten([torch.from_numpy(leaf) for leaf in leaves])

    def ticks(self, *, timesteps: int | None = None, **inputs: Any) -> Iterator[Any]:
        """The running outputs of an export in step form, one per tick; the states stay in ONNX Runtime's memory.

        Raises ConfigError for an export in another form.
        """
        if self._states is None:
            raise ConfigError('this export is not in step form: make one with to_onnx(folder, form="step")')
        steps = self._states["timesteps"] if timesteps is None else timesteps
        return self._ticks(self._states, self._checked(inputs), _positive(steps))

    def _ticks(self, states: dict[str, Any], inputs: dict[str, Tensor], steps: int) -> Iterator[Any]:
        import onnxruntime as ort

        given = [value.numpy(force=True) for value in inputs.values()]
        binding = self.session.io_binding()
        for name, value in zip(inputs, given, strict=True):
            binding.bind_cpu_input(name, value)
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        shapes = self._shapes(*(size for name in states["inputs"] for size in inputs[name].shape))
        for name, shape in zip(states["states"], shapes, strict=True):
            zeros = np.zeros(shape, _NUMPY[kinds[name]])
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(zeros))
        count = len(states["states"])
        for tick in range(1, steps + 1):
            if states["tick"] in kinds:
                binding.bind_cpu_input(states["tick"], np.array(tick, np.int64))
            for value in self.session.get_outputs():
                binding.bind_output(value.name)
            _refused(lambda: self.session.run_with_iobinding(binding))
            results = binding.get_outputs()
            leaves = [torch.from_numpy(value.numpy()) for value in results[: len(results) - count]]
            for name, value in zip(states["states"], results[len(results) - count :], strict=True):
                binding.bind_ortvalue_input(name, value)
            # The places of the states in the export's outputs: they stay where they are.
            output, _ = self.exported.runners["model"].unflatten([*leaves, *([torch.empty(0)] * count)])
            yield output

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        names = list(self._states["inputs"] if self._states else self.exported.components["model"].metadata.kwargs)
        if missing := [name for name in names if not isinstance(inputs.get(name), Tensor)]:
            raise InputError(f"missing input {', '.join(missing)}: the model takes {', '.join(names)}")
        if unknown := sorted(k for k, v in inputs.items() if k not in names and isinstance(v, Tensor)):
            raise InputError(f"unknown input {', '.join(unknown)}: the model takes {', '.join(names)}")
        ranks = {value.name: len(value.shape) for value in self.session.get_inputs()}
        for name in names:
            if inputs[name].dim() != ranks.get(name, inputs[name].dim()):
                raise InputError(f"{name} has rank {inputs[name].dim()}: the model takes rank {ranks[name]}")
        return {name: inputs[name] for name in names}

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The ONNX Runtime session."""
        return self.exported.runners["model"].session


def _options(threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("optimization.disable_specified_optimizers", SLOW)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


_NUMPY = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


def _positive(steps: int) -> int:
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"timesteps={steps!r}: must be a whole number of at least 1")
    return steps


def _refused(run: Callable[[], Any]) -> Any:
    """What ONNX Runtime says no to is an InputError."""
    try:
        return run()
    except Exception as error:
        raise InputError(f"ONNX Runtime refuses these inputs: {str(error).splitlines()[0]}") from error
