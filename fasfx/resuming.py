"""Progress of long work on disk: written whole or not at all, read again after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fasfx.errors import CheckpointError

FILE = "progress.pt"


class Saved:
    """A folder that holds where a piece of work is; without a folder nothing is kept.

    recipe: what the work is, as plain data; progress of another one raises CheckpointError.
    """

    def __init__(self, folder: str | Path | None, recipe: dict[str, Any]) -> None:
        self._file = None if folder is None else Path(folder) / FILE
        self._recipe = json.dumps(recipe, sort_keys=True)

    def load(self) -> dict[str, Any]:
        """What `save` wrote last; {} for nothing. Plain data and tensors only, no code."""
        if self._file is None or not self._file.exists():
            return {}
        try:
            found = torch.load(self._file, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self._file} is damaged: delete it to begin anew") from error
        if not isinstance(found, dict) or "state" not in found or found.get("recipe") != self._recipe:
            raise CheckpointError(f"{self._file} is the progress of other work: delete it to begin anew")
        return dict(found["state"])

    def save(self, state: dict[str, Any]) -> None:
        """Keep plain data and tensors."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(".new")
        torch.save({"recipe": self._recipe, "state": state}, beside)
        beside.replace(self._file)

    def done(self) -> None:
        """Forget it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
