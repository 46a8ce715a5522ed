"""Progress of long work on disk: written whole or not at all, read again after a kill."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from fasfx.errors import CheckpointError
from fasfx.writing import written_beside

FILE = "progress.pt"


class Saved:
    """A folder that holds where a piece of work is; without a folder nothing is kept.

    recipe: what the work is, as plain data; progress of another one raises CheckpointError.
    """

    def __init__(self, folder: str | Path | None, recipe: dict[str, Any]) -> None:
        self._folder, self._recipe = None if folder is None else Path(folder), json.dumps(recipe, sort_keys=True)

    def load(self) -> dict[str, Any]:
        """What `save` wrote last; {} for nothing. Plain data and tensors only, no code."""
        if self._folder is None or not (file := self._folder / FILE).exists():
            return {}
        try:
            found = torch.load(file, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} cannot be read: delete it to begin anew") from error
        if not isinstance(found, dict) or "state" not in found or found.get("recipe") != self._recipe:
            raise CheckpointError(f"{file} is the progress of other work: delete it to begin anew")
        return dict(found["state"])

    def save(self, state: dict[str, Any]) -> None:
        """Keep plain data and tensors."""
        if self._folder is not None:
            with written_beside(self._folder) as staging:
                torch.save({"recipe": self._recipe, "state": state}, staging / FILE)


def forget(folder: Path) -> None:
    """Remove the progress of work, once its result is safe."""
    shutil.rmtree(folder, ignore_errors=True)
