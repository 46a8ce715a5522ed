"""Writing a folder so that nothing is ever left half written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasfx.errors import CheckpointError


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A fresh folder beside the target that takes its place at the end; removed if anything fails.

    Files of an existing target that have no successor stay.

    Raises CheckpointError for a full disk, a read-only place, or a target that is a file.
    """
    staging: Path | None = None
    folder = folder.absolute()
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: choose a folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield staging
        _open_up(staging)
        if folder.exists():
            _exchange(folder, staging)
        else:
            os.replace(staging, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; nothing there was changed") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _open_up(staging: Path) -> None:
    """The permissions any new file would have: temporary folders, and safetensors' files, are the owner's only."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(staging, 0o777 & ~mask)
    for file in staging.iterdir():
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~mask)


def _exchange(folder: Path, staging: Path) -> None:
    """Put staging in the folder's place; a failure on the way puts the folder back."""
    for kept in folder.iterdir():
        if not (staging / kept.name).exists():
            if kept.is_dir():
                shutil.copytree(kept, staging / kept.name, symlinks=True)
            else:
                shutil.copy2(kept, staging / kept.name, follow_symlinks=False)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    try:
        os.replace(folder, aside)
        try:
            os.replace(staging, folder)
        except OSError:
            os.replace(aside, folder)
            raise
    finally:
        if folder.exists():  # else the folder's old content is only there
            shutil.rmtree(aside, ignore_errors=True)
