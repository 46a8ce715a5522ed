"""Checksums of an export's files, in the format of `sha256sum`: a damaged weight is still a number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fasfx.errors import CheckpointError

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Note the checksum of every file in a folder; `sha256sum -c SHA256SUMS` there compares them too."""
    lines = [f"{_sum(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare the files with their checksums; folders without any pass: other programs' exports have none.

    Raises CheckpointError naming the first file that is missing or not what was written.
    """
    if not (folder / SUMS).is_file():
        return
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: wanted for wanted, _, name in (line.partition("  ") for line in lines)}
    if not {file.name for file in folder.glob("model.onnx*")} <= set(sums):
        raise CheckpointError(f"{folder / SUMS} is damaged: it does not name every file of the model; export it again")
    for name, wanted in sums.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing; export it again")
        if _sum(folder / name) != wanted:
            raise CheckpointError(f"{folder / name} is damaged: its checksum is not the one in {SUMS}; export it again")


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
