"""The runner: a torch.fx PassManager that does for every pass what no pass should do itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fasfx.errors import LevelError
from fasfx.graph_text import text
from fasfx.levels import LEVELS, violations
from fasfx.logs import channel
from fasfx.program import Ran, copy_program, facts, infer_node
from fasfx.rewrite import Rule

PassHook = Callable[[str, GraphModule], None]


class Pass(PassBase):
    """A pass is a name, the level it takes, the level it gives, and rules; `rewrite` may do more than rules can.

    numerics: "exact" if outputs change by float rounding only, else "ledger".
    """

    name: ClassVar[str]
    takes: ClassVar[str]
    gives: ClassVar[str]
    numerics: ClassVar[str] = "exact"
    rules: ClassVar[tuple[Rule, ...]] = ()

    def call(self, gm: GraphModule) -> PassResult:
        """Apply `rewrite` to the given module itself; the runner hands in a copy."""
        return PassResult(gm, self.rewrite(gm))

    def rewrite(self, gm: GraphModule) -> bool:
        """Change the graph; True if anything changed. By default: the rules, in order."""
        return sum(rule.apply(gm, self.name) for rule in self.rules) > 0


class Runner(PassManager):
    """Runs passes in order: copy, level check, rewrite, dead code, shapes, lint, recompile, level check, timing.

    Any torch.fx PassBase is accepted; one that names no level leaves the level as it is.
    before / after: called with the pass's name and the program around every pass (progress, dumps).
    Raises LevelError naming the pass and up to five offending nodes.
    """

    def __init__(
        self, passes: Sequence[PassBase], before: PassHook | None = None, after: PassHook | None = None
    ) -> None:
        self._before, self._after = before, after
        super().__init__(passes=[self._around(p) for p in passes])

    def run(self, gm: GraphModule) -> GraphModule:
        """The program after all passes; the one given is unchanged."""
        try:
            found: GraphModule = self(gm).graph_module
        except Exception as error:  # PassManager wraps what a pass raises; users get the pass's own error
            raise error.__cause__ or error from None
        _LazyGraphModule.force_recompile(found)  # with the signature of its forward
        return found

    def _around(self, one: PassBase) -> Callable[[GraphModule], PassResult]:
        name = str(getattr(one, "name", type(one).__name__))

        def run_one(gm: GraphModule) -> PassResult:
            if self._before:
                self._before(name, gm)
            level = facts(gm).level
            if (takes := getattr(one, "takes", level)) != level:
                raise LevelError(f"pass {name} takes a program at {takes}, this one is at {level}")
            start = time.perf_counter()
            new = copy_program(gm)
            result = one(new)
            new = result.graph_module if result is not None else new
            tidy(new)
            facts(new).level = getattr(one, "gives", level)
            check_level(new, name)
            ran = Ran(name, facts(new).level, time.perf_counter() - start, len(new.graph.nodes))
            facts(new).history.append(ran)
            channel("passes").info("%s -> %s in %.2f s, %d nodes", name, ran.level, ran.seconds, ran.nodes)
            if channel("passes").isEnabledFor(logging.DEBUG):
                channel("passes").debug("%s", text(new))
            if self._after:
                self._after(name, new)
            return PassResult(new, result.modified if result is not None else True)

        return run_one


def tidy(gm: GraphModule) -> None:
    """Dead code out, shapes in, lint, recompile, unused weights dropped from the module."""
    gm.graph.eliminate_dead_code()
    for node in gm.graph.nodes:
        if "val" not in node.meta:
            infer_node(node)
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()


def check_level(gm: GraphModule, pass_name: str) -> None:
    """Raise LevelError if the program is not what its level says."""
    level = LEVELS[facts(gm).level]
    found = violations(gm, level)
    channel("levels").info("after %s: %s, broken at %d nodes", pass_name, level.name, len(found))
    for check in level.checks:
        channel("levels").debug("    %s", check.__qualname__)
    if found:
        listed = "\n  ".join(found[:5]) + (f"\n  and {len(found) - 5} more" if len(found) > 5 else "")
        raise LevelError(f"after pass {pass_name} the program is not at {level.name} ({level.meaning}):\n  {listed}")
