"""Runs a pipeline and shows what each pass did: texts, differences, promises, times, dumps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from pathlib import Path

from torch.fx import GraphModule

from fasfx.errors import ConfigError, PromiseError
from fasfx.graph_text import text
from fasfx.program import facts
from fasfx.tools.subjects import Subject, store
from fasfx.tools.verifying import verify

ALL = "all"


def run(
    subject: Subject,
    show: Callable[[str], None] = print,
    print_after: Collection[str] = (),
    print_diff: bool = False,
    verify_each: bool = False,
    stop_after: int | None = None,
    dump: Path | None = None,
) -> GraphModule:
    """The program after the passes of a subject.

    show:        takes what is printed.
    print_after: passes after which the program's text is shown; "all" for every one.
    print_diff:  show which lines of the text every pass changed.
    verify_each: after every pass, compare with the program before it (fasfx.tools.verify); PromiseError if it broke
                 its promise, naming the nodes.
    stop_after:  run only so many passes.
    dump:        a folder that gets the program before the first and after every pass, as `subject` reads it.
    """
    subject = Subject(subject.program, subject.batches, subject.names[:stop_after])
    if unknown := sorted(set(print_after) - {ALL, *subject.names}):
        raise ConfigError(f"cannot print after {', '.join(unknown)}: the passes are {', '.join(subject.names)}")
    seen: list[GraphModule] = [subject.program]
    if dump is not None:
        store(subject.program, subject.batches, dump / f"0-{facts(subject.program).level.lower()}")

    def after(name: str, program: GraphModule) -> None:
        before = seen[-1]
        seen.append(program)
        if {ALL, name} & set(print_after):
            show(f"after {name}\n{text(program)}")
        if print_diff:
            old, new = (text(one).splitlines() for one in (before, program))
            show("\n".join(difflib.unified_diff(old, new, f"before {name}", f"after {name}", lineterm="", n=0)))
        if dump is not None:
            store(program, subject.batches, dump / f"{len(seen) - 1}-{name}")
        if verify_each and (broken := verify(before, program, subject.inputs)):
            listed = "\n  ".join(map(str, broken[:5]))
            raise PromiseError(f"pass {name} breaks its promise at {len(broken)} places:\n  {listed}")

    return subject.final(after=after)
