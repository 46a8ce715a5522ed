"""The benchmark of the foundation: its tables, its command line, and its parts on tiny models."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fasfx
from fasfx.tools.bench import __main__ as bench
from fasfx.tools.bench import cases, families, foundation, models, sites, tables
from fasfx.tools.bench.tables import Table, at_most, below, between, plain


def test_lines_are_held_to_their_targets() -> None:
    assert [at_most("", [1, 2], limit).met for limit in (1.5, 2)] == [False, True]
    assert [between("", [0.4, value], 0.375, 0.625).met for value in (0.3, 0.625, 0.7)] == [False, True, False]
    assert [below("", [1, value], (2, 2), "less").met for value in (1, 2)] == [True, False]
    assert at_most("", [math.nan], 1).met is False and between("", [math.nan], 0, 1).met is False
    assert plain("", [1]).met is None


def test_a_table_is_aligned_markdown() -> None:
    lines = [at_most("T = 3", [0.0123456, 0.03], 0.025, "{:.2%}"), plain("T = 12", [0.5, math.nan], "{:.1f}")]
    assert tables.markdown(Table("Title", ("", "one", "two"), lines, "Note.")).splitlines() == [
        "### Title",
        "",
        "|        |    one |    two |  target |     |",
        "| ------ | -----: | -----: | ------: | --: |",
        "| T = 3  | 1.23 % | 3.00 % | ≤ 2.5 % |   ✗ |",
        "| T = 12 |    0.5 |      – |         |     |",
        "",
        "Note.",
    ]
    assert tables.missed([Table("Title", ("", "one"), lines)]) == ["Title: T = 3"]


def _part(value: float) -> foundation.Part:
    def part(quick: bool) -> Iterator[Table]:
        yield Table("Title", ("", "value"), [at_most("x", [value], 2.0 if quick else 1.0)])

    return part


@pytest.mark.parametrize(("value", "quick", "code"), [(1.0, False, 0), (1.5, False, 1), (1.5, True, 0)])
def test_exit_code_and_json(
    value: float,
    quick: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(foundation, "PARTS", {"one": _part(value), "other": _part(9.0)})
    file = tmp_path / "figures.json"
    assert bench.main(["foundation", "--only", "one", "--json", str(file), *["--quick"] * quick]) == code
    (table,) = json.loads(file.read_text("utf-8"))
    assert table["title"] == "Title" and table["lines"][0]["figures"] == [value]
    assert capsys.readouterr().out.splitlines()[-1] == ("- missed: Title: x" if code else "1 of 1 targets met.")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["foundation", "--only", "speed"])
    assert error.value.code == 2
    assert "no part speed: foundation has multi, static, perplexity" in capsys.readouterr().err


def test_families_take_the_error_three_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "errors", lambda name, steps: {step: 0.5**step for step in steps})
    (table,) = families.families(quick=False)
    assert [line.label for line in table.lines] == list(models.TINY)
    assert {(line.figures, line.met) for line in table.lines} == {((0.125,) * 4, True)}


def test_a_quantum_is_the_next_value_that_can_be_sent() -> None:
    multi, radix = ("multi", 1, 4, True), ("radix", 4, 4, True)  # multi sends 0, 1, 2, 4, 8
    values = torch.tensor([2.0, 2.0, 1.0])
    assert sites.compare(torch.tensor([2.0, 4.0, 4.0]), values, multi) == (3, 2, 1)
    assert sites.compare(torch.tensor([2.0, 3.0, 4.0]), values, radix) == (3, 2, 1)


@pytest.mark.slow  # CI runs what it tests: README line 1 or a quick benchmark
@pytest.mark.parametrize("code", ["multi", "radix", "rate"])
def test_counts_of_a_tiny_model_agree_site_by_site(code: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snn = fasfx.convert(models.tiny("bert"), config=fasfx.SpikeConfig().replace(code=code))
    with cases.undisturbed():
        snn.to_onnx(tmp_path / "onnx")
        found = sites.tallies(snn, tmp_path / "onnx", [models.tiny_inputs("bert", seed=5)])
    assert set(found) == {sites.ALONE, sites.WITHIN, sites.BETWEEN}
    for name, row in found.items():
        assert set(row) == set(snn.spikes(**models.tiny_inputs("bert", seed=5)))
        differing = sum(tally.differing for tally in row.values())
        assert differing <= (0 if name != sites.BETWEEN else 1e-2 * sum(tally.compared for tally in row.values()))
        assert sum(tally.beyond for tally in row.values()) == 0
