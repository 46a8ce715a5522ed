"""Whether a pass kept its promise: on a batch, node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from fasfx.difference import Difference
from fasfx.program import facts, module_path
from fasfx.tools.tracing import Trace, trace

ROUNDING = 1e-4  # relative L2 error that float32 rounding may cause along a network


@dataclass(frozen=True)
class Broken:
    """A promise that a program does not keep.

    kind: "neuron" or "group": its error on its own input is above its bound. "value" of a site, or "output" of the
          network: it changed although every neuron and group handed on what it was given.
    node: site, group or node.
    promised, measured: of a neuron as a share of its threshold, of a group in its bound's unit, else relative L2.
    ratio: how many times what is promised, at the worst place.
    """

    kind: str
    node: str
    module: str
    promised: float
    measured: float
    ratio: float

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.kind} {self.node}{where}: error {self.measured:.3g}, promised {self.promised:.3g}"


def verify(before: GraphModule, after: GraphModule, inputs: Sequence[Tensor]) -> list[Broken]:
    """What a pass broke, see `against`."""
    return against(before, inputs)(after)


def against(before: GraphModule, inputs: Sequence[Tensor]) -> Callable[[GraphModule], list[Broken]]:
    """The program after a pass -> what the pass broke, neurons and groups first, then values, in the graph's order.

    Programs are compared with all neurons and groups transparent: then every rewrite must be exact. Where the ledger
    has a new line for another node (rounded weights, a user's approximation), no bound of values and outputs is
    claimed, and none is held against the pass.
    """
    old, expected = trace(before, inputs, transparent=True)

    def broken_by(after: GraphModule) -> list[Broken]:
        new, found = trace(after, inputs, transparent=True)
        broken = [
            Broken(one.kind, name, one.module, one.bound or 0.0, one.measured, one.excess)
            for name, one in new.sent.items()
            if one.excess > 1
        ]
        new_lines = facts(after).ledger.entries[len(facts(before).ledger.entries) :]
        if any(entry.node not in new.sent for entry in new_lines):
            return broken
        outputs = [
            Broken("output", f"output {number}", "", ROUNDING, error, error / ROUNDING)
            for number, (a, b) in enumerate(zip(expected, found, strict=True))
            if (error := distance(a, b)) > ROUNDING
        ]
        return broken + _values(before, after, old, new, bool(outputs)) + outputs

    return broken_by


def distance(reference: Tensor, value: Tensor) -> float:
    """Relative L2 error of a tensor; infinite if the shapes differ. Places where both are infinite or NaN agree."""
    if reference.shape != value.shape:
        return float("inf")
    if not reference.is_floating_point():
        return float(not reference.equal(value))
    same = (reference == value) | (reference.isnan() & value.isnan())
    difference = Difference()
    alike = same & ~reference.isfinite()
    difference.add(reference.masked_fill(alike, 0), value.masked_fill(alike, 0))
    return difference.relative_l2


def _values(before: GraphModule, after: GraphModule, old: Trace, new: Trace, all_nodes: bool) -> list[Broken]:
    """Values that differ: of sites that the pass left alone; before there are sites, of nodes if an output differs."""
    sites = facts(before).sites
    modules = {node.name: module_path(node) for node in after.graph.nodes}
    modules |= {name: site.module for name, site in facts(after).sites.items()}
    kept = {name for name, site in facts(after).sites.items() if sites.get(name) is site}
    if not sites and all_nodes:
        kept = set(old.values)
    pairs = ((old.values, new.values), (old.shares, new.shares))
    shared = {name: (a[name], b[name]) for a, b in pairs for name in b if name in kept and name in a}
    return [
        Broken("value", name, modules.get(name, ""), ROUNDING, error, error / ROUNDING)
        for name, (a, b) in shared.items()
        if (error := distance(a, b)) > ROUNDING
    ]
