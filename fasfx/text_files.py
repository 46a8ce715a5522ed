"""Files of texts, UTF-8: .txt (one per line), .jsonl (an object per line), .csv (columns by name)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasfx.errors import DataError


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of every line that is not empty; a line of a .txt file is the column "text".

    Raises DataError for a file that cannot be read, and for a line of .jsonl that is no object, naming it.
    """
    try:
        whole = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"cannot read {file}: {why}; give a .txt file, one text per line, .jsonl or .csv") from error
    if file.suffix == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(whole)))  # of the process; 131,072 characters at first
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(whole.split("\n"), 1):
        if line.strip():
            yield number, _object(file, number, line) if file.suffix == ".jsonl" else {"text": line.strip()}


def read_texts(file: Path) -> list[str]:
    """The texts of a file. Raises DataError, naming the line where there is none."""
    texts = []
    for number, row in read_rows(file):
        if not isinstance(row.get("text"), str):
            raise DataError(
                f'{file}, line {number}: give one object per line such as {{"text": "..."}}, or that column'
            )
        texts.append(row["text"])
    if not any(texts):
        raise DataError(f"{file} holds no texts: write one per line")
    return [text for text in texts if text]


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f'{file}, line {number}: no object; give one per line such as {{"text": "..."}}')
    return found
