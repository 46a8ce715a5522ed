"""Coverage: how much of a network's work is driven by spikes, and what is left in float, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.errors import CoverageError
from fasfx.levels import is_skipped
from fasfx.program import constants, facts, fake, module_path, operators
from fasfx.synapses import MOVES, PRODUCT, SYNAPSES, UNSUPPORTED_WORDS, Carriers, is_firing_rate, operand, synapses

if TYPE_CHECKING:
    import pandas

aten = torch.ops.aten
SYNAPSE, FLOAT = "synapse", "float"
# Linear in their input, or arithmetic on positions and masks: additions of currents and constant factors.
_FREE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.sum.dim_IntList,
    aten.cat.default,
}
_FREE |= MOVES | {
    aten.embedding.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.stack.default,
    aten.index_select.default,
}
_FREE |= {aten.where.ScalarOther, aten.where.self, aten.masked_fill.Scalar, aten.repeat_interleave.self_int}
_FREE |= {
    aten.split.Tensor,
    aten.chunk.default,
    aten.unbind.int,
    aten.split_with_sizes.default,
    ops.count.op,
    ops.fire.op,
    ops.tick.op,
}
_FREE |= {
    aten.to.dtype,
    aten.nan_to_num.default,
    aten.copy.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.roll.default,
}


@dataclass(frozen=True)
class Row:
    """One operator: kind "synapse" or "float", multiply-accumulates at the captured shape, why not spike-driven."""

    node: str
    module: str
    operator: str
    kind: str
    macs: int
    spike_driven: bool
    reason: str


@dataclass(frozen=True)
class Coverage:
    """spike_driven_macs in [0, 1] and the float operators that remain; `.table` has every row."""

    rows: tuple[Row, ...]

    @property
    def spike_driven_macs(self) -> float:
        """Share of multiply-accumulates whose value operands are all carried by spikes (1 if there are none)."""
        total = sum(row.macs for row in self.rows)
        return sum(row.macs for row in self.rows if row.spike_driven) / total if total else 1.0

    @property
    def float_operators(self) -> list[str]:
        """Names of the operators on values that stay in float, most frequent first: not spike-driven."""
        names = [row.operator for row in self.rows if row.kind == FLOAT]
        return sorted(set(names), key=lambda name: (-names.count(name), name))

    @property
    def table(self) -> pandas.DataFrame:
        """One row per synaptic and per float operator."""
        import pandas

        return pandas.DataFrame([vars(row) for row in self.rows], columns=list(Row.__annotations__))

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False))

    def __str__(self) -> str:
        return (
            f"{self.spike_driven_macs:.2%} of multiply-accumulates are spike-driven; "
            f"float operators: {', '.join(self.float_operators) or 'none'}"
        )


def coverage(gm: GraphModule) -> Coverage:
    """Classify every operator of a program that computes with values."""
    live, fixed, carriers = dict(synapses(gm)), constants(gm), Carriers(gm)
    rows = []
    for node in operators(gm):
        if node in live:
            rows.append(_synapse_row(gm, carriers, node, live[node]))
        elif node not in fixed and _is_float_work(node):
            rows.append(_float_row(node, node in carriers.values))
    return Coverage(tuple(rows))


def require_full(found: Coverage) -> None:
    """Raise CoverageError naming up to five operators with multiply-accumulates that spikes do not drive."""
    bad = [row for row in found.rows if not row.spike_driven and (row.kind == SYNAPSE or row.macs)]
    if bad:
        listed = "\n  ".join(
            f"{row.node} ({row.operator}) in {row.module or 'the model'}: {row.reason}" for row in bad[:5]
        )
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise CoverageError(f"strict=True and {len(bad)} operators are not spike-driven:\n  {listed}{more}")


def _synapse_row(gm: GraphModule, carriers: Carriers, node: Node, positions: tuple[int, ...]) -> Row:
    missing = [p for p in positions if not carriers.is_sent(operand(node.args[p]))]
    reason = f"operand {missing[0]} carries float values" if missing else ""
    if missing and is_skipped(gm, node):
        reason = "its module is in config.skip"
    macs = _number(SYNAPSES.get(node.target, PRODUCT).macs(node))
    return Row(node.name, module_path(node), _name(node), SYNAPSE, macs, not missing, reason)


def _float_row(node: Node, on_values: bool) -> Row:
    unsupported = on_values and any(word in str(node.target) for word in UNSUPPORTED_WORDS)
    reason = "not sent as spikes by this version" if unsupported else "evaluated in float (nonlinear='exact')"
    reason = reason if on_values else "computed from positions, sizes or masks alone"
    macs = _number(fake(node).numel()) if unsupported and fake(node) is not None else 0  # type: ignore[union-attr]
    return Row(node.name, module_path(node), _name(node), FLOAT, macs, False, reason)


def _is_float_work(node: Node) -> bool:
    """Whether a node computes new floating point values from values: not free, not a constant factor."""
    value = fake(node)
    if value is None or not value.is_floating_point() or node.target in _FREE or is_firing_rate(node):
        return False
    if node.target is aten.mul.Tensor:
        return all(isinstance(a, Node) and a.op != "get_attr" for a in node.args)
    return any((v := fake(n)) is not None and v.is_floating_point() for n in node.all_input_nodes)


def _number(size: Any) -> int:
    """A symbolic size at the captured shape."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _name(node: Node) -> str:
    return str(node.target).split(".")[-2] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


__all__ = ["Coverage", "coverage", "require_full", "facts"]
