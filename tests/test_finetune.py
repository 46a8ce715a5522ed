"""`fasfx finetune` and `fasfx tune`: what they read, write and say, and exit code 2 with one error for bad input."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import assert_refused, run, word_piece
from test_training import classifier, inputs, original, text
from torch import Tensor
from transformers import AutoTokenizer

import fasfx
from fasfx.datasets import Labelled, blocks, examples, read_labelled, split
from fasfx.errors import DataError
from fasfx.program import facts
from fasfx.resuming import FILE

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
CLASSES = ("consonants", "vowels")
FAST = ("--preset", "fas", "--timesteps", 4, "--length", 16, "--batch", 8)
TRAINING = (*FAST, "--task", "classification", "--epochs", 2, "--lr", "1e-2", "--seed", 3)


def labelled(number: int, seed: int) -> list[dict[str, str]]:
    """Texts of five letters, vowels or consonants, that a bag of letters tells apart."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for at in range(number):
        letters = "aeiou" if at % 2 else "bcdfg"
        picked = torch.randint(0, 5, (5,), generator=generator).tolist()
        rows.append({"text": " ".join(letters[n] for n in picked), "label": CLASSES[at % 2]})
    return rows


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv(rows: list[dict[str, str]]) -> str:
    return "label,text\n" + "".join(f'{row["label"]},"{row["text"]}"\n' for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ (BERT without a head), head/ (with one for three classes), lm/, all with a tokenizer; data files."""
    folder = tmp_path_factory.mktemp("finetune")
    head = classifier(hidden_dropout_prob=0.1)
    for name, model in (("model", head.bert), ("head", head), ("lm", original("llama")[0])):
        model.save_pretrained(folder / name)
        word_piece().save_pretrained(folder / name)
    head.save_pretrained(folder / "bare")
    fasfx.convert(head, [inputs(text())]).save_pretrained(folder / "spiking")
    word_piece().save_pretrained(folder / "spiking")
    rows, other = labelled(48, seed=0), labelled(24, seed=1)
    (folder / "data.jsonl").write_text(jsonl(rows))
    (folder / "data.csv").write_text(csv(rows))
    (folder / "other.jsonl").write_text(jsonl(other))
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in other) + "\n")
    return folder


def finetune(place: Path, out: Path, *options: Any, model: str = "model", data: str = "data.jsonl") -> Any:
    return run("finetune", place / model, "-o", out, "--data", place / data, *options)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, str]:
    """(what `fasfx finetune` wrote, what it said)"""
    result = finetune(place, place / "out", *TRAINING, "--evaluation", place / "other.jsonl")
    assert result.exit_code == 0, result.output
    return place / "out", result.stdout


# --- finetune ---------------------------------------------------------------------------------------------


def accuracy(snn: fasfx.SpikingModel, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    found = snn(**{name: tokens[name] for name in snn.input_names}).logits.argmax(-1).tolist()
    return sum(snn.config.id2label[n] == row["label"] for n, row in zip(found, rows, strict=True)) / len(rows)


def test_classification_gives_a_network_that_knows_its_classes(trained: tuple[Path, str]) -> None:
    out, said = trained
    snn = fasfx.SpikingModel.from_pretrained(out)
    assert snn.config is not None and snn.config.id2label == dict(enumerate(CLASSES))
    assert snn.spike_config == fasfx.SpikeConfig.fas(timesteps=4) and facts(snn.ranged).trained == 4
    assert all(site.theta is not None for site in facts(snn.ranged).sites.values())
    shares = re.search(r"accuracy on data not trained on: ([\d.]+)% stage I, ([\d.]+)% spiking", said)
    assert shares is not None and float(shares[1]) > 90
    reached = accuracy(snn, AutoTokenizer.from_pretrained(out), labelled(24, seed=1))
    assert float(shares[2]) == pytest.approx(100 * reached, abs=0.01)
    assert f"saved in {out}" in said and "SpikingModel(rate, T=4, synchronous, 1 sites" in said
    assert not out.with_name("out.training").exists()


def test_a_csv_file_is_read_as_the_same_data(place: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    result = finetune(place, tmp_path / "out", *TRAINING, "--evaluation", place / "other.jsonl", data="data.csv")
    assert result.exit_code == 0, result.output
    assert_same(weights(tmp_path / "out"), weights(trained[0]))


def test_language_modelling_learns_from_the_model_itself(place: Path, tmp_path: Path) -> None:
    task = ("--task", "language-modelling", "--distill", "--epochs", 1, "--length", 8)
    result = finetune(place, tmp_path / "out", *FAST, *task, model="lm", data="texts.txt")
    assert result.exit_code == 0, result.output
    found = re.search(r"perplexity on data not trained on: ([\d.]+) stage I, ([\d.]+) spiking", result.stdout)
    assert found is not None and 1 < float(found[1]) < 1000
    snn, ids = fasfx.SpikingModel.from_pretrained(tmp_path / "out"), torch.randint(5, 83, (2, 8))
    assert snn(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 8, 128)
    assert not any("teacher" in name for name in weights(tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_through_time_the_ticks_learn_and_not_their_closed_form(place: Path, tmp_path: Path) -> None:
    task = ("--task", "language-modelling", "--epochs", 1, "--length", 8, "--code", "rate", "--timesteps", 3)
    task = (*task, "--schedule", "synchronous")
    said = []
    for name, ways in (("closed", ()), ("ticks", ("--through-time",))):
        result = finetune(place, tmp_path / name, *task, *ways, model="lm", data="texts.txt")
        assert result.exit_code == 0, result.output
        found = re.search(r"perplexity on data not trained on: ([\d.]+) stage I, ([\d.]+) spiking", result.stdout)
        assert found is not None
        said.append([float(number) for number in found.groups()])
    closed, ticks = said
    assert ticks[1] == pytest.approx(ticks[0], rel=1e-3) and closed[1] != pytest.approx(closed[0], rel=1e-3)


def watch(patch: pytest.MonkeyPatch, stop: tuple[str, int] | None = None) -> list[tuple[str, int]]:
    """Every step that the command reports; interrupted at one of them, as by Ctrl-C."""
    seen: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def progress() -> Iterator[Callable[[str, int, int | None], None]]:
        def report(stage: str, done: int, total: int | None) -> None:
            seen.append((stage, done))
            if (stage, done) == stop:
                raise KeyboardInterrupt

        yield report

    patch.setattr("fasfx.cli.progress", progress)
    return seen


def test_a_killed_finetune_goes_on_where_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*TRAINING, "--evaluation", place / "other.jsonl")
    watch(monkeypatch, stop=("train", 8))
    assert finetune(place, tmp_path / "out", *given).exit_code not in (0, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.training"]
    for other in (("--spikes", "0.1"), ("--lr", "1e-3"), ("--timesteps", 3), ("--code", "multi"), ("--seed", 4)):
        refused = finetune(place, tmp_path / "out", *given, *other)
        assert_refused(refused, "out.training holds a run with other options: give those, or delete it")
    seen = watch(monkeypatch)
    assert finetune(place, tmp_path / "out", *given).exit_code == 0
    assert [done for stage, done in seen if stage == "train"] == [8, 9, 10, 11, 12]  # of 48 rows by 8, twice
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


# --- tune -------------------------------------------------------------------------------------------------


def test_tune_writes_a_tuned_network_and_prints_its_table(
    place: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    out, result = trained[0], tmp_path / "tuned"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    done = run("tune", out, "--data", place / "texts.txt", "-o", result, "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    tuned = fasfx.SpikingModel.from_pretrained(result)
    assert facts(tuned.ranged).tuned == 4 and tuned.tuning is not None
    assert AutoTokenizer.from_pretrained(result)("a b")["input_ids"] == word_piece()("a b")["input_ids"]
    shown = re.search(r"│ mean +│ +│ ([\d.]+)% +│ ([\d.]+)% +│ ([\d.]+)% +│", done.stdout)
    assert shown is not None
    means = [100 * float(tuned.tuning[stage].mean()) for stage in ("before", "layer", "neuron")]
    assert [float(share) for share in shown.groups()] == pytest.approx(means, abs=1e-4)
    assert means[0] >= means[1] >= means[2] and f"saved in {result}" in done.stdout


def test_tune_in_place_of_a_sequential_network_at_another_t(place: Path, tmp_path: Path) -> None:
    config = fasfx.SpikeConfig(nonlinear="exact")
    fasfx.convert(classifier(), [inputs(text())], config).save_pretrained(tmp_path / "out")
    word_piece().save_pretrained(tmp_path / "out")
    given = ("--timesteps", 2, "--stages", "layer", "--epochs", 1)
    done = run("tune", tmp_path / "out", "--data", place / "texts.txt", *given)
    assert done.exit_code == 0, done.output
    assert f"note: {tmp_path / 'out'} was sequential" in done.stderr and len(done.stderr.splitlines()) == 1
    tuned = fasfx.SpikingModel.from_pretrained(tmp_path / "out")
    assert (tuned.schedule, tuned.timesteps, facts(tuned.ranged).tuned) == ("synchronous", 2, 2)
    assert tuned.tuning is not None and "neuron" not in tuned.tuning


def test_a_killed_tune_goes_on(
    place: Path, trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = trained[0]
    # at T = 4, which stage I had, there is nothing to tune
    given = ("tune", out, "--data", place / "texts.txt", "--epochs", 2, "--timesteps", 3)
    assert run(*given, "-o", tmp_path / "whole").exit_code == 0
    watch(monkeypatch, stop=("tune, neuron", 3))  # of two batches that are not held out
    assert run(*given, "-o", tmp_path / "out").exit_code not in (0, 2)
    assert [file.name for file in (tmp_path / "out.tuning").iterdir()] == [FILE] and not (tmp_path / "out").exists()
    assert_refused(run(*given, "-o", tmp_path / "out", "--spikes", "0.5"), "is the progress of other work: delete it")
    seen = watch(monkeypatch)
    assert run(*given, "-o", tmp_path / "out").exit_code == 0
    assert [step for step in seen if step[0].startswith("tune")] == [("tune, neuron", 3), ("tune, neuron", 4)]
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert not (tmp_path / "out.tuning").exists()


# --- data -------------------------------------------------------------------------------------------------


def test_classes_are_sorted_by_size_where_all_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(jsonl([{"text": "a", "label": 10}, {"text": "b", "label": "2"}]) + "\n")
    assert read_labelled(file) == Labelled(["a", "b"], ["10", "2"])
    assert read_labelled(file).classes == ["2", "10"]
    assert Labelled(["a", "b"], ["x", "10"]).classes == ["10", "x"]


def test_examples_and_blocks_are_what_a_model_reads() -> None:
    data, tokenizer = Labelled(["a b c", "d"], ["yes", "no"]), word_piece()
    rows = examples(tokenizer, data, ["no", "yes"], 4, ["input_ids", "attention_mask", "labels"])
    assert rows[0]["input_ids"] == tokenizer("a b c")["input_ids"][:3] + [tokenizer.sep_token_id]
    assert rows[1] == {"input_ids": tokenizer("d")["input_ids"], "attention_mask": [1, 1, 1], "labels": 0}
    with pytest.raises(DataError, match="class 'yes' is not among those trained for: no"):
        examples(tokenizer, data, ["no"], 4, [])
    stream = tokenizer("a b c d e f g", add_special_tokens=False)["input_ids"]
    found = blocks(tokenizer, ["a b c", "d e f g"], 3)
    assert [row["input_ids"] for row in found] == [row["labels"] for row in found] == [stream[:3], stream[3:6]]
    with pytest.raises(DataError, match="7 tokens: two blocks of 4 are needed"):
        blocks(tokenizer, ["a b c", "d e f g"], 4)


def test_the_last_tenth_is_kept_apart() -> None:
    rows = [{"row": at} for at in range(25)]
    assert split(rows) == (rows[:-2], rows[-2:]) and split(rows[:3]) == (rows[:2], rows[2:3])


# --- bad input --------------------------------------------------------------------------------------------

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
# name: (file, content or None for no file, words of the error)
FILES: dict[str, tuple[str, str | bytes | None, str]] = {
    "no label": ("bad.jsonl", jsonl([*ROWS, {"text": "c"}]), "bad.jsonl, line 3: no label"),
    "empty label": ("bad.jsonl", jsonl([{"text": "c", "label": " "}]), "bad.jsonl, line 1: no label"),
    "label that is no name": ("bad.jsonl", jsonl([{"text": "c", "label": 0.5}]), "bad.jsonl, line 1: no label"),
    "empty text": ("bad.jsonl", jsonl([*ROWS, {"text": " ", "label": "x"}]), "bad.jsonl, line 3: no text"),
    "no text": ("bad.jsonl", jsonl([{"txt": "a", "label": "x"}]), "bad.jsonl, line 1: no text"),
    "no object": ("bad.jsonl", jsonl([ROWS[0], [1]]), "bad.jsonl, line 2: no object"),
    "no JSON": ("bad.jsonl", "\n" + jsonl(ROWS) + "{\n", "bad.jsonl, line 4: not JSON"),
    "one class": ("bad.jsonl", jsonl(ROWS[:1] * 3), "one class only, 'x'"),
    "nothing": ("bad.jsonl", "\n", "no examples"),
    "no label column": ("bad.csv", "text,class\na,x\n", "bad.csv, line 2: no label"),
    "short line": ("bad.csv", "text,label\na,x\nb\n", "bad.csv, line 3: no label"),
    "suffix": ("bad.txt", jsonl(ROWS), ".jsonl or .csv"),
    "no file": ("none.jsonl", None, "No such file"),
    "no UTF-8": ("bad.csv", b"text,label\n\xff\xfe,x\n", "not UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_data_that_cannot_be_used(case: str, place: Path, tmp_path: Path) -> None:
    name, content, words = FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(finetune(place, tmp_path / "out", *TRAINING, data=str(tmp_path / name)), words)
    assert not (tmp_path / "out").exists()


def test_evaluation_of_a_class_that_was_not_trained(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(jsonl([*ROWS, {"text": "c", "label": "vowels"}]))
    result = finetune(place, tmp_path / "out", *TRAINING, "--evaluation", tmp_path / "other.jsonl")
    assert_refused(result, "class 'x' is not among those trained for: consonants, vowels")


def test_evaluation_may_hold_one_of_the_trained_classes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(jsonl(labelled(8, seed=1)[1::2]))
    given = ("--evaluation", tmp_path / "other.jsonl", "--epochs", 0.2)
    result = finetune(place, tmp_path / "out", *TRAINING, *given)
    assert result.exit_code == 0 and "accuracy on data not trained on" in result.stdout, result.output


def choices(place: Path) -> dict[str, tuple[tuple[Any, ...], str]]:
    """name: (arguments of `fasfx finetune`, words of the error)"""
    model, lm, data = place / "model", place / "lm", ("--data", place / "data.jsonl")
    classes, words = ("--task", "classification", *data), ("--task", "language-modelling")
    return {
        "task": ((model, *data, "--task", "translation"), "choose one of classification, language-modelling"),
        "no teacher": (
            (model, *classes, "--distill"),
            "weights of {model} are new: classifier.bias, classifier.weight",
        ),
        "no ticks": (
            (model, *classes, "--through-time"),
            'what trains without it; set schedule="synchronous"',
        ),
        "teacher of other classes": ((place / "head", *classes, "--distill"), "are new: classifier.bias"),
        "no tokenizer": ((place / "bare", *classes), "has no tokenizer"),
        "no model": (("./nowhere", *classes), "nowhere"),
        "encoder": (
            (model, *words, "--data", place / "texts.txt", "--length", 8),
            "{model} reads the tokens that it is to predict: language modelling needs a causal model",
        ),
        "spiking checkpoint": ((place / "spiking", *classes), "{model} is a spiking checkpoint: give the original"),
        "too short": ((lm, *words, "--data", place / "texts.txt", "--length", 100), "two blocks of 100 are needed"),
        "no texts": ((lm, *words, "--data", place / "none.txt"), "No such file"),
        "code": ((model, *classes, "--code", "morse"), "choose one of 'multi', 'radix', 'rate'"),
    }


CHOICES = ("task", "no teacher", "teacher of other classes", "no tokenizer", "no model", "too short", "no texts")
CHOICES += ("code", "encoder", "no ticks", "spiking checkpoint")


@pytest.mark.parametrize("case", CHOICES)
def test_choices_that_make_no_sense(case: str, place: Path, tmp_path: Path) -> None:
    assert {*choices(place)} == {*CHOICES}
    (model, *options), words = choices(place)[case]
    assert_refused(run("finetune", model, "-o", tmp_path / "out", *options), words.format(model=model))
    assert [*tmp_path.iterdir()] == []


def test_without_accelerate_the_pip_command_is_named(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    assert_refused(finetune(place, tmp_path / "out", *TRAINING), "pip install 'fasfx[train]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["model", "data.jsonl"])
def test_out_that_must_not_be_written(target: str, place: Path) -> None:
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert_refused(finetune(place, place / target, *TRAINING), target)
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_tuning_that_cannot_be_done(place: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    out, texts = trained[0], place / "texts.txt"
    bare = Path(shutil.copytree(out, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    (tmp_path / "few.txt").write_text("a\nb\n")
    target = ("-o", tmp_path / "tuned")
    before = {file: file.read_bytes() for file in out.iterdir()}
    for arguments, words in (
        ((out, "--data", tmp_path / "few.txt", *target), "1 batches: tuning needs two at least"),
        ((out, "--data", tmp_path / "none.txt", *target), "No such file"),
        ((out, "--data", texts, "--stages", "layer,network", *target), "choose one or more of 'layer', 'neuron'"),
        ((out, "--data", texts, "--stages", "", *target), "choose one or more of 'layer', 'neuron'"),
        ((out, "--data", texts, "--timesteps", -1, *target), "timesteps=-1"),
        ((bare, "--data", texts, *target), "has no tokenizer"),
        ((place / "model", "--data", texts, *target), "spike_config.json"),
        ((out, "--data", texts, "-o", place / "model"), "would be overwritten"),
    ):
        assert_refused(run("tune", *arguments), words)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bare", "few.txt"]


# --- what readers found --------------------------------------------------------------------------------


def test_a_refused_finetune_leaves_nothing_and_does_not_block_the_next(place: Path, tmp_path: Path) -> None:
    assert_refused(finetune(place, tmp_path / "out", *TRAINING, "--distill"), "are new")
    assert list(tmp_path.iterdir()) == []
    result = finetune(place, tmp_path / "out", *TRAINING)
    assert result.exit_code == 0, result.output


def test_a_killed_finetune_ends_in_the_same_weights(
    place: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*TRAINING, "--evaluation", place / "other.jsonl")
    watch(monkeypatch, stop=("train", 8))
    assert finetune(place, tmp_path / "out", *given).exit_code not in (0, 2)
    watch(monkeypatch)
    assert finetune(place, tmp_path / "out", *given).exit_code == 0
    assert_same(weights(tmp_path / "out"), weights(trained[0]))


def test_progress_of_tune_outlives_a_failed_save(
    place: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    given = ("tune", trained[0], "--data", place / "texts.txt", "-o", tmp_path / "out", "--epochs", 1)
    assert_refused(run(*given), "No space left")
    assert (tmp_path / "out.tuning" / FILE).exists()
    monkeypatch.undo()
    assert run(*given).exit_code == 0 and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_cut_short_is_passed_over(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, stop=("train", 8))
    assert finetune(place, tmp_path / "out", *TRAINING).exit_code not in (0, 2)
    seen = watch(monkeypatch)
    broken = tmp_path / "out.training" / "checkpoint-9999"  # newer than any, its last file missing
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"")
    assert finetune(place, tmp_path / "out", *TRAINING).exit_code == 0
    assert min(done for stage, done in seen if stage == "train") > 1  # it did not begin anew
