"""Two programs side by side, node by node: declared bound, measured error, firing rate, and how far they are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasfx.errors import InputError
from fasfx.passes import Clip
from fasfx.passes.clip import thresholds
from fasfx.tools.subjects import Subject
from fasfx.tools.tracing import Sent, Trace, trace
from fasfx.tools.verifying import distance

if TYPE_CHECKING:
    import pandas


def diff(a: Subject, b: Subject) -> pandas.DataFrame:
    """One row per neuron, group, value of a node and output that both programs have, in the order of b's graph.

    columns: node, kind, module; for either side bound, measured, rate; and difference, the relative L2 distance of the
    two values, both programs run with their neurons and groups as they are. A bound, and the error measured on a
    neuron's own input, are shares of its threshold; those of a group have the unit of its certified bound. rate: spikes
    per neuron and step. NaN where there is none, as the difference of a value in the unit of a row's own threshold.
    Both run on a's first batch. Raises InputError if b takes other inputs.
    """
    import pandas

    if list(a.batches[0]) != list(b.batches[0]):
        raise InputError(f"two programs of other inputs: {', '.join(a.batches[0])} and {', '.join(b.batches[0])}")
    left, right = (_Side(one, a.inputs) for one in (a, b))
    names = [*(name for name in right.names if name in left.names), *_only(left, right), *_only(right, left)]
    rows = [_row(name, left, right) for name in names]
    outputs = zip(left.outputs, right.outputs, strict=False)
    rows += [
        {"node": f"output {number}", "kind": "output", "module": "", "difference": distance(x, y)}
        for number, (x, y) in enumerate(outputs)
    ]
    measured = [f"{figure}_{side}" for side in "ab" for figure in ("bound", "measured", "rate")]
    return pandas.DataFrame(rows, columns=["node", "kind", "module", *measured, "difference"])


class _Side:
    """A program's run."""

    def __init__(self, subject: Subject, inputs: list[Tensor]) -> None:
        program, self._theta = subject.program, dict[str, Tensor]()
        for stage in subject.stages():
            program = stage.after
            if isinstance(stage.one, Clip):
                self._theta = thresholds(stage.before)
        self._run: Trace
        self._run, self.outputs = trace(program, inputs, transparent=False)

    @property
    def sent(self) -> dict[str, Sent]:
        return self._run.sent

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._run.shares, *self._run.values]))

    def value(self, name: str) -> Tensor | None:
        """In the model's unit."""
        if name not in self._run.shares:
            return self._run.values.get(name)
        return self._run.shares[name] * self._theta[name] if name in self._theta else None


def _only(one: _Side, other: _Side) -> list[str]:
    return [name for name in one.sent if name not in other.names]


def _row(name: str, left: _Side, right: _Side) -> dict[str, Any]:
    known = right.sent.get(name) or left.sent.get(name)
    kind, module = (known.kind, known.module) if known else ("value", "")
    row: dict[str, Any] = {"node": name, "kind": kind, "module": module}
    for side, found in (("a", left.sent.get(name)), ("b", right.sent.get(name))):
        if found is not None:
            row |= {f"bound_{side}": found.bound, f"measured_{side}": found.measured, f"rate_{side}": found.rate}
    values = left.value(name), right.value(name)
    if values[0] is not None and values[1] is not None:
        row["difference"] = distance(values[0], values[1])
    return row
