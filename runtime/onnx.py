"""An exported spiking network in ONNX Runtime."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fasfx.errors import CheckpointError, ConfigError, FasfxError, first_line
from fasfx.runtime.export import MANIFEST
from fasfx.runtime.feeding import END, checked, fetch, ones, positive, refused
from fasfx.runtime.integrity import check_sums
from fasfx.runtime.loop import TIMESTEPS
from fasfx.runtime.profiling import read_profile
from fasfx.runtime.providers import open_session, session_options
from fasfx.runtime.stepping import Steps

if TYPE_CHECKING:
    import onnxruntime
    import pandas


class OnnxModel:
    """An exported spiking network in ONNX Runtime, called like the model it came from.

    folder:  what SpikingModel.to_onnx or transformers' ExportedModel wrote.
    device:  None or "cpu"; "cuda" (the package onnxruntime-gpu); "webgpu" (the package onnxruntime-ep-webgpu).
    threads: intra-op threads; None: ONNX Runtime's choice.
    One model may be called from several threads at once.
    Raises CheckpointError for a folder without an export or with damaged files, RuntimeUnavailableError if the device's
    provider or a GPU is missing (nothing runs elsewhere in its place), ConfigError for another device.
    """

    def __init__(self, folder: str | Path, device: str | None = None, threads: int | None = None) -> None:
        self._folder, self._device, self._threads = Path(folder), device, threads
        if not (self._folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} holds no ONNX export ({MANIFEST} is missing): make one with `fasfx export`"
            )
        check_sums(self._folder)
        self._runner = self._open(session_options(threads))
        self._steps = Steps.of(self.session)
        self._names = list(self._steps.inputs if self._steps else self._runner.metadata.kwargs)

    def _open(self, options: Any) -> Any:
        """transformers' runner of the export's one graph, in a session of our own."""
        from transformers.exporters import ExportMetadata
        from transformers.exporters.auto import get_runner_class
        from transformers.exporters.metadata import register_treespec_types

        try:
            (entry,) = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))["components"].values()
            metadata = ExportMetadata.from_dict(entry["metadata"])
            register_treespec_types(metadata.out_spec)
            return get_runner_class("onnx")(metadata, open_session(self._folder / entry["file"], self._device, options))
        except FasfxError:
            raise
        except Exception as error:
            raise CheckpointError(f"the export in {self._folder} cannot be read: {first_line(error)}") from error

    def profile(self, **inputs: Any) -> pandas.DataFrame:
        """Call once, in a session of its own: which node ran on which execution provider, and its microseconds.

        A row for every node that ran, in order, as ONNX Runtime fused them. Raises what a call raises.
        """
        with tempfile.TemporaryDirectory() as place:
            options = session_options(self._threads)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(place) / "run")
            watched = copy.copy(self)
            watched._runner = self._open(options)
            watched(**inputs)
            return read_profile(Path(watched.session.end_profiling()))

    def __call__(self, *, timesteps: Any = None, **inputs: Any) -> Any:
        """The model's own outputs for its own inputs, torch tensors in and out.

        timesteps: T of a synchronous network; None: the one it was exported with. (A sequential network may have an
        input of that name; then it is that.)
        Raises InputError for inputs, ConfigError for a T that this export does not take.
        """
        if self._steps is not None:
            return deque(self.ticks(timesteps=timesteps, **inputs), maxlen=1).pop()
        if TIMESTEPS in self._names:
            inputs, timesteps = {**inputs, TIMESTEPS: timesteps}, None
        given = checked(self.session, self._names, inputs)
        if timesteps is None:
            return refused(lambda: self._runner(**given))
        if TIMESTEPS not in {value.name for value in self.session.get_overridable_initializers()}:
            raise ConfigError("this export has a fixed T: only a synchronous network's takes timesteps")
        feeds = {name: value.numpy(force=True) for name, value in given.items()}
        feeds[TIMESTEPS] = np.array(positive(timesteps), np.int64)
        leaves = refused(lambda: self.session.run(None, feeds))
        return self._runner.unflatten([torch.from_numpy(leaf) for leaf in leaves])

    def ticks(self, *, timesteps: int | None = None, **inputs: Any) -> Iterator[Any]:
        """The running outputs of an export in step form, one per tick; the states stay in ONNX Runtime's memory.

        Raises ConfigError for an export in another form.
        """
        if self._steps is None:
            raise ConfigError('this export is not in step form: make one with to_onnx(folder, form="step")')
        steps = self._steps.timesteps if timesteps is None else timesteps
        return self._steps.run(self._runner, checked(self.session, self._names, inputs), positive(steps))

    def stream(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """An output for every batch of inputs, in order; the next batch is made while one runs.

        Raises what a call raises, and what `batches` raises.
        """
        source = iter(batches)
        coming = fetch(source)
        while (batch := coming.result()) is not END:
            coming = fetch(source)
            yield self(**batch)

    def warm_up(self, *sizes: int) -> None:
        """Run once on inputs of ones, so that the first real call does not wait for memory or a GPU's compiler.

        sizes: of the dynamic dimensions, in their order: batch and length of a text model.
        Raises ConfigError for another number of sizes.
        """
        self(**ones(self.session, self._names, sizes))

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The ONNX Runtime session."""
        found: onnxruntime.InferenceSession = self._runner.session
        return found
