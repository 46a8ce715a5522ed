"""The benchmark of the integer form, on a tiny model: what it measures and what it holds to its targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasfx import ops
from fasfx.tools.bench import cases, exports, models, peers, speed
from fasfx.tools.bench.timing import Ratio


@pytest.mark.slow  # CI runs what it tests: README line 1 or a quick benchmark
def test_every_form_is_timed_and_the_files_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny BERT in the place of MiniLM, tokens of its vocabulary."""
    model = models.tiny("bert")

    def batches(kind: str, *_: Any) -> list[dict[str, torch.Tensor]]:
        return [models.tiny_inputs("bert", seed=len(kind))]

    def tokens(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        return models.tiny_inputs("bert", batch_size=shape[0], length=shape[1])

    monkeypatch.setattr(cases, "minilm", lambda: (model, None))
    monkeypatch.setattr(cases, "calibration", batches)
    monkeypatch.setattr(cases, "evaluation", batches)
    monkeypatch.setattr(speed, "_tokens", tokens)
    memory, times, embeddings, built = speed.minilm(quick=True)
    names = {exports.DYNAMIC, exports.INTEGER, exports.FLOAT, "original, opset 18", "original, opset 23"}
    assert {line.label for line in times.lines} == names
    for table in (times, memory):
        assert min(line.figures[0] for line in table.lines if line.label.startswith("original")) == 1
    assert {line.label for line in memory.lines} == names
    held = {line.label: line for line in built.lines}
    assert held["integer form: bytes / original's"].target == "≤ 0.3"
    assert 0 < held["integer form: bytes / original's"].figures[0] < 1
    cosines = {line.label: line.figures[0] for line in embeddings.lines}
    assert cosines["torch"] == pytest.approx(cosines["ONNX Runtime"], abs=1e-3) and cosines["torch"] > 0.99


@pytest.mark.parametrize(("figure", "dynamic", "met"), [(0.5, 0.6, True), (0.5, 0.45, False), (0.56, 0.6, False)])
def test_the_integer_form_is_held_to_its_limit_and_to_dynamic_int8(figure: float, dynamic: float, met: bool) -> None:
    rows = {
        name: [Ratio(median, median, median)]
        for name, median in ((exports.INTEGER, figure), (exports.DYNAMIC, dynamic))
    }
    line = speed._line(exports.INTEGER, rows, [0.55], 1.0)
    assert line.met is met and "0.55" in line.target


def test_the_if_loop_sends_rounded_activations() -> None:
    """For constant input the mean of T steps is QCFS with L = T."""
    neuron, x = peers.IntegrateAndFire(2.0), torch.tensor([-1.0, 0.1, 0.7, 1.9, 5.0])
    sent = torch.stack([neuron(x) for _ in range(peers.IF_STEPS)]).mean(0)
    assert torch.equal(sent, ops.qcfs.op(x, torch.tensor(2.0), "rate", peers.IF_STEPS, 1, False))


def test_every_peer_is_timed_and_spikingjellys_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("bert")
    monkeypatch.setattr(cases, "minilm", lambda: (model, None))
    monkeypatch.setattr(cases, "calibration", lambda *_, **__: [models.tiny_inputs("bert")])
    monkeypatch.setattr(cases, "evaluation", lambda *_: [models.tiny_inputs("bert")])
    monkeypatch.setattr(peers, "_spikingjelly", lambda *_: "SpikingJelly says no.")
    (table,) = peers.peers(quick=True)
    times = {line.label: line.figures[0] for line in table.lines}
    assert len(times) == 4 and times["original"] == 1
    assert "SpikingJelly says no." in table.note
