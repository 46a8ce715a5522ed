"""What the command line reads and writes: models, tokenizers, files of texts, folders for results."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fasfx.checkpoint import SETTINGS, WEIGHTS
from fasfx.errors import CalibrationError, CheckpointError
from fasfx.writing import written_beside

CONFIG = "config.json"


def load_model(source: str) -> tuple[PreTrainedModel, list[str]]:
    """(the model of a local folder or hub id, float32, in eval mode; names of weights that its files lack).

    The class is the one its config names. Raises CheckpointError for what is no model, with the next step.
    """
    import torch
    from transformers import AutoConfig

    _check_place(source)
    try:
        config = AutoConfig.from_pretrained(source)
        settings: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = _class_of(config).from_pretrained(source, **settings)
    except Exception as error:  # whatever transformers stumbles over: the folder is not one it can load
        raise CheckpointError(
            f"{source} cannot be loaded as a model: {_first_line(error)}; "
            "give a folder that save_pretrained wrote, or the id of a model on the hub"
        ) from error
    model.train(False)
    return model, sorted(info["missing_keys"])


def _check_place(source: str) -> None:
    """Raise CheckpointError for a path that cannot be a model folder; a hub id passes."""
    folder = Path(source)
    if folder.is_dir():
        if (folder / SETTINGS).exists():
            raise CheckpointError(f"{source} is a spiking checkpoint: give the original model's folder or id here")
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{source} is no model: it has no {CONFIG}; give one that save_pretrained wrote")
    elif folder.exists():
        raise CheckpointError(f"{source} is a file: give the folder that holds the model")
    elif source.startswith((".", "/", "~")) or not re.fullmatch(r"[^/]+(/[^/]+)?", source):
        raise CheckpointError(f"there is no folder {source}: give a model's folder or its id on the hub")


def _class_of(config: Any) -> Any:
    import transformers

    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((kind for kind in named if kind is not None), transformers.AutoModel)


def read_texts(file: Path) -> list[str]:
    """One text per line, or per JSON line its "text", or the column of that name of a .csv file.

    Raises CalibrationError naming the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CalibrationError(f"cannot read {file}: {why}; give a .txt file, one text per line, or .jsonl") from error
    if file.suffix == ".csv":
        return _column(file, lines)
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    texts = [_text(file, *one) if file.suffix == ".jsonl" else one[1] for one in numbered]
    if not any(texts):
        raise CalibrationError(f"{file} holds no texts: write one per line")
    return [text for text in texts if text]


def _column(file: Path, lines: list[str]) -> list[str]:
    rows = [*csv.DictReader(lines)]
    if not rows or not any(row.get("text") for row in rows):
        raise CalibrationError(f'{file} holds no texts: its first line must name a column "text"')
    return [row["text"] for row in rows if row.get("text")]


def check_target(folder: Path) -> None:
    """Raise CheckpointError, before any work, if a folder cannot be written or holds another model."""
    folder = folder.absolute()
    if (folder / WEIGHTS).exists() and not (folder / SETTINGS).exists():
        raise CheckpointError(f"{folder} holds a model that would be overwritten: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: choose a folder")
    try:
        with tempfile.TemporaryDirectory(dir=next(above for above in folder.parents if above.exists())):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}; choose another folder") from error


def save(snn: Any, tokenizer: Any | None, out: Path) -> None:
    """Network and tokenizer together or neither."""
    with written_beside(out) as staging:
        try:
            snn.save_pretrained(staging)
        except CheckpointError as error:
            raise error.__cause__ or error from None  # written_beside names the folder the user gave
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def _text(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise CalibrationError(f'{file}, line {number}: give one object per line such as {{"text": "..."}}')
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
