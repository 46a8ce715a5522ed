"""Writes the table of CUDA kernels that `fasfx.runtime.missing_kernels` reads, from ONNX Runtime's own list.

python -m fasfx.tools.kernel_table OperatorKernels.md COMMIT, where the file is microsoft/onnxruntime's
docs/OperatorKernels.md at that commit. Standard operators only: an export holds no others.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "fasfx" / "data" / "cuda_kernels.csv"
COLUMNS = ("operator", "first", "last", "parameter", "types")


def kernels(text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of the table: last is empty where the range is open, types are separated by spaces."""
    section = text.split("## Operators implemented by CUDAExecutionProvider")[1].split("**Operator Domain:**")[1]
    operator = ""
    for line in section.splitlines():
        row = re.fullmatch(r"\|(\w*)\|.*\|\[?(\d+)(?:, (\d+)\]|(\+))?\|(.+)\|", line)
        if row is None:
            continue
        operator, first = row[1] or operator, row[2]
        last = "" if row[4] else row[3] or first
        for parameter, types in re.findall(r"\*\*(\w+)\*\* = (.+?)(?:<br/>|$)", row[5]):
            yield operator, first, last, parameter, re.sub(r"tensor\((\w+)\)", r"\1", types).replace(",", "")


def main(source: str, commit: str) -> None:
    """Write the table."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        file.write(
            f"# CUDA kernels of standard operators, from docs/OperatorKernels.md of microsoft/onnxruntime {commit}\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(kernels(Path(source).read_text("utf-8")))


if __name__ == "__main__":
    main(*sys.argv[1:])
