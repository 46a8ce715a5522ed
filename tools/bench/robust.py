"""The deployed network under use: any shape and padding, thousands of calls, two threads at once, large files."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import fasfx
from fasfx.difference import Difference, main_output, output_mask
from fasfx.runtime import OnnxModel
from fasfx.tools.bench import cases, data, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.tables import Table, at_least, at_most, between, plain

CASES, CALLS, TOGETHER = 1_000, 10_000, 200
ROWS, LENGTH = 9, 200  # most rows of a batch, most tokens of a text
PADDING = ("left", "right", "none")
ERROR_RATIO = (0.95, 1.05)
WIDE, ROUNDING = 16_500, 1e-4  # two such layers have 2.2 GB of weights
GROWTH = 16.0  # MB that 10,000 calls may add: about a tenth of what one call of the longest batch takes


def shapes(quick: bool) -> Iterator[Table]:
    """Random batch, length and padding: finite outputs, and an error to the original like torch's."""
    original, snn, count = cases.minilm()[0], _integer(), 30 if quick else CASES
    with tempfile.TemporaryDirectory() as folder, cases.undisturbed():
        snn.to_onnx(folder)
        deployed = OnnxModel(folder, threads=1)
    in_torch, there = ({p: Difference() for p in PADDING} for _ in range(2))
    broken = dict.fromkeys(PADDING, 0)
    for padding, batch in _batches(count):
        with torch.no_grad():
            reference, found = main_output(original(**batch)), main_output(deployed(**batch))
            in_torch[padding].add(reference, main_output(snn(**batch)), output_mask(batch))
        there[padding].add(reference, found, output_mask(batch))
        broken[padding] += not bool(found.isfinite().all())
    ratios = [there[p].relative_l2 / in_torch[p].relative_l2 for p in PADDING]
    low, high = ERROR_RATIO
    lines = [
        plain("torch", [in_torch[p].relative_l2 for p in PADDING], "{:.4f}"),
        plain("ONNX Runtime", [there[p].relative_l2 for p in PADDING], "{:.4f}"),
        between("ratio", ratios, low - quick * 0.1, high + quick * 0.1),
        at_most("batches that are not finite", [*broken.values()], 0, "{:.0f}"),
    ]
    note = f"{count:,} batches of 1 to {ROWS} rows and 1 to {LENGTH} tokens; relative L2 error to the original."
    yield Table("MiniLM-L6, integer form: random shapes", ("padding", *PADDING), lines, note)


def calls(quick: bool) -> Iterator[Table]:
    """One session called very often, and by two threads at once."""
    snn, number = _integer(), 500 if quick else CALLS
    batches = [batch for _, batch in _batches(20)]
    with tempfile.TemporaryDirectory() as folder:
        with cases.undisturbed():
            snn.to_onnx(folder)
        deployed = OnnxModel(Path(folder), threads=1)
        expected = [main_output(deployed(**batch)) for batch in batches]
        short = {name: value[:1, :8] for name, value in batches[0].items()}
        for _ in range(100):
            deployed(**short)
        _, growth = timing.peak_rss(lambda: [None for _ in range(number) if deployed(**short) is None])
        with ThreadPoolExecutor(2) as threads:
            order = [at % len(batches) for at in range(TOGETHER // (10 if quick else 1))]
            found = list(threads.map(lambda at: main_output(deployed(**batches[at])), order))
    wrong = sum(not torch.equal(value, expected[at]) for at, value in zip(order, found, strict=True))
    lines = [
        at_most(f"MB that {number:,} calls add", [growth / 2**20], GROWTH, "{:.1f}"),
        at_most(f"wrong answers of {len(order)} from two threads", [wrong], 0, "{:.0f}"),
    ]
    yield Table("MiniLM-L6, integer form: one session", ("", "measured"), lines)


def large(quick: bool) -> Iterator[Table]:
    """More weights than one protobuf message holds, 2 GB: 8 GB of memory, so not in a quick run."""
    if quick:
        return
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE)), torch.randn(2, WIDE)
    snn, apart = fasfx.convert(model.eval(), [{"input": inputs}]), Difference()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with cases.undisturbed():
            snn.to_onnx(folder)
        size = (Path(folder) / "model.onnx.data").stat().st_size
        apart.add(main_output(snn(inputs)), main_output(OnnxModel(Path(folder), threads=1)(input=inputs)))
    lines = [
        at_least("file of weights, GB", [size / 1e9], 2**31 / 1e9, "{:.2f}"),
        at_most("relative L2 difference to torch", [apart.relative_l2], ROUNDING, "{:.0e}"),
    ]
    yield Table(f"Two linear layers of {WIDE:,} × {WIDE:,}, multi code", ("", "measured"), lines)


def _integer() -> fasfx.SpikingModel:
    return fasfx.convert(cases.minilm()[0], cases.calibration("news"), fasfx.SpikeConfig.integer())


def _batches(count: int) -> Iterator[tuple[str, Batch]]:
    """Texts of tales, cut to random shapes; a padded row is as short as chance has it."""
    tokenizer, draw = cases.minilm()[1], random.Random(0)
    texts = data.split("tales")[1]
    for number in range(count):
        padding, rows, length = PADDING[number % 3], draw.randint(1, ROWS), draw.randint(1, LENGTH)
        ids = [tokenizer(draw.choice(texts), truncation=True, max_length=512)["input_ids"] for _ in range(rows)]
        lengths = [length if padding == "none" else draw.randint(1, length) for _ in ids]
        pieces = [{"input_ids": row[:size]} for row, size in zip(ids, lengths, strict=True)]
        if padding == "none":  # texts shorter than that are repeated
            pieces = [{"input_ids": (p["input_ids"] * length)[:length]} for p in pieces]
        side = "right" if padding == "none" else padding
        batch = tokenizer.pad(pieces, padding_side=side, return_tensors="pt")
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        yield padding, dict(batch)


PARTS = {"shapes": shapes, "calls": calls, "large": large}
