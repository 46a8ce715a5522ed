"""Applications of rules, counted: a pass asks before each, so that a tool can stop after the K-th.

As LLVM's -opt-bisect-limit and debug counters do. What a pass leaves out when it is refused, it must leave as it was,
so that a program is right after any number of applications; only its level may not be reached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch.fx import Node

from fasfx.logs import channel
from fasfx.program import module_path, source_line

_log = channel("rules")


@dataclass(frozen=True)
class Application:
    """A rule applied by a pass at a node, which may be gone since."""

    pass_name: str
    rule: str
    node: str
    module: str


@dataclass
class Applications:
    """done: what has been applied, in order.   limit: how many may be; None is all."""

    limit: int | None = None
    done: list[Application] = field(default_factory=list)


_counting: ContextVar[Applications | None] = ContextVar("applications", default=None)


@contextlib.contextmanager
def counting(limit: int | None = None) -> Iterator[Applications]:
    """Count the applications inside, and refuse those after `limit`."""
    counter = Applications(limit)
    token = _counting.set(counter)
    try:
        yield counter
    finally:
        _counting.reset(token)


def may_apply(pass_name: str, rule: str, node: Node) -> bool:
    """Whether a rule that matches at a node may be applied; asked once, just before that."""
    counter = _counting.get()
    if counter is not None:
        if counter.limit is not None and len(counter.done) >= counter.limit:
            return False
        counter.done.append(Application(pass_name, rule, node.name, module_path(node)))
    _log.info("%s: %s at %s", pass_name, rule, node.name)
    _log.debug("    %s", source_line(node))
    return True
