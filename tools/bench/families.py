"""Families: tiny random models of six architectures convert with default settings, and T buys accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import fasfx
from fasfx.calibration import without_cache
from fasfx.errors import CalibrationError
from fasfx.tools.bench import cases, metrics, models
from fasfx.tools.bench.tables import Table, at_most

STEPS = (1, 2, 3, 4)
GAIN = 3  # error at T + 3 is at most a quarter of that at T


def errors(family: str, steps: tuple[int, ...]) -> dict[int, float]:
    """T: relative L2 error of the main output of a tiny model, calibrated on what convert makes up itself."""
    model = models.tiny(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the inputs are random
        try:
            snn = fasfx.convert(model)
        except CalibrationError:
            snn = fasfx.convert(model, [models.tiny_inputs(family, seed=9) | without_cache(model)])
    batches = [models.tiny_inputs(family, seed=seed) | without_cache(model) for seed in (1, 2, 3)]
    return metrics.error_table(model, {step: partial(cases.at, snn, step) for step in steps}, batches)


def families(quick: bool) -> Iterator[Table]:
    """The ratio of errors for every family; two families and two T in a quick run."""
    names = ("bert", "llama") if quick else tuple(models.TINY)
    bases = STEPS[:2] if quick else STEPS
    steps = tuple(sorted({*bases, *(base + GAIN for base in bases)}))
    lines = []
    for name in names:
        found = errors(name, steps)
        ratio = [found[base + GAIN] / found[base] for base in bases]
        lines.append(at_most(name, ratio, 0.25))
    columns = ("", *(f"e({base + GAIN}) / e({base})" for base in bases))
    note = "e(T): relative L2 error of the main output of a random two-layer model; default settings."
    yield Table("Six families", columns, lines, note)
