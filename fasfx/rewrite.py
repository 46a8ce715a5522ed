"""Declarative rewrite rules: pattern, replacement, side condition that explains itself, promised error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher
from torch.fx.proxy import GraphAppendingTracer

from fasfx.applying import may_apply
from fasfx.errors import RewriteError
from fasfx.ledger import Bound, Entry, Exact, Promise
from fasfx.program import decline, describe, facts, infer_node, inherit, module_path

Bindings = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """pattern -> into, unless `when` gives a reason not to. Every callable names the pattern variables it takes."""

    name: str
    doc: str
    pattern: torch.fx.Graph
    into: Callable[..., Any]
    when: Callable[..., bool | str]
    error: Promise | Callable[..., tuple[Promise, float | None]]

    def apply(self, gm: GraphModule, pass_name: str) -> int:
        """Rewrite every match; matches that decline are noted in the program's facts. Returns how many changed."""
        matcher = SubgraphMatcher(self.pattern, remove_overlapping_matches=True)
        changed = 0
        for match in matcher.match(gm.graph):
            if self._rewrite(gm, match, pass_name):
                changed += 1
        return changed

    def _rewrite(self, gm: GraphModule, match: InternalMatch, pass_name: str) -> bool:
        root = match.returning_nodes[0]
        bound: Bindings = {str(p.target): n for p, n in match.nodes_map.items() if p.op == "placeholder"}
        verdict = _call(self.when, bound)
        if verdict is not True:
            decline(gm, pass_name, self.name, root.name, str(verdict))
            return False
        if not may_apply(pass_name, self.name, root):
            return False
        promise, value = self.error, None
        if not isinstance(promise, Promise):
            promise, value = _call(promise, bound)
        facts(gm).ledger.add(Entry(pass_name, self.name, root.name, module_path(root), promise, value))
        replace(gm, root, lambda: _call(self.into, {k: proxies(gm, v) for k, v in bound.items()}))
        return True


def replace(gm: GraphModule, root: Node, build: Callable[[], Any]) -> Node:
    """Emit what `build` computes just before `root`, with root's provenance, and let it take root's place."""
    result = emit(gm, root, build)
    if not isinstance(result, Proxy):
        raise RewriteError(f"the replacement of {describe(root)} gave {type(result).__name__}, not a traced value")
    root.replace_all_uses_with(result.node)
    gm.graph.erase_node(root)
    return result.node


def emit(gm: GraphModule, root: Node, build: Callable[[], Any]) -> Any:
    """What `build` computes, as new nodes just before `root` with its provenance and with shapes."""
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(root):
        result = build()
    for node in [n for n in gm.graph.nodes if n not in before]:
        inherit(node, root)
        infer_node(node)
    return result


def proxy(gm: GraphModule, node: Node) -> Proxy:
    """A value to compute with: operators applied to it become nodes of the graph."""
    # One tracer per graph: values of different tracers do not mix.
    tracer = gm.graph.__dict__.setdefault("_fasfx_tracer", GraphAppendingTracer(gm.graph))
    return Proxy(node, tracer)


def proxies(gm: GraphModule, value: Any) -> Any:
    """Arguments with every node in them a value to compute with."""
    to_proxy: Any = lambda node: proxy(gm, node)  # noqa: E731
    return torch.fx.node.map_arg(value, to_proxy)


def _call(function: Callable[..., Any], bound: Bindings) -> Any:
    return function(**{name: bound[name] for name in inspect.signature(function).parameters})


def rewrite(
    into: Callable[..., Any],
    error: Promise | Callable[..., tuple[Promise, float | None]] | None = None,
    when: Callable[..., bool | str] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Turn a function into a Rule: its body is the pattern, its name the rule's name, its docstring the promise.

    into:  builds the replacement from the pattern's variables (traced values; literals as they are).
    error: Exact (default), Approximate, or a function giving (Bound, its value as a number).
    when:  True, or the reason the rule declines.
    Raises RewriteError if a callable asks for a variable that the pattern does not have.
    """

    def make(function: Callable[..., Any]) -> Rule:
        graph = torch.fx.symbolic_trace(function).graph
        names = {str(n.target) for n in graph.nodes if n.op == "placeholder"}
        promise = error or Exact()
        for part in (into, when, promise):
            if callable(part) and (unknown := set(inspect.signature(part).parameters) - names):
                raise RewriteError(f"rule {function.__name__}: {sorted(unknown)} are not variables of its pattern")
        graph.lint()
        return Rule(function.__name__, inspect.getdoc(function) or "", graph, into, when or (lambda: True), promise)

    return make


__all__ = ["Bound", "Rule", "emit", "proxies", "proxy", "replace", "rewrite"]
