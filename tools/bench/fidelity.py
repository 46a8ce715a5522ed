"""Fidelity: how far the spiking networks are from their originals, on the calibration's kind of text and another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import fasfx
from fasfx import scores
from fasfx.equivalence import spikes_so_far
from fasfx.tools.bench import cases, data, metrics
from fasfx.tools.bench.tables import Line, Table, at_most, below, between, plain

PERCENT = "{:.3%}"
MULTI = {3: 0.025, 4: 0.005, 5: 0.0012}  # T: limit of the relative error
RADIX = {8: (0.045, 0.06), 12: (0.01, 0.02)}  # T: limits on the calibration's kind of text, on another
HALVING = (0.375, 0.625)  # a half within 25 %
Errors = dict[tuple[str, str], dict[int, float]]  # (calibrated on, evaluated on): T: error
ERROR = "relative L2 error of last_hidden_state over unmasked positions"


def errors(code: str, steps: tuple[int, ...], quick: bool, nonlinear: str = "exact") -> Errors:
    """MiniLM's error for each kind of calibration and evaluation text, and each T."""
    kinds = cases.KINDS[:1] if quick else cases.KINDS
    size = (1, 4, 64) if quick else (2, 8, 128)
    batches = {kind: cases.evaluation(kind, *size) for kind in cases.KINDS}
    found: Errors = {}
    for kind in kinds:
        snn = cases.spiking(kind, code, steps[0], quick, nonlinear)
        for other in cases.KINDS:
            calls = {step: partial(cases.at, snn, step) for step in steps}
            found[kind, other] = metrics.error_table(cases.minilm()[0], calls, batches[other])
    return found


def multi(quick: bool) -> Iterator[Table]:
    """MiniLM with default settings, T from 1 on."""
    steps = (3, 4) if quick else tuple(range(1, 8))
    found = errors("multi", steps, quick, "spiking")
    slack = cases.SLACK if quick else 1.0
    lines: list[Line] = []
    for step in steps:
        row = [table[step] for table in found.values()]
        if lines:
            falling = below(f"T = {step}", row, lines[-1].figures, "less than before", PERCENT)
        else:
            falling = plain(f"T = {step}", row, PERCENT)
        if step in MULTI:
            limit = at_most(f"T = {step}", row, MULTI[step] * slack, PERCENT)
            falling = limit._replace(met=limit.met and falling.met is not False)
        lines.append(falling)
    columns = ("", *(f"{a}, on {b}" for a, b in found))
    texts = "16 texts of the first kind, measured on 4" if quick else "64 texts of the first kind, measured on 16"
    note = f"Calibrated on {texts} unseen ones of the second; {ERROR}."
    yield Table("MiniLM-L6, default settings (multi code)", columns, lines, note)
    yield sent(cases.spiking(cases.KINDS[0], "multi", steps[0], quick, "spiking"), steps)


def sent(snn: fasfx.SpikingModel, steps: tuple[int, ...]) -> Table:
    """How much of the network spikes drive, and how many they are, by T."""
    (batch,) = cases.evaluation(cases.KINDS[0], 1)
    lines = []
    for step in steps:
        snn.timesteps = step
        groups = snn.group_spikes(**batch)
        share = 100 * min(snn.coverage.spike_driven_macs, snn.coverage.spike_driven_operators)
        figures = [share, spikes_so_far(snn, batch)[-1], sum(groups.values()) / len(groups)]
        lines.append(plain(f"T = {step}", figures, "{:.2f}"))
    columns = ("", "spike-driven, %", "spikes per activation", "spikes in a group")
    note = "Spike-driven: the smaller share, of multiply-accumulates or operators. In a group: mean over groups."
    return Table("MiniLM-L6, default settings: what is sent", columns, lines, note)


def static(quick: bool) -> Iterator[Table]:
    """MiniLM with the radix and the rate code, whose thresholds are static per channel."""
    slack = cases.SLACK if quick else 1.0
    steps = (8,) if quick else tuple(RADIX)
    found = errors("radix", steps, quick)
    lines = []
    for step in steps:
        for other, limit in zip((False, True), RADIX[step], strict=True):
            row = [table[step] for (a, b), table in found.items() if (a != b) is other]
            lines.append(at_most(f"T = {step}, {'another' if other else 'own'} kind", row, limit * slack, PERCENT))
    columns = ("", *(f"calibrated on {kind}" for kind in cases.KINDS[: len(lines[0].figures)]))
    yield Table(
        "MiniLM-L6, radix code, functions in float",
        columns,
        lines,
        f"{ERROR}; own kind: that of the calibration.".capitalize(),
    )
    if not quick:
        yield rate((64, 128, 256, 512))


def rate(steps: tuple[int, ...]) -> Table:
    """The rate code's error and its ratio to that at half of T."""
    found = errors("rate", steps, quick=False)
    lines = []
    for step in steps:
        lines.append(plain(f"T = {step}", [table[step] for table in found.values()], PERCENT))
        if step != steps[0]:
            ratio = [table[step] / table[step // 2] for table in found.values()]
            lines.append(between(f"T = {step} / T = {step // 2}", ratio, *HALVING))
    columns = ("", *(f"{a}, on {b}" for a, b in found))
    return Table("MiniLM-L6, rate code, functions in float", columns, lines, "Error, and its ratio when T doubles.")


# --- language model --------------------------------------------------------------------------------------

TOKENS, WINDOW = 4088, 512
OWN, OTHER = "tales", "books"
PERPLEXITY = {"multi": {3: 1.01, 4: 1.006, 5: 1.006}, "radix": {8: 1.01}}


def perplexity(quick: bool) -> Iterator[Table]:
    """SmolLM2's perplexity over the original's; not in a quick run."""
    if quick:
        return
    model, tokenizer = cases.smollm2()
    own, other = data.split(OWN), data.split(OTHER)
    windows = {kind: windows_of(tokenizer, texts[1]) for kind, texts in ((OWN, own), (OTHER, other))}
    original = [scores.perplexity(model, batches) for batches in windows.values()]
    lines = [plain("original, perplexity", original)]
    for code, limits in PERPLEXITY.items():
        config = fasfx.SpikeConfig().replace(code=code, timesteps=min(limits), nonlinear="exact")
        snn = fasfx.convert(model, windows_of(tokenizer, own[0]), config)
        for steps, limit in limits.items():
            snn.timesteps = steps
            spiking = [scores.perplexity(snn, batches) for batches in windows.values()]
            ratio = [a / b for a, b in zip(spiking, original, strict=True)]
            lines.append(at_most(f"{code}, T = {steps}", ratio, limit, "{:.4f}"))
    note = f"Over the original's; calibrated on {OWN}; {TOKENS:,} predicted tokens in windows of {WINDOW}."
    yield Table("SmolLM2-135M, perplexity, functions in float", ("", f"on unseen {OWN}", f"on {OTHER}"), lines, note)


def windows_of(tokenizer: Any, texts: list[str], tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Windows of text, without the cache of keys and values that a spiking network has not."""
    return [{**window, "use_cache": False} for window in data.windows(tokenizer, texts, tokens, WINDOW)]
