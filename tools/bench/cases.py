"""What the parts of the benchmark share: models loaded once, and batches of calibration and evaluation text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import fasfx
from fasfx.terminal import quiet, silent
from fasfx.tools.bench import data, models
from fasfx.tools.bench.data import Batch

KINDS = ("tales", "news")  # the kinds of text MiniLM is calibrated on
BATCH, LENGTH = 8, 128
SLACK = 2.0  # a quick run measures little, so its limits are this much wider: it finds what is broken only


@cache
def minilm() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, loaded once."""
    return models.minilm()


@cache
def smollm2() -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, loaded once."""
    return models.smollm2()


@cache
def qwen() -> tuple[Any, Any]:
    """Qwen2.5-Coder and its tokenizer, loaded once."""
    return models.qwen()


def calibration(kind: str, quick: bool = False) -> list[Batch]:
    """MiniLM's calibration batches of a kind of text: 64 texts of at most 128 tokens (quick: 16 of 64)."""
    count, length = (2, LENGTH // 2) if quick else (8, LENGTH)
    return data.batches(minilm()[1], data.split(kind)[0], count, BATCH, length)


def evaluation(kind: str, count: int, batch_size: int = BATCH, length: int = LENGTH) -> list[Batch]:
    """MiniLM's batches of the other part of a kind: no text of it is in `calibration`."""
    return data.batches(minilm()[1], data.split(kind)[1], count, batch_size, length)


@cache
def _converted(kind: str, code: str, nonlinear: str, quick: bool) -> fasfx.SpikingModel:
    config = fasfx.SpikeConfig().replace(code=code, nonlinear=nonlinear)
    return fasfx.convert(minilm()[0], calibration(kind, quick), config)


def spiking(kind: str, code: str, timesteps: int, quick: bool = False, nonlinear: str = "exact") -> fasfx.SpikingModel:
    """MiniLM calibrated on a kind of text, else default settings of the code; converted once, then set to T.

    nonlinear: "exact" measures what the code's neurons do, and nothing else; the package's default is "spiking".
    """
    return at(_converted(kind, code, nonlinear, quick), timesteps)


def at(snn: fasfx.SpikingModel, timesteps: int) -> fasfx.SpikingModel:
    """The same network, set to T time steps."""
    snn.timesteps = timesteps
    return snn


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without what torch and transformers print and warn while they export."""
    with quiet(), silent():
        yield
