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
    """A fresh folder beside the target whose files replace the target's at the end; removed if anything fails.

    Raises CheckpointError for a full disk, a read-only place, or a target that is a file.
    """
    staging: Path | None = None
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: choose a folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield staging
        if folder.exists():
            for file in sorted(staging.iterdir()):
                os.replace(file, folder / file.name)
        else:
            os.chmod(staging, 0o755)
            os.replace(staging, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; nothing there was changed") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
