"""Pipelines as text, `normalise,observe{granularity=token},...`, with the passes of other packages by their names.

A package offers passes, subclasses of torch.fx's PassBase, through entry points of the group "fasfx.passes".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase

from fasfx.errors import ConfigError
from fasfx.passes import PIPELINE, Observe
from fasfx.program import facts

GROUP = "fasfx.passes"
Batch = dict[str, Tensor]


def own() -> dict[str, type[PassBase]]:
    """The passes of fasfx by name, in order."""
    return {one.name: one for one in PIPELINE}


def installed() -> dict[str, type[PassBase]]:
    """The passes that other packages offer, by the names of their entry points. Raises ConfigError for a broken one."""
    found = {}
    for entry in entry_points(group=GROUP):
        try:
            one = entry.load()
        except Exception as error:
            raise ConfigError(f"the pass {entry.name} ({entry.value}) cannot be imported: {error}") from error
        if not (isinstance(one, type) and issubclass(one, PassBase)):
            raise ConfigError(f"the entry point {entry.name} ({entry.value}) is no subclass of torch.fx's PassBase")
        if entry.name in own():
            raise ConfigError(f"the entry point {entry.name} ({entry.value}) has the name of one of fasfx's passes")
        found[entry.name] = one
    return found


def parse(pipeline: str) -> tuple[list[str], dict[str, Any]]:
    """(names of passes in order, the SpikeConfig fields that braces set for the run).

    Raises ConfigError for what is no pipeline, an unknown pass, or a field that is set twice.
    """
    names, options = [], dict[str, Any]()
    if not re.fullmatch(r"[^{},]+(\{[^{}]*\})?(,[^{},]+(\{[^{}]*\})?)*", pipeline):
        raise ConfigError(f"{pipeline!r} is no pipeline: write normalise,observe{{granularity=token}},...")
    for name, braces in re.findall(r"([^{},]+)(?:\{([^{}]*)\})?", pipeline):
        names.append(name.strip())
        for field in filter(None, braces.split(",")):
            key, found, value = (part.strip() for part in field.partition("="))
            if not found or key in options:
                raise ConfigError(f"{field!r} in {pipeline!r}: write field=value, every field once")
            options[key] = _value(key, value)
    known = own() | installed()
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"unknown pass {', '.join(unknown)}: known are {', '.join(known)}")
    return names, options


def default(program: GraphModule) -> list[str]:
    """The names of fasfx's passes that follow those a program has been through.

    Of one that does not say which (a checkpoint of before), those that follow its level.
    """
    known = facts(program).passed
    done = [one.name in known if known else one.gives == facts(program).level for one in PIPELINE]
    after = max((number for number, passed in enumerate(done, 1) if passed), default=0)
    return [one.name for one in PIPELINE[after:]]


def make(name: str, batches: Sequence[Batch]) -> PassBase:
    """A pass by name; observe reads the batches."""
    return Observe(batches) if name == Observe.name else (own() | installed())[name]()


def _value(key: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return (value,) if key == "skip" and isinstance(value, str) else value
