"""Speed: the integer form in ONNX Runtime, beside the original and ONNX Runtime's own int8, in one process."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import fasfx
from fasfx import scores
from fasfx.runtime import OnnxModel
from fasfx.tools.bench import cases, cost, data, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.exports import DYNAMIC, INTEGER, RATIO, SPIKING, Network, build, memory, sessions
from fasfx.tools.bench.fidelity import WINDOW, windows_of
from fasfx.tools.bench.peers import peers
from fasfx.tools.bench.tables import Line, Table, at_least, at_most, below, plain

STATIC = "static thresholds and folded transforms only"
SHAPES = ((1, 16), (1, 128), (8, 16), (8, 128), (32, 16), (32, 128))
LIMITS = {"1 × 16": 0.55, "1 × 128": 0.66, "8 × 128": 0.66}
SPIKING_LIMIT, SMOLLM2_LIMIT = 0.85, 0.70
COSINE = 0.99
PERPLEXITY, STATIC_PERPLEXITY = 1.015, 1.045
TOKENS = 8176


def minilm(quick: bool) -> Iterator[Table]:
    """Time by shape, sentence embeddings, and what an export costs."""
    network = Network(
        "MiniLM-L6",
        cases.minilm()[0],
        cases.calibration("news", quick),
        cases.evaluation("tales", 1, 2, 5)[0],
        cost.OPSETS,
        31,
    )
    integer = fasfx.SpikeConfig.integer()
    forms = {INTEGER: integer} | ({} if quick else {SPIKING: integer.replace(nonlinear="spiking")})
    inputs = (
        _inputs(SHAPES[:1]) if quick else _inputs(SHAPES) | {"8 × 128, half padding": _tokens((8, 128), padded=True)}
    )
    with tempfile.TemporaryDirectory() as folder:
        built, nets = build(network, forms, Path(folder), cases.SLACK if quick else 1.0)
        yield memory(network, Path(folder), _tokens(SHAPES[0 if quick else -1]))
        yield from _times(network, Path(folder), inputs, LIMITS, quick)
        yield _embeddings(nets[INTEGER], OnnxModel(Path(folder) / INTEGER, threads=1), quick)
        yield built


def smollm2(quick: bool) -> Iterator[Table]:
    """The same for a language model, with its perplexity; not in a quick run."""
    if quick:
        return
    model, tokenizer = cases.smollm2()
    own, other = data.split("tales"), data.split("books")
    inputs = {name: value for name, value in _tokens((2, 5)).items() if name != "token_type_ids"}
    network = Network(
        "SmolLM2-135M", model, windows_of(tokenizer, own[0], TOKENS), {**inputs, "use_cache": False}, cost.OPSETS[:1], 9
    )
    timed = _inputs(((1, 128), (8, 128)))
    with tempfile.TemporaryDirectory() as folder:
        built, nets = build(network, {INTEGER: fasfx.SpikeConfig.integer()}, Path(folder))
        yield memory(network, Path(folder), timed["8 × 128"])
        yield from _times(network, Path(folder), timed, dict.fromkeys(timed, SMOLLM2_LIMIT), quick)
        yield built
    texts = {"unseen tales": own[1], "books": other[1]}
    windows = {kind: windows_of(tokenizer, found, TOKENS) for kind, found in texts.items()}
    original = [scores.perplexity(model, batches) for batches in windows.values()]
    static = fasfx.convert(model, network.calibration, fasfx.SpikeConfig.integer(granularity="tensor"))
    lines = []
    for name, net, limit in ((INTEGER, nets[INTEGER], PERPLEXITY), (STATIC, static, STATIC_PERPLEXITY)):
        spiking = [scores.perplexity(net, batches) for batches in windows.values()]
        ratios = [a / b for a, b in zip(spiking, original, strict=True)]
        lines.append(at_most(name, ratios, limit, "{:.4f}"))
    note = f"T = 7, int8 weights; calibrated on tales; {TOKENS:,} predicted tokens in windows of {WINDOW}."
    yield Table("SmolLM2-135M, perplexity / original's", ("", *windows), lines, note)


def _inputs(shapes: Iterable[tuple[int, int]]) -> dict[str, Batch]:
    return {f"{rows} × {length}": _tokens((rows, length)) for rows, length in shapes}


def _tokens(shape: tuple[int, int], padded: bool = False) -> Batch:
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, shape, generator=source)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _times(
    network: Network, folder: Path, inputs: dict[str, Batch], limits: dict[str, float], quick: bool
) -> Iterator[Table]:
    """Time over the original's best float form; the integer form is held to a limit, and to ONNX Runtime's int8."""
    rows = dict[str, list[timing.Ratio]]()
    for batch in inputs.values():
        times = timing.interleaved(sessions(folder, batch), 5 if quick else network.rounds)
        for name, ratio in timing.ratios(times, cost.fastest_original(times)).items():
            rows.setdefault(name, []).append(ratio)
    slack = cases.SLACK if quick else 1.0
    held = [slack * limits.get(shape, math.inf) for shape in inputs]
    lines = [_line(name, rows, held, slack) for name in rows]
    spread = max(r.high - r.low for found in rows.values() for r in found)
    note = f"Base: the faster original. {timing.CONDITIONS}; quartiles at most {spread:.2f} apart."
    yield Table(f"{network.name} in ONNX Runtime, time / original's, batch × length", ("", *inputs), lines, note)


def _line(name: str, rows: dict[str, list[timing.Ratio]], limits: list[float], slack: float) -> Line:
    medians = [ratio.median for ratio in rows[name]]
    if name == SPIKING:
        return at_most(name, medians, SPIKING_LIMIT, RATIO)
    if name != INTEGER:
        return plain(name, medians, RATIO)
    line = below(name, medians, [slack * ratio.median for ratio in rows[DYNAMIC]], "", RATIO)
    targets = ", ".join(RATIO.format(limit) if limit < 9 else "-" for limit in limits)
    met = bool(line.met) and all(m <= limit for m, limit in zip(medians, limits, strict=True))
    return line._replace(target=f"≤ {targets}, and below dynamic int8", met=met)


def _embeddings(snn: fasfx.SpikingModel, deployed: OnnxModel, quick: bool) -> Table:
    """Cosine of mean-pooled sentence embeddings with the original's, on another kind of text than the calibration's."""
    lines = []
    batches = cases.evaluation("tales", 1 if quick else 4)
    for name, model in (("torch", snn), ("ONNX Runtime", deployed)):
        found = torch.cat([_cosines(model, batch) for batch in batches])
        lines += [at_least(name, [float(found.mean())], COSINE, "{:.4f}")]
        lines += [plain(f"{name}, smallest", [float(found.min())], "{:.4f}")]
    note = f"{len(found)} texts of tales; calibrated on news; T = 7, int8 weights."
    return Table("MiniLM-L6, integer form, cosine of sentence embeddings", ("", "mean"), lines, note)


@torch.no_grad()
def _cosines(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = [(m(**batch).last_hidden_state * mask).sum(1) / mask.sum(1) for m in (cases.minilm()[0], model)]
    return torch.cosine_similarity(*pooled)


PARTS = {"minilm": minilm, "smollm2": smollm2, "peers": peers}
