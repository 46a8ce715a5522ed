"""Writes docs/passes from the passes' own docstrings: `python -m fasfx.tools.docs`; with --check it only compares."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from fasfx import capture, levels
from fasfx.passes import PIPELINE

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "passes"


def page(number: int, one: Any) -> str:
    """The page of one pass: what it takes and gives, its promise, its rules."""
    module = inspect.getdoc(sys.modules[one.__module__]) or ""
    lines = [f"# {number}. {one.name}", "", _indented(module), ""]
    lines += [f"- takes: {one.takes}", f"- gives: {one.gives} ({levels.LEVELS[one.gives].meaning})"]
    lines += [f"- numbers: {one.numerics}", "", _indented(inspect.getdoc(one) or ""), ""]
    for rule in one.rules:
        lines += [f"## {rule.name}", "", _indented(rule.doc), ""]
    return "\n".join(lines).rstrip() + "\n"


def _indented(text: str) -> str:
    """A docstring as a block that keeps its lines."""
    return "```text\n" + text + "\n```"


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    found = {f"{number}-{one.name}.md": page(number, one) for number, one in enumerate(PIPELINE, 1)}
    doc = inspect.getdoc(capture.capture) or ""
    found["0-capture.md"] = (
        f"# 0. capture\n\n{_indented(doc)}\n\n- gives: CAPTURED ({levels.LEVELS['CAPTURED'].meaning})\n"
    )
    rows = [f"- [{name.removesuffix('.md').replace('-', '. ', 1)}]({name})" for name in sorted(found)]
    note = "Generated from the docstrings by `python -m fasfx.tools.docs`."
    found["index.md"] = "\n".join(["# Passes, in order", "", note, "", *rows]) + "\n"
    return found


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which are not current and return 1."""
    wanted = pages()
    if "--check" in arguments:
        stale = [
            n for n, text in wanted.items() if not (FOLDER / n).is_file() or (FOLDER / n).read_text("utf-8") != text
        ]
        stale += [f.name for f in FOLDER.glob("*.md") if f.name not in wanted]
        print(f"not current: {', '.join(stale)}; run python -m fasfx.tools.docs" if stale else "docs/passes is current")
        return bool(stale)
    FOLDER.mkdir(exist_ok=True)
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
