"""Coverage: how much of a network's work is driven by spikes, and what is left in float, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.errors import CoverageError
from fasfx.levels import is_skipped
from fasfx.program import arguments, constants, facts, fake, module_path, operators
from fasfx.synapses import MOVES, PRODUCT, SYNAPSES, UNSUPPORTED_WORDS, Carriers, is_firing_rate, operand, synapses

if TYPE_CHECKING:
    import pandas

aten = torch.ops.aten
SYNAPSE, FUNCTION, FLOAT, TABLE = "synapse", "function", "float", "table"
# What counts as free, and why: the one table that decides it (docs/concepts.md says the same in words).
FREE: dict[str, frozenset[Any]] = {
    "moves values, or looks them up": frozenset(MOVES)
    | {
        aten.embedding.default,
        ops.integer_embedding.op,
        aten.expand_as.default,
        aten.index.Tensor,
        aten.gather.default,
        aten.index_select.default,
        aten.stack.default,
        aten.cat.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.where.self,
        aten.where.ScalarOther,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.repeat_interleave.self_int,
        aten.constant_pad_nd.default,
        aten.pad.default,
        aten.roll.default,
        aten.flip.default,
        aten.copy.default,
        aten.index_put.default,
        aten.index_add.default,
        aten.to.dtype,
        aten.nan_to_num.default,
    },
    "adds currents": frozenset(
        {
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.rsub.Scalar,
            aten.neg.default,
            aten.sum.default,
            aten.sum.dim_IntList,
            aten.mean.default,
            aten.mean.dim,
            aten.cumsum.default,
            aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default,
            ops.hadamard.op,
        }
    ),
    "compares: a rectifier, or a group whose winner silences the others": frozenset(
        {
            aten.relu.default,
            aten.relu6.default,
            aten.leaky_relu.default,
            aten.hardtanh.default,
            aten.hardsigmoid.default,
            aten.abs.default,
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
            aten.amax.default,
            aten.amin.default,
            aten.max.dim,
            aten.maximum.default,
            aten.minimum.default,
            aten.max_pool2d.default,
        }
    ),
    "is a neuron": ops.NEURONS,
}
_FREE = frozenset[Any]().union(*FREE.values())


@dataclass(frozen=True)
class Row:
    """One operator: its kind, multiply-accumulates at the captured shape, and why it is not spike-driven.

    kind: "synapse" (products of values among them), "function" (one variable, sent by a neuron group), "float", or
    "table" (computed from positions, sizes or masks alone, which counts neither way).
    """

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
    def spike_driven_operators(self) -> float:
        """Share of the operators that are not free, synapses and non-linear functions, that spikes drive (1: all)."""
        counted = [row for row in self.rows if row.kind != TABLE]
        return sum(row.spike_driven for row in counted) / len(counted) if counted else 1.0

    @property
    def float_operators(self) -> list[str]:
        """Names of the operators on values that stay in float, most frequent first: not spike-driven."""
        names = [row.operator for row in self.rows if row.kind == FLOAT]
        return sorted(set(names), key=lambda name: (-names.count(name), name))

    @property
    def table(self) -> pandas.DataFrame:
        """One row per operator that is not free (FREE in this module)."""
        import pandas

        return pandas.DataFrame([vars(row) for row in self.rows], columns=list(Row.__annotations__))

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{self.table.to_html(index=False)}"

    def __str__(self) -> str:
        return (
            f"{self.spike_driven_macs:.2%} of multiply-accumulates and {self.spike_driven_operators:.2%} of operators "
            f"are spike-driven; float operators: {', '.join(self.float_operators) or 'none'}"
        )


def coverage(gm: GraphModule) -> Coverage:
    """Classify every operator of a program that computes with values."""
    live, fixed, carriers = dict(synapses(gm)), constants(gm), Carriers(gm)
    rows = []
    for node in operators(gm):
        if node in live:
            rows.append(_synapse_row(gm, carriers, node, live[node]))
        elif node.target in ops.GROUPS:
            rows.append(_function_row(node))
        elif node not in fixed and _is_float_work(node, fixed):
            rows.append(_float_row(gm, node, node in carriers.values))
    return Coverage(tuple(rows))


def require_full(found: Coverage, exact: bool) -> None:
    """Raise CoverageError naming up to five operators that spikes do not drive.

    exact: the user asked for float functions (nonlinear="exact"), so only multiply-accumulates are held against it.
    """
    left = [row for row in found.rows if not row.spike_driven and row.kind != TABLE]
    bad = [row for row in left if row.kind == SYNAPSE or row.macs or not exact]
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
    if not missing:  # how it is driven
        reason = "; ".join(d.reason for d in facts(gm).declined if d.node == node.name and d.pass_name == "lower")
    macs = _number(SYNAPSES.get(node.target, PRODUCT).macs(node))
    return Row(node.name, module_path(node), _name(node), SYNAPSE, macs, not missing, reason)


def _function_row(node: Node) -> Row:
    given = arguments(node)
    neurons = given["neurons"] if "neurons" in given else len(given["edges"].meta["val"]) - 1
    return Row(node.name, module_path(node), given["function"], FUNCTION, 0, True, f"{neurons} neurons")


def _float_row(gm: GraphModule, node: Node, on_values: bool) -> Row:
    if not on_values:
        reason = "computed from positions, sizes or masks alone"
        return Row(node.name, module_path(node), _name(node), TABLE, 0, False, reason)
    unsupported = any(word in str(node.target) for word in UNSUPPORTED_WORDS)
    value = fake(node)
    macs = _number(value.numel()) if unsupported and value is not None else 0
    return Row(node.name, module_path(node), _name(node), FLOAT, macs, False, _why_float(gm, node, unsupported))


def _why_float(gm: GraphModule, node: Node, unsupported: bool) -> str:
    if is_skipped(gm, node):
        return "its module is in config.skip"
    if facts(gm).config.nonlinear == "exact" and not unsupported:
        return "evaluated in float (nonlinear='exact')"
    declined = [d.reason for d in facts(gm).declined if d.node == node.name]
    return declined[-1] if declined else "no spiking form of it is known to this version"


def _is_float_work(node: Node, fixed: set[Node]) -> bool:
    """Whether a node computes new floating point values from values: not free, not a constant factor.

    fixed: the nodes that depend on no input.
    """
    value = fake(node)
    if value is None or not value.is_floating_point() or node.target in _FREE or is_firing_rate(node):
        return False
    if node.target is aten.div.Tensor and (not isinstance(node.args[1], Node) or node.args[1] in fixed):
        return False
    if node.target is aten.mul.Tensor:
        return all(isinstance(a, Node) and a not in fixed for a in node.args)
    return any((v := fake(n)) is not None and v.is_floating_point() for n in node.all_input_nodes)


def _number(size: Any) -> int:
    """A symbolic size at the captured shape."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _name(node: Node) -> str:
    return str(node.target).split(".")[-2] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


__all__ = ["Coverage", "coverage", "require_full", "facts"]
