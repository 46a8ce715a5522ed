"""The error ledger: what each rewrite promised about its error, and under which assumption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Exact:
    """The rewrite changes no value beyond float rounding."""

    why: str = ""


@dataclass(frozen=True)
class Bound:
    """|new - old| <= expression; symbols T, levels, theta. Holds only under `assume`."""

    expression: sympy.Expr
    assume: str

    def at(self, **values: float) -> float:
        """The bound with its symbols replaced by numbers."""
        return float(self.expression.subs({s: values[s.name] for s in self.expression.free_symbols}))


@dataclass(frozen=True)
class Approximate:
    """The rewrite changes values and no bound is claimed; measure it with fasfx.check."""

    why: str


Promise = Exact | Bound | Approximate


@dataclass(frozen=True)
class Entry:
    """One inexact rewrite: which pass and rule, at which node, with what promise, and the bound as a number."""

    pass_name: str
    rule: str
    node: str
    module: str
    promise: Promise
    value: float | None = None


@dataclass
class Ledger:
    """All inexact rewrites of a program, in order."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Append; exact rewrites need no line."""
        if not isinstance(entry.promise, Exact):
            self.entries.append(entry)

    @property
    def table(self) -> pandas.DataFrame:
        """One row per inexact rewrite: pass, rule, node, module, kind, bound (formula), value (number), assume."""
        import pandas

        rows = [
            {
                "pass": e.pass_name,
                "rule": e.rule,
                "node": e.node,
                "module": e.module,
                "kind": type(e.promise).__name__,
                "bound": str(e.promise.expression) if isinstance(e.promise, Bound) else "",
                "value": e.value,
                "assume": e.promise.assume if isinstance(e.promise, Bound) else getattr(e.promise, "why", ""),
            }
            for e in self.entries
        ]
        columns = ["pass", "rule", "node", "module", "kind", "bound", "value", "assume"]
        return pandas.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False))

    def __str__(self) -> str:
        return str(self.table.to_string(index=False))
