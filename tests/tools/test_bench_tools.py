"""The benchmark of the pass tools: it says what was found, and misses its target where something else is wrong."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import fasfx
from fasfx.tools.bench import cases, models, planted, tools


def one_fault(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    fault = dataclasses.replace(planted.FAULTS["threshold"], **changes)
    monkeypatch.setattr(tools, "FAULTS", {"threshold": fault})
    (table,) = tools.faults(quick=True)
    return table.lines


def test_a_fault_is_named_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = one_fault(monkeypatch)
    assert line.met and line.figures[1] == 0 and line.figures[2] <= 5
    assert line.figures[0] > 0 and line.figures[3] > 0


@pytest.mark.parametrize("changes", [{"plant": nullcontext}, {"rule": "radix_neuron"}, {"module": "layer.0"}], ids=str)
def test_another_answer_is_a_wrong_one(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    (line,) = one_fault(monkeypatch, **changes)
    assert not line.met and line.figures[1] == 1


def test_graph_texts_are_run_on_to_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "minilm", lambda: (models.tiny("bert"), None))
    monkeypatch.setattr(cases, "calibration", lambda *_, **__: [models.tiny_inputs("bert")])
    (table,) = tools.texts(quick=False)
    assert [line.label for line in table.lines][::10] == ["0-captured", "10-lower"]
    assert all(line.met and line.figures[1:] == (0, 0) for line in table.lines)


def test_the_reports_time_and_size_are_held_to_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(model: Any, snn: Any, batches: Any, path: Path) -> Path:
        path.write_bytes(bytes(2_500_000))
        return path

    def load() -> Any:
        return models.tiny("bert"), None

    monkeypatch.setattr(tools, "text_batches", lambda *_: [models.tiny_inputs("bert")])
    monkeypatch.setattr(fasfx, "report", written)
    for seconds, opening, met in ((60.0, 1.0, True), (0.0, 1.0, False), (60.0, 2.5, False)):
        monkeypatch.setattr(tools, "REPORTS", {"one": (load, seconds), "two": (load, seconds)})
        monkeypatch.setattr(tools, "_opening", lambda _, opening=opening: opening)
        (table,) = tools.report(quick=True)
        (line,) = table.lines
        assert (line.label, *line.figures[1:], line.met) == ("one", 2.5, opening, met)
