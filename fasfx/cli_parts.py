"""What commands share: options, and the models and texts they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fasfx.errors import CalibrationError
from fasfx.terminal import say

NO_TOKENIZER = "{} has no tokenizer beside it, so {} cannot be read: save the tokenizer there"
SAME_TEXT = (
    "measured on the sentences that `fasfx convert` calibrates on when it is given no --calibration; "
    "--data FILE measures on text of your own"
)
TEXTS = ".txt with one text per line, .jsonl or .csv"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its id on the hub.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `fasfx convert` wrote.")]
Data = Annotated[Path | None, typer.Option(help=f"Texts to measure on: {TEXTS}.")]


def load(source: str) -> Any:
    """The model of a folder or hub id, with a warning for weights that its files lack."""
    from fasfx.folders import load_model

    model, missing = load_model(source)
    if missing:
        say("warning", "yellow", f"{source} lacks weights, which are random now: {', '.join(missing[:5])}")
    return model


def evaluation(model: Any, source: str, texts: list[str] | None, few: int | None = None) -> list[dict[str, Any]]:
    """Batches to measure on: of these texts, else of the shipped sentences (the first few), else random inputs."""
    from fasfx.calibration import default_batches, sentences, text_batches, tokenizer_beside

    tokenizer = tokenizer_beside(source)
    if tokenizer is None:
        if texts is not None:
            raise CalibrationError(NO_TOKENIZER.format(source, "--data"))
        return default_batches(model)
    if texts is None:
        say("note", "cyan", SAME_TEXT)
    return text_batches(model, tokenizer, texts or sentences()[:few])
