"""Inputs of an ONNX Runtime session: their names, ranks and types, and what it says of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from fasfx.errors import ConfigError, InputError, RuntimeUnavailableError, first_line
from fasfx.inputs import variable

END = object()  # of a stream
CONSTANTS = "constants"  # in the metadata of an export: what the model was captured with, by name
DTYPES = {  # of what a model's inputs can be
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def checked(session: Any, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in the order of `names`; what was captured as a constant may be given too.

    Raises InputError naming one that is missing, unknown or wrong.
    """
    inputs = variable(names, json.loads(session.get_modelmeta().custom_metadata_map.get(CONSTANTS, "{}")), inputs)
    if missing := [name for name in names if not isinstance(inputs.get(name), Tensor)]:
        raise InputError(f"missing input {', '.join(missing)}: the model takes {', '.join(names)}")
    known = {value.name: value for value in session.get_inputs()}
    for name in names:
        given, wanted = inputs[name], known.get(name)  # None: the graph does not read it
        if wanted is not None and given.dim() != len(wanted.shape):
            raise InputError(f"{name} has rank {given.dim()}: the model takes rank {len(wanted.shape)}")
        if wanted is not None and given.dtype != (kind := DTYPES.get(wanted.type, given.dtype)):
            raise InputError(f"{name} is {given.dtype}: the model takes {kind}")
    return {name: inputs[name] for name in names}


def ones(session: Any, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of ones; `sizes` are those of the dynamic dimensions, in their order.

    Raises ConfigError for another number of sizes.
    """
    known = {value.name: value for value in session.get_inputs() if value.name in names}
    dynamic = list(dict.fromkeys(d for value in known.values() for d in value.shape if isinstance(d, str)))
    if len(dynamic) != len(sizes):
        raise ConfigError(f"sizes {tuple(sizes)}: give {len(dynamic)}, those of {', '.join(dynamic)}")
    given = dict(zip(dynamic, sizes, strict=True))
    made = {
        name: torch.ones([given.get(d, d) for d in value.shape], dtype=DTYPES[value.type])
        for name, value in known.items()
    }
    return dict.fromkeys(names, torch.ones(())) | made  # of inputs that the graph does not read, anything


def positive(steps: int) -> int:
    """T as given. Raises ConfigError unless it is a whole number from 1 on."""
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"timesteps={steps!r}: must be a whole number of at least 1")
    return steps


def refused(run: Callable[[], Any]) -> Any:
    """What ONNX Runtime says no to is an InputError; what a device or memory fails at RuntimeUnavailableError."""
    try:
        return run()
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "EPFail":
            raise RuntimeUnavailableError(f"ONNX Runtime or its device gave up: {first_line(error)}") from error
        raise InputError(f"ONNX Runtime refuses these inputs: {first_line(error)}") from error


def fetch(source: Iterator[Any]) -> Future[Any]:
    """The next item of an iterator, or END; in a daemon thread, so that nobody waits for one that is not wanted."""
    coming: Future[Any] = Future()

    def run() -> None:
        try:
            coming.set_result(next(source, END))
        except BaseException as error:
            coming.set_exception(error)

    Thread(target=run, daemon=True).start()
    return coming
