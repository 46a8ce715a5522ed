"""Why an operator is as it is: the rules that tried it, why each declined, and the pattern that nearly matched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from fasfx.coverage import coverage
from fasfx.errors import InputError
from fasfx.graph_text import target_name
from fasfx.program import facts, module_path, source_line
from fasfx.tools.subjects import Stage, Subject

DECIDED = ("SPIKING", "FOLDED", "LOWERED")  # levels at which it is known what spikes drive


@dataclass(frozen=True)
class Explanation:
    """One operator of a program.

    tried:   "pass: rule: what came of it", in order.
    outcome: how spikes drive it, or why they do not, or which pass it did not outlive.
    nearest: of the patterns that did not match, the one that came closest, and where it stopped; "" if none did.
    """

    node: str
    operator: str
    module: str
    line: str
    spike_driven: bool
    tried: tuple[str, ...]
    outcome: str
    nearest: str

    def __str__(self) -> str:
        where = "".join(f"\n  {key} {value}" for key, value in (("in", self.module), ("at", self.line)) if value)
        tried = "".join(f"\n  tried by {line}" for line in self.tried) or "\n  no rule tried it"
        near = f"\n  nearest: {self.nearest}" if self.nearest else ""
        return f"{self.node} ({self.operator}): {self.outcome}{where}{tried}{near}"


def explain(subject: Subject, *where: str) -> list[Explanation]:
    """Operators by name, at whatever level they are there, or every operator in a module and below it.

    Of a module: those that are not free (fasfx.coverage), and those that a rule applied to or declined.
    Raises InputError if there is neither such a node nor such a module.
    """
    stages = list(subject.stages())
    final = stages[-1].after if stages else subject.program
    programs = [stage.before for stage in stages] + [final]
    rows = {row.node: row for row in coverage(final).rows}
    if (level := facts(final).level) not in DECIDED:
        rows = {name: replace(row, reason=f"the passes end at {level}") for name, row in rows.items()}
    tried = _tried(stages)
    last: dict[str, tuple[int, Node]] = {}
    for number, program in enumerate(programs):
        last |= {n.name: (number, n) for n in program.graph.nodes if n.op == "call_function"}
    told = set(rows) | set(tried)
    names = dict.fromkeys(name for place in where for name in _named(place, last, told))
    return [_explanation(name, *last[name], stages, rows.get(name), tried.get(name, [])) for name in names]


def _named(where: str, last: dict[str, tuple[int, Node]], told: set[str]) -> list[str]:
    """The node of that name, or those in the module that something can be told about."""
    if where in last:
        return [where]
    inside = [name for name, (_, node) in last.items() if _is_in(module_path(node), where)]
    if not inside:
        raise InputError(f"no node and no module is named {where!r}: `fasfx passes run --print-after all` shows them")
    return [name for name in inside if name in told]


def _explanation(name: str, number: int, node: Node, stages: list[Stage], row: Any, tried: list[str]) -> Explanation:
    if number < len(stages):
        outcome, driven = f"it is gone after pass {stages[number].name}", True
    elif row is None:
        outcome, driven = "free: it moves, adds or compares values, sends them, or is computed from no value", True
    else:
        outcome = f"{'spike-driven' if row.spike_driven else 'not spike-driven'}"
        outcome, driven = f"{outcome}: {row.reason}".rstrip(": "), row.spike_driven
    operator = target_name(node.target)
    place = module_path(node), source_line(node)
    return Explanation(name, operator, *place, driven, tuple(tried), outcome, _nearest(name, stages))


def _tried(stages: list[Stage]) -> dict[str, list[str]]:
    """Node -> the rules that were tried on it, and what came of it."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        new = facts(stage.after).declined[len(facts(stage.before).declined) :]
        declined = {(d.rule, d.node): d.reason for d in new}
        for (rule, node), reason in declined.items():
            found.setdefault(node, []).append(f"{stage.name}: {rule}: declined, {reason}")
        for a in stage.applied:
            if (a.rule, a.node) not in declined:
                found.setdefault(a.node, []).append(f"{stage.name}: {a.rule}: applied")
    return found


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _nearest(name: str, stages: list[Stage]) -> str:
    """The pattern with the most operators in common that is not there as a whole; one in common says nothing."""
    best, told = 1, ""
    for stage in stages:
        node = next((n for n in stage.before.graph.nodes if n.name == name), None)
        for rule in getattr(stage.one, "rules", ()) if node is not None else ():
            misses: list[str] = []
            common = _common(_root(rule.pattern), node, misses)
            if misses and common > best:
                best, told = common, f"{stage.name}: {rule.name}, {common} operators match, but {misses[0]}"
    return told


def _root(pattern: Graph) -> Any:
    return pattern.output_node().args[0]


def _common(wanted: Any, found: Any, misses: list[str]) -> int:
    """How many operators of a pattern are there, from its result backwards; what is not goes to `misses`."""
    if not isinstance(wanted, Node) or wanted.op == "placeholder":
        if not isinstance(wanted, Node) and wanted != found:
            misses.append(f"{found} is not {wanted}")
        return 0
    if not isinstance(found, Node) or found.target != wanted.target:
        is_there = f"{found.name} is {_operator(found)}" if isinstance(found, Node) else f"it is {found}"
        misses.append(f"{is_there} and not {_operator(wanted)}")
        return 0
    if len(wanted.args) != len(found.args):
        misses.append(f"{found.name} has {len(found.args)} arguments and not {len(wanted.args)}")
    pairs = zip(wanted.args, found.args, strict=False)
    return 1 + sum(_common(w, f, misses) for w, f in pairs)


def _operator(node: Node) -> str:
    return target_name(node.target) if node.op == "call_function" else f"no operator but {node.op}"
