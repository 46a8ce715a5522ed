"""Training data from files: labelled texts (.jsonl, .csv) and plain text, as what transformers.Trainer takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasfx.errors import DataError
from fasfx.text_files import read_rows

Example = dict[str, Any]
EXAMPLE = 'every example needs "text" and "label", a name or a whole number'


@dataclass(frozen=True)
class Labelled:
    """Texts with the name of each one's class."""

    texts: list[str]
    labels: list[str]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted; by size if all are numbers."""
        names = set(self.labels)
        return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def read_labelled(file: Path, least: int = 2) -> Labelled:
    """A .jsonl file of {"text": ..., "label": ...} or a .csv file with these columns.

    least: how many classes there must be; two to train on.
    Raises DataError naming the line: no label, empty text, one class only, no lines, not readable.
    """
    if file.suffix not in (".jsonl", ".csv"):
        raise DataError(f"{file}: labelled texts are read from .jsonl or .csv files")
    texts, labels = [], []
    for number, row in read_rows(file):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{file}, line {number}: no text; {EXAMPLE}")
        if label is None or isinstance(label, dict | list | float) or not str(label).strip():
            raise DataError(f"{file}, line {number}: no label; {EXAMPLE}")
        texts.append(text)
        labels.append(str(label).strip())
    found = Labelled(texts, labels)
    if len(found.classes) < least:
        what = f"one class only, {found.classes[0]!r}" if texts else "no examples"
        raise DataError(f"{file} holds {what}: classification needs examples of two classes at least")
    return found


def examples(tokenizer: Any, data: Labelled, classes: list[str], length: int, names: list[str]) -> list[Example]:
    """Token ids, masks and class numbers; padding is the collator's work. Raises DataError for an unknown class."""
    if unknown := sorted(set(data.labels) - set(classes)):
        raise DataError(f"class {unknown[0]!r} is not among those trained for: {', '.join(classes)}")
    tokens = tokenizer(data.texts, truncation=True, max_length=length)
    columns = {name: values for name, values in tokens.items() if name in names}
    numbers = [classes.index(label) for label in data.labels]
    return [{n: v[i] for n, v in columns.items()} | {"labels": number} for i, number in enumerate(numbers)]


def blocks(tokenizer: Any, texts: list[str], length: int) -> list[Example]:
    """Texts as one stream of tokens, cut into blocks; labels are the tokens themselves (the model shifts them).

    Raises DataError for a stream of fewer than two blocks.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
    cut = [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
    if len(cut) < 2:
        raise DataError(f"{len(stream)} tokens: two blocks of {length} are needed, one of them to measure on")
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)} for ids in cut]


def split(rows: list[Example], share: float = 0.1) -> tuple[list[Example], list[Example]]:
    """(to train on, to measure on): the last `share` of the rows, one at least, is kept apart."""
    held = max(1, round(share * len(rows)))
    return rows[:-held], rows[-held:]
