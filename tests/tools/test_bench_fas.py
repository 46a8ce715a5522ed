"""The benchmark of FAS on tiny models: rows, targets, wall times, the deployed network, SpikingJelly, what is kept."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fasfx
from fasfx.errors import MissingDataError
from fasfx.tools.bench import by_ticks, cases, data, fas, jelly, recipes, tasks, trained
from fasfx.tools.bench.by_ticks import Judge
from fasfx.tools.bench.models import tiny
from fasfx.tools.bench.recipes import SEQUENTIAL, SPIKES, TUNED, Case, Target
from fasfx.tools.bench.tables import Table
from fasfx.tools.bench.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


def classifier(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SHAPE, vocab_size=128, max_position_embeddings=32)).eval()


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Token ids whose first decides the class."""
    ids = torch.randint(4, 128, (number, 6), generator=torch.Generator().manual_seed(seed))
    labels = (ids[:, 0] > 64).long()
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": int(label)}
        for row, label in zip(ids, labels, strict=True)
    ]


def collate(given: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in given]) for name in given[0]}


def spoken(given: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(given)
    return batch | {"labels": batch["input_ids"]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Tiny tasks in the place of the real ones, and an empty place for what is trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sentences = Task("sentences", classifier, rows(40), rows(16, seed=1), collate, "accuracy", size=8)
    speech = Task("speech", lambda _: tiny("llama"), rows(40), rows(8, seed=1), spoken, "perplexity", size=2)
    monkeypatch.setitem(tasks.TASKS, "valence", lambda: sentences)
    monkeypatch.setitem(tasks.TASKS, "language", lambda: speech)
    monkeypatch.setitem(recipes.ORIGINAL, "valence", (1, 1e-3))
    monkeypatch.setattr(trained, "tune", partial(fasfx.tune, epochs=1))
    return tmp_path / "fasfx" / "trained"


def labelled(table: Table) -> dict[str, tuple[float, ...]]:
    return {line.label: line.figures for line in table.lines}


CASE = Case(
    "valence", "multi", "matmul", 1, (1, 2), (Target(TUNED, 1, loss=1.0), Target(SPIKES, 2, most=0.0)), 1, tuning=2
)


@pytest.mark.slow  # CI runs what it tests: README line 1 or a quick benchmark
def test_a_classification_has_four_tables_and_is_trained_once(small: Path) -> None:
    whole, times, deployed, beside = by_ticks.tables(CASE, quick=False)
    figures, seconds = labelled(whole), labelled(times)
    assert whole.columns == times.columns == ("", "T = 1", "T = 2") and figures.keys() == seconds.keys()
    for name in ("uncalibrated", TUNED, SEQUENTIAL, SPIKES):
        assert all(second > 0 for second in seconds[name]), name
    assert all(math.isnan(second) for second in seconds["alignment error, layer"])
    assert all(0 < share <= 1 for share in figures[TUNED])
    met = {line.label: line.met for line in whole.lines if line.met is not None}
    assert met == {TUNED: True, SPIKES: False} and "s to train)" in whole.note

    columns = labelled(deployed)
    assert deployed.columns == ("", f"loop, {TUNED}, T = 1", f"closed form, {SEQUENTIAL}, T = 1")
    assert columns["same predictions"] == (1, 1) and columns["accuracy in torch"] == columns["accuracy in ONNX Runtime"]
    assert all(line.met for line in deployed.lines if line.met is not None)

    told = labelled(beside)
    equivalent, approximating = (told[f"SpikingJelly 2, {name}"] for name in jelly.RECIPES)
    assert equivalent[:3] == pytest.approx((told["fine-tuned original"][0], 0, jelly.STEPS), abs=1e-4)
    assert "TransformerTDEquivalentRecipe: 0 of its modules are spiking" in beside.note
    assert all(map(math.isnan, approximating)) and "STATransformerRecipe says: ValueError" in beside.note

    kept = {file: file.stat().st_mtime_ns for file in small.rglob("*.safetensors")}
    again = next(by_ticks.tables(CASE, quick=False))
    assert labelled(again) == figures
    assert {file: file.stat().st_mtime_ns for file in small.rglob("*.safetensors")} == kept


@pytest.mark.parametrize("epochs", [0, 0.5])
def test_language_is_a_ratio_to_the_originals_perplexity(epochs: float, small: Path) -> None:
    case = Case("language", "multi", "matmul", 2, (3,), (Target(TUNED, 3, loss=9.0),), epochs, lr=1e-3, tuning=2)
    whole, times = by_ticks.tables(case, quick=False)
    ratios = labelled(whole)
    assert all(0.5 < ratio < 2 for name in ("uncalibrated", TUNED, SEQUENTIAL) for ratio in ratios[name])
    (target,) = (line.target for line in whole.lines if line.met)
    assert target == "T = 3 ≤ 10" and ("no stage I" in whole.note) == (epochs == 0)
    assert all(second > 0 for second in labelled(times)[TUNED])
    errors = [ratios[f"alignment error, {stage}"] for stage in ("before", "layer", "neuron")]
    tuned = (errors[0] != errors[1]) + (errors[1] != errors[2])
    assert times_measured(small) == 2 + tuned + (epochs > 0)  # uncalibrated, sequential, what changed, and stage I


def times_measured(kept: Path) -> int:
    recipes_kept = [json.loads(file.read_text())["recipe"] for file in kept.glob("*/record.json")]
    return sum("measured" in recipe for recipe in recipes_kept)


def test_what_calibration_leaves_as_it_is_is_not_measured_again(small: Path) -> None:
    """At T = 1 the multi code's first tick is what stage I trained."""
    whole, times = by_ticks.tables(
        Case("language", "multi", "matmul", 1, (1,), (), 0.5, lr=1e-3, tuning=2), quick=False
    )
    figures = labelled(whole)
    assert figures["uncalibrated"] == figures["after layer"] == figures[TUNED]
    assert times_measured(small) == 3  # uncalibrated, sequential, and stage I
    assert all(second > 0 for second in labelled(times)[TUNED])


def test_stage_one_through_time_is_another_recipe_and_reaches_what_its_ticks_say(
    small: Path, recwarn: pytest.WarningsRecorder
) -> None:
    case = Case("language", "multi", "matmul", 2, (2,), (), 1, lr=1e-3, tuning=2)
    closed, ticks = (recipes.made_of(replace(case, through_time=through), 0) for through in (False, True))
    assert closed.of != ticks.of and closed.original.seconds == ticks.original.seconds
    assert torch.accelerator.is_available() or not [w for w in recwarn if "pin_memory" in str(w.message)]
    task = tasks.TASKS["language"]()
    said = [(task.measure(made.trained.model), task.measure(made.snn)) for made in (closed, ticks)]
    assert said[1][0] == pytest.approx(said[1][1], rel=1e-5) and said[0][0] != pytest.approx(said[0][1], rel=1e-5)


def test_few_spikes_of_language_are_held_to_those_of_the_usual_conversion(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fas, "SPARSE_LANGUAGE", replace(recipes.SPARSE_LANGUAGE, tuning=2))
    usual, whole, _ = fas.language_sparse(quick=False)
    (sent,), (few,) = labelled(usual)[SPIKES], (line for line in whole.lines if line.label == SPIKES)
    assert few.target == f"T = 5 ≤ {0.7 * sent:.3f}".rstrip("0") and 0 < few.figures[0] < sent
    (lost,) = (line.target for line in whole.lines if line.label == TUNED)
    assert lost == "T = 5 ≤ 1.005" and "levels 8, granularity channel" in whole.note


def test_a_resumed_training_counts_the_seconds_before_it_was_killed(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(trained, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def fit(model: Any, rows: Any, collate: Any, folder: Path, training: Any, progress: Any) -> None:
        resumed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        now[0] += 7
        progress("train", 1, 2)
        if not resumed:
            raise KeyboardInterrupt

    monkeypatch.setattr(trained, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        trained.original("valence", 0, 1, 1e-3)
    now[0] += 100  # nobody works
    assert trained.original("valence", 0, 1, 1e-3).seconds == 14
    assert trained.original("valence", 0, 1, 1e-3).seconds == 14  # read, not trained again


def test_a_figure_is_measured_again_by_other_code_only(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter((0.5, 0.25, 0.125))
    first = trained.measured(["a", 1], lambda: next(figures))
    assert first[0] == 0.5 and first[1] > 0
    assert trained.measured(["a", 1], lambda: next(figures)) == first
    assert trained.measured(["a", 2], lambda: next(figures))[0] == 0.25
    monkeypatch.setattr(trained, "_code", lambda: "of tomorrow")
    assert trained.measured(["a", 1], lambda: next(figures))[0] == 0.125


def test_a_cell_is_measured_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(Task, "measure", lambda task, network, rows: asked.append(rows) or 30.0)
    judges = [Judge(Task("", classifier, [], [], spoken, "perplexity"), rows, 20.0) for rows in (None, 8)]
    network = torch.nn.Identity()
    first = judges[0].cell(["a", 1], network, 2.0)
    assert first.figure == 1.5 and first.seconds > 2
    assert judges[0].cell(["a", 1], network, 2.0) == first and asked == [None]
    judges[0].cell(["a", 2], network)
    judges[1].cell(["a", 1], network)
    assert asked == [None, None, 8]


def test_every_file_of_the_package_tells_its_code_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = list[Path](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file.resolve()) or original(file))
    trained._code.__wrapped__()
    assert {Path(trained.__file__).resolve(), Path(fasfx.passes.clip.__file__).resolve()} < {*read}


def test_targets_are_losses_against_the_original() -> None:
    task = Task("", classifier, [], [], collate, "accuracy")
    accuracy, ratio = Judge(task, None, 0.8), Judge(Task("", classifier, [], [], spoken, "perplexity"), None, 20.0)
    loss, most = Target(TUNED, 1, loss=0.1), Target(SPIKES, 1, most=0.5)
    assert [accuracy.held(figure, loss).met for figure in (0.69, 0.71)] == [False, True]
    assert [ratio.held(figure, loss).met for figure in (1.09, 1.11)] == [True, False]
    assert [judge.held(figure, most).met for judge in (accuracy, ratio) for figure in (0.4, 0.6)] == [True, False] * 2


def test_a_weight_on_spikes_is_another_recipe(small: Path) -> None:
    longer = replace(CASE, epochs=6, lr=1e-2, settings={"levels": 8})
    plain, sparse = (recipes.made_of(replace(longer, spikes=weight), 0) for weight in (0.0, 20.0))
    assert plain.of != sparse.of and plain.original.seconds == sparse.original.seconds
    assert len([*small.iterdir()]) == 3  # one original, two networks of stage I
    sent = [fasfx.energy(made.snn, tasks.TASKS["valence"]().inputs(rows(8))).spikes for made in (plain, sparse)]
    assert sent[1] < 0.98 * sent[0]


def test_blocks_to_measure_on_are_of_both_kinds_of_text() -> None:
    try:
        task = tasks.language()
    except MissingDataError as error:
        pytest.skip(str(error))
    tokenizer = cases.smollm2()[1]
    assert len(task.test) == tasks.MEASURED
    for row, kind in ((task.test[0], "tales"), (task.test[-1], "books")):
        read = tokenizer.decode(row["input_ids"][20:60]).replace("\n", " ")
        assert read in " ".join(data.split(kind)[1])
