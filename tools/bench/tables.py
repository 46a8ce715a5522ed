"""Tables of measured figures, each line with its target and whether it is met. Printed as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One row: what was measured, the figures, the target every figure is held to, and whether all meet it.

    met: None for figures without a target.
    """

    label: str
    figures: tuple[float, ...]
    form: str
    target: str = ""
    met: bool | None = None


class Table(NamedTuple):
    """Lines under one title. `columns` names the label and each figure; `note` says how it was measured."""

    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    note: str = ""


def at_most(label: str, figures: Sequence[float], limit: float, form: str = "{:.3f}") -> Line:
    """Every figure at most `limit`; NaN misses."""
    return Line(label, tuple(figures), form, f"≤ {_short(form, limit)}", all(f <= limit for f in figures))


def at_least(label: str, figures: Sequence[float], limit: float, form: str = "{:.3f}") -> Line:
    """Every figure at least `limit`; NaN misses."""
    return Line(label, tuple(figures), form, f"≥ {_short(form, limit)}", all(f >= limit for f in figures))


def between(label: str, figures: Sequence[float], low: float, high: float, form: str = "{:.3f}") -> Line:
    """Every figure from `low` to `high`, both included; NaN misses."""
    target = f"{_short(form, low)} to {_short(form, high)}"
    return Line(label, tuple(figures), form, target, all(low <= f <= high for f in figures))


def below(label: str, figures: Sequence[float], limits: Sequence[float], what: str, form: str = "{:.3f}") -> Line:
    """Each figure below the limit of its own column, which `what` names."""
    met = all(f < limit for f, limit in zip(figures, limits, strict=True))
    return Line(label, tuple(figures), form, what, met)


def plain(label: str, figures: Sequence[float], form: str = "{:.3f}") -> Line:
    """Figures without a target."""
    return Line(label, tuple(figures), form)


def _short(form: str, value: float) -> str:
    """A target in the form of its figures, without trailing zeros: 2.50 % is 2.5 %."""
    number, space, unit = _cell(form, value).partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def _cell(form: str, value: float) -> str:
    """`form` is a format; one ending in "%}" counts in hundredths, written with a space before the sign."""
    return "–" if math.isnan(value) else form.format(value).replace("%", " %")


def markdown(table: Table) -> str:
    """The table in Markdown: target and ✓ or ✗ behind the figures; columns aligned to be read as text too."""
    mark = {True: "✓", False: "✗", None: ""}
    header = [*table.columns, "target", ""]
    rows = [
        [line.label, *(_cell(line.form, figure) for figure in line.figures), line.target, mark[line.met]]
        for line in table.lines
    ]
    widths = [max(3, *(len(row[at]) for row in [header, *rows])) for at in range(len(header))]
    rule = ["-" * width if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    cells = [header, rule, *rows]
    text = [
        f"| {row[0].ljust(widths[0])} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    ]
    return "\n".join([f"### {table.title}", "", *text, *(["", table.note] if table.note else [])])


def missed(tables: Iterable[Table]) -> list[str]:
    """Title and label of every line whose target is missed."""
    return [f"{table.title}: {line.label}" for table in tables for line in table.lines if line.met is False]


def as_json(table: Table) -> dict[str, Any]:
    """The table as plain data, for json.dumps."""
    return table._asdict() | {"lines": [line._asdict() for line in table.lines]}
