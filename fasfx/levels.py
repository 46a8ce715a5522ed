"""Levels as data: what must hold of a program after each pass, checked by the runner."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import arg, attribute, constants, describe, facts, module_path, operators
from fasfx.synapses import RELAYS, Carriers, operand, synapses

aten = torch.ops.aten
Complaint = tuple[Node, str]
Check = Callable[[GraphModule], Iterator[Complaint]]


@dataclass(frozen=True)
class Level:
    """name, the pass that makes it, what holds, fasfx's own operators that may be there, and what else is checked."""

    name: str
    made_by: str
    meaning: str
    operators: frozenset[OpOverload] = frozenset()
    checks: tuple[Check, ...] = ()


def forbid(why: str, *targets: OpOverload) -> Check:
    """No node has one of these targets."""

    def check(gm: GraphModule) -> Iterator[Complaint]:
        return ((node, why) for node in operators(gm) if node.target in targets)

    check.__doc__ = f"No {' or '.join(map(str, targets))}: it {why}."
    return check


def _no_mutation(gm: GraphModule) -> Iterator[Complaint]:
    """No operator changes its input in place."""
    for node in operators(gm):
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            yield node, "changes its input in place"


def _no_assertion(gm: GraphModule) -> Iterator[Complaint]:
    """No assertions, no guards, no calls of modules."""
    for node in gm.graph.nodes:
        if node.op == "call_module" or re.search(r"_assert|sym_constrain", str(node.target)):
            yield node, "is an assertion or a guard"


def _sites_observed(gm: GraphModule) -> Iterator[Complaint]:
    """Every site has a calibrated range."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for site in facts(gm).sites.values():
        if site.name in nodes and site.peak is None:
            yield nodes[site.name], "is a site without a calibrated range"


def carried_by(neuron: OpOverload) -> Check:
    """Every value that enters a synaptic operation comes out of this neuron, or its module is skipped."""

    def check(gm: GraphModule) -> Iterator[Complaint]:
        for node, position in spiking_operands(gm):
            if operand(node.args[position]).target is not neuron:
                yield node, f"operand {position} is not carried by spikes"
        missing = set(facts(gm).sites) - {node.meta.get("site") for node in operators(gm) if node.target is neuron}
        if missing:
            yield gm.graph.output_node(), f"depends on values that no neuron sends: {', '.join(sorted(missing))}"

    check.__doc__ = (
        f"Every value that enters a synaptic operation comes out of {neuron}, or its module is skipped; "
        "there is one for every site."
    )
    return check


def _sent(gm: GraphModule) -> Iterator[Complaint]:
    """Every value that enters a synaptic operation is a count, perhaps times a scale, or its module is skipped."""
    carriers = Carriers(gm)
    for node, position in spiking_operands(gm):
        if not carriers.is_sent(operand(node.args[position])):
            yield node, f"operand {position} is not carried by spikes"


def _unit_thresholds(gm: GraphModule) -> Iterator[Complaint]:
    """Every static threshold of a neuron is its code's unit: the rest is folded into weights."""
    config, fixed = facts(gm).config, constants(gm)
    for node in operators(gm):
        if node.target is ops.fire.op and node.args[1] in fixed:
            theta = arg(node, 1)
            if theta.op != "get_attr" or bool((attribute(gm, str(theta.target)) != config.unit(arg(node, 3))).any()):
                yield node, "has a static threshold that is not folded"


def spiking_operands(gm: GraphModule) -> Iterator[tuple[Node, int]]:
    """Operands that the configuration wants sent as spikes whatever made them: of every synapse, skipped ones aside."""
    if facts(gm).config.coverage == "matmul":
        for node, live in synapses(gm):
            if not is_skipped(gm, node):
                yield from ((node, position) for position in live)


def is_skipped(gm: GraphModule, node: Node) -> bool:
    """Whether the user asked to leave this node's module as it is (SpikeConfig.skip)."""
    path = module_path(node)
    return any(re.search(pattern, path) for pattern in facts(gm).config.skip)


_NORMAL = (
    _no_mutation,
    _no_assertion,
    forbid("has a canonical form", aten.scaled_dot_product_attention.default, aten.addmm.default, aten.mm.default),
    forbid("has a canonical form", aten.bmm.default, aten.baddbmm.default, aten.alias.default),
)
_ROTATED = frozenset({ops.hadamard.op})
_NEURONS = _ROTATED | {ops.fire.op, ops.group.op}
LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level("CAPTURED", "capture", "torch.export ATen graph, same outputs as the model"),
        Level("NORMAL", "normalise", "one spelling per operator", _ROTATED, _NORMAL),
        Level("RANGED", "observe", "every site has a calibrated range", _ROTATED, (*_NORMAL, _sites_observed)),
        Level(
            "CLIPPED",
            "clip",
            "every site is quantised as its neuron will",
            _ROTATED | {ops.qcfs.op},
            (carried_by(ops.qcfs.op),),
        ),
        Level("SPIKING", "substitute", "every site is a spiking neuron", _NEURONS, (carried_by(ops.fire.op),)),
        Level(
            "FOLDED",
            "fold",
            "spike counts travel, static thresholds live in the weights",
            _NEURONS,
            (_sent, _unit_thresholds),
        ),
        Level(
            "LOWERED",
            "lower",
            "closed form of the sequential schedule, or one tick of the synchronous one",
            ops.OPERATORS - {ops.qcfs.op, ops.fire.op, ops.group.op, ops.byte_lookup.op},
            (forbid("is not lowered", *RELAYS),),
        ),
    )
}


def violations(gm: GraphModule, level: Level) -> list[str]:
    """What does not hold, one description per offending node."""
    foreign = ops.OPERATORS - level.operators
    found = [(node, f"does not belong to {level.name}") for node in operators(gm) if node.target in foreign]
    found += [complaint for check in level.checks for complaint in check(gm)]
    return [f"{describe(node)}: {why}" for node, why in found]
