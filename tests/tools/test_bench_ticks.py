"""The benchmark of the synchronous schedule, on a tiny model: its tables hold what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasfx
from fasfx.tools.bench import cases, models, ticks


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny BERT and random tokens in the place of MiniLM and texts."""
    model = models.tiny("bert")

    def batches(kind: str, *_: Any) -> list[dict[str, torch.Tensor]]:
        return [models.tiny_inputs("bert", seed=len(kind))]

    monkeypatch.setattr(cases, "minilm", lambda: (model, None))
    monkeypatch.setattr(cases, "calibration", batches)
    monkeypatch.setattr(cases, "evaluation", batches)


def test_errors_by_tick_are_those_of_check(tiny_case: None) -> None:
    (table,) = ticks.multi(quick=True)
    assert [line.label.split(" (")[0] for line in table.lines[:8]] == [f"tick {t}" for t in range(1, 9)]
    batch = models.tiny_inputs("bert", seed=len("tales"))
    snn = fasfx.convert(models.tiny("bert"), [batch], fasfx.SpikeConfig.low_latency(8))
    checked = fasfx.check(models.tiny("bert"), snn, [batch], timesteps=range(1, 9)).table
    assert [line.figures[0] for line in table.lines[:8]] == pytest.approx(list(checked["relative_l2"]))
    falls = table.lines[-1]
    assert falls.figures[0] == pytest.approx((checked["relative_l2"][1] / checked["relative_l2"][6]) ** (1 / 5))


def test_rate_lines_are_held_to_the_line_before(tiny_case: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "_errors", lambda snn, batches: [1.0 if t < 127 else 2.0 for t in range(snn.timesteps)])
    monkeypatch.setattr(ticks, "spikes_so_far", lambda snn, batch: [0.5] * snn.timesteps)
    (table,) = ticks.rate(quick=False)
    assert [line.met for line in table.lines[:4]] == [None, True, False, False]


def test_cost_has_a_line_for_torch_and_the_state(tiny_case: None) -> None:
    (table,) = ticks.cost_of_a_tick(quick=True)
    assert [line.label for line in table.lines] == ["torch eager, one tick", "state, MB"]
    assert all(figure > 0 for line in table.lines for figure in line.figures)


def test_few_ticks_are_measured_for_every_setting(tiny_case: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "PERPLEXITY", {})
    errors, spikes = ticks.few(quick=False)
    assert [line.label for line in errors.lines] == [line.label for line in spikes.lines] == [*ticks.SETTINGS]
    one, _, two, both = (line.figures for line in errors.lines)
    assert all(b < 0.5 * a for a, b in zip(one, two, strict=True)) and two != both
    assert spikes.lines[0].figures[0] < spikes.lines[2].figures[0] <= 2 * spikes.lines[0].figures[0]


def test_perplexity_is_over_the_originals_and_held(tiny_case: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.tiny("llama"), models.tiny_inputs("llama")
    monkeypatch.setattr(cases, "smollm2", lambda: (model, None))
    monkeypatch.setattr(ticks, "PERPLEXITY", {"smollm2": {1: 9.0, 12: 1.001}})
    monkeypatch.setattr(ticks.data, "split", lambda kind: ("own", "unseen"))
    monkeypatch.setattr(ticks, "windows_of", lambda tokenizer, texts: [batch])
    (table,) = ticks.perplexity(quick=False)
    assert [line.met for line in table.lines] == [True, *[None] * 10, True]
    assert table.lines[-1].figures == pytest.approx((1.0, 1.0), abs=1e-3)
    monkeypatch.setattr(ticks, "SETTINGS", {"one neuron": {}, ticks.BOTH: ticks.SETTINGS[ticks.BOTH]})
    *_, ratios = ticks.few(quick=False)
    assert [line.met is None for line in ratios.lines] == [True, False]
    assert abs(ratios.lines[-1].figures[-1] - 1) < abs(ratios.lines[0].figures[-1] - 1)
