"""The reference page of a public module: signature and docstring of every public name and of what a class offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

MODULES = ("fasfx", "fasfx.runtime", "fasfx.tools", "fasfx.errors")


class _Source(str):
    """An annotation as the source has it, shown without quotes."""

    __repr__ = str.__str__


def module_page(name: str) -> str:
    """All public names of a module, those that are modules aside."""
    module = import_module(name)
    lines = [f"# {name}", "", text_block(module)]
    for public in public_names(module):
        lines += ["", f"## {public}", "", *_described(f"{name}.{public}", getattr(module, public))]
        for member, found in _members(getattr(module, public)):
            lines += ["", f"### {public}.{member}", "", *_described(member, found)]
    return "\n".join(lines) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """The names that a module says are public, or else the classes in it, without other modules."""
    classes = [name for name, thing in vars(module).items() if inspect.isclass(thing)]
    return [name for name in getattr(module, "__all__", classes) if not inspect.ismodule(getattr(module, name))]


def text_block(thing: Any) -> str:
    """A docstring as a block that keeps its lines."""
    return f"```text\n{inspect.getdoc(thing)}\n```"


def _described(name: str, thing: Any) -> Iterator[str]:
    if not isinstance(thing, property) and not _is_error(thing):
        yield f"```python\n{name}{signature(thing)}\n```\n"
    yield text_block(thing)


def signature(thing: Callable[..., Any]) -> str:
    """Parameters and result, with annotations as the source has them."""
    found = inspect.signature(thing)
    parameters = [one.replace(annotation=_plain(one.annotation)) for one in found.parameters.values()]
    result = inspect.Signature.empty if inspect.isclass(thing) else _plain(found.return_annotation)
    return str(found.replace(parameters=parameters, return_annotation=result))


def _plain(annotation: Any) -> Any:
    return _Source(annotation) if isinstance(annotation, str) else annotation


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Exception)


def _members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Methods and properties that fasfx gives a class."""
    if inspect.isclass(thing) and not _is_error(thing):
        for one in inspect.classify_class_attrs(thing):
            if one.kind != "data" and one.name[0] != "_" and one.defining_class.__module__.startswith("fasfx"):
                yield one.name, getattr(thing, one.name)
