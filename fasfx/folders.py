"""What the command line reads and writes: models, tokenizers, files of texts, folders for results."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fasfx.checkpoint import SETTINGS, WEIGHTS
from fasfx.errors import CheckpointError
from fasfx.writing import written_beside

CONFIG = "config.json"


def load_model(source: str) -> tuple[PreTrainedModel, list[str]]:
    """(the model of a local folder or hub id, float32, in eval mode; names of weights that its files lack).

    The class is the one its config names. Raises CheckpointError for what is no model, with the next step.
    """
    import torch
    from transformers import AutoConfig

    check_place(source)
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


def check_place(source: str) -> None:
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
