"""`fasfx demo`: a real sentence encoder becomes a spiking network and finds the same sentences."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from torch import Tensor

import fasfx
from fasfx.calibration import text_batches
from fasfx.difference import Difference, main_output, output_mask
from fasfx.terminal import animation, equivalence, progress, show, silent, table, working
from fasfx.tools.bench.models import minilm

TIMESTEPS = (1, 2, 3, 4, 5, 6, 7)
NUM_FOUND = 2
SECONDS = 0.6  # a tick is shown for
QUERIES = (
    "How do I keep vegetables alive in my backyard?",
    "space exploration",
    "My software stopped working with a memory error.",
)


def run() -> None:
    """Convert, measure, export, search. Raises MissingDataError, naming the pip command, without weights."""
    model, tokenizer = minilm()
    show("all-MiniLM-L6-v2: calibrated on the sentences shipped with fasfx, measured and searched on others.")
    with progress() as report:
        snn = fasfx.convert(model, progress=report)
        batches = text_batches(model, tokenizer, texts())
        measured = fasfx.check(model, snn, batches, timesteps=TIMESTEPS, progress=report)
    config = snn.spike_config
    equivalence(measured.table, f"Error of last_hidden_state ({config.code} code, {config.schedule} schedule)")
    with tempfile.TemporaryDirectory() as folder:
        with working("exporting to ONNX"), silent():
            snn.to_onnx(folder)
        columns: dict[str, Callable[..., Any]] = {
            "original": model,
            f"spiking, T = {snn.timesteps}": snn,
            "spiking, ONNX Runtime": fasfx.runtime.OnnxModel(folder, threads=torch.get_num_threads()),
        }
        _search(model, tokenizer, columns)
    _coverage(snn)


def watch() -> None:
    """The synchronous schedule: every layer ticks at once, and the answer settles before your eyes."""
    model, tokenizer = minilm()
    show("all-MiniLM-L6-v2, all layers ticking together: what each query finds after every tick.")
    with progress() as report:
        snn = fasfx.convert(model, config=fasfx.SpikeConfig.low_latency(timesteps=8), progress=report)
    sentences = _embed(model, text_batches(model, tokenizer, [*texts()]))
    (batch,) = text_batches(model, tokenizer, [*QUERIES])
    with torch.no_grad(), animation(SECONDS) as draw:
        original = model(**batch)
        wanted = (_pool(original, batch) @ sentences.T).argmax(-1)
        for tick, output in enumerate(snn.ticks(**batch), 1):
            difference = Difference()
            difference.add(main_output(original), main_output(output), output_mask(batch))
            scores, found = (_pool(output, batch) @ sentences.T).max(-1)
            rows = [
                (
                    query,
                    "same" if found[row] == wanted[row] else "other",
                    f"{scores[row]:.3f} {texts()[found[row]]}",
                )
                for row, query in enumerate(QUERIES)
            ]
            bar = "█" * round(40 * min(1.0, difference.relative_l2))
            draw(f"tick {tick}: error {difference.relative_l2:.3%} {bar}", ("query", "as the original", "finds"), rows)
    ticks = snn.latency_ticks["sequential"]
    show(f"One layer after the other, the same {snn.timesteps} steps per neuron would take {ticks} ticks.")


def texts() -> list[str]:
    """The sentences that are searched."""
    lines = resources.files("fasfx.data").joinpath("demo.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _search(model: Any, tokenizer: Any, columns: dict[str, Callable[..., Any]]) -> None:
    """Print the nearest sentences of every query as each network finds them."""
    found = {}
    for name, network in columns.items():
        sentences, queries = (_embed(network, text_batches(model, tokenizer, [*part])) for part in (texts(), QUERIES))
        found[name] = (queries @ sentences.T).topk(NUM_FOUND)
    for number, query in enumerate(QUERIES):
        rows = [
            [f"{top.values[number, rank]:.3f} {texts()[top.indices[number, rank]]}" for top in found.values()]
            for rank in range(NUM_FOUND)
        ]
        table(f"Nearest to: {query}", columns, rows)
    original, *spiking = (top.indices for top in found.values())
    same = sum(torch.equal(original, other) for other in spiking)
    show(f"{same} of the {len(spiking)} spiking runs find the original's sentences in the original's order.")


def _embed(network: Callable[..., Any], batches: list[dict[str, Any]]) -> Tensor:
    """Unit vectors [texts, hidden]: the mean of last_hidden_state over the tokens of each text."""
    means = []
    with torch.no_grad():
        for batch in batches:
            means.append(_pool(network(**batch), batch))
    return torch.cat(means)


def _pool(output: Any, batch: dict[str, Any]) -> Tensor:
    """Unit vectors [texts, hidden] of one batch."""
    mask = batch["attention_mask"].unsqueeze(-1)
    means = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def _coverage(snn: fasfx.SpikingModel) -> None:
    """What is and what is not spiking."""
    found = snn.coverage
    show(f"{found.spike_driven_macs:.1%} of multiply-accumulates (linear layers, attention) are spike-driven,")
    show(f"and {found.spike_driven_operators:.1%} of all operators, softmax, norms and activations too.")
    show(f"In float, not spiking: {', '.join(found.float_operators) or 'none'}.")
