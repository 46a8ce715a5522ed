"""Time and memory of a call, compared fairly: interleaved rounds, one thread, ratios within a round.

Other work on the machine slows whole rounds, so times are only compared within one: the figure is the median
over rounds of time / time of the base. Both sides get one thread: `interleaved` pins torch's own, sessions of
ONNX Runtime need `session_options()`. Tables that print these figures say so with CONDITIONS.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fasfx.errors import RuntimeUnavailableError

CONDITIONS = "one thread, process time, median of interleaved rounds"
T = TypeVar("T")


class Ratio(NamedTuple):
    """A time over the base's, without unit; `low` and `high` are the quartiles over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@contextmanager
def one_thread() -> Iterator[None]:
    """Pins torch's operators to one thread, and gives the threads back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def session_options() -> Any:
    """onnxruntime.SessionOptions with one thread that does not spin while it waits."""
    import onnxruntime  # an optional dependency

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each call in each round, on one torch thread, after one call of each that is not counted.

    A round runs every call once, every other round in reverse order. The clock is the process's CPU time (all
    its threads; waiting does not count); `time.perf_counter` gives wall time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread(), torch.no_grad():
        for call in calls.values():
            call()
        for at in range(rounds):
            for name in list(calls)[:: -1 if at % 2 else 1]:
                start = clock()
                calls[name]()
                times[name].append(clock() - start)
    return times


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Ratio]:
    """Each name's time over that of `base` in the same round, over two rounds or more."""
    found = {}
    for name, row in times.items():
        per_round = [time_ / of_base for time_, of_base in zip(row, times[base], strict=True)]
        low, median, high = statistics.quantiles(per_round, method="inclusive")
        found[name] = Ratio(median, low, high)
    return found


def _resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (most since the last reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_rss(call: Callable[[], T]) -> tuple[T, int]:
    """(what the call returned, how far the resident set rose above its size at the start, in bytes).

    Linux only. Garbage is collected and freed memory given back first, then the kernel's high-water mark is
    reset, so every peak counts however short; the kernel's count is right to about a megabyte. Pages of files
    mapped during the call (safetensors) count once they are touched.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # a C library that keeps nothing back
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
        start = _resident("VmRSS")
    except OSError as error:
        raise RuntimeUnavailableError(
            "peak memory is measured through /proc/self/clear_refs, which only Linux has"
        ) from error
    result = call()
    return result, max(0, _resident("VmHWM") - start)
