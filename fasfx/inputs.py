"""The inputs of a captured model: bound by position or name, and checked against what it was captured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fasfx.errors import InputError
from fasfx.program import facts, fake


def input_names(gm: GraphModule) -> list[str]:
    """Names of the tensors a program takes, in the order of positional arguments."""
    return [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]


def bind(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Input name -> tensor, in the program's order.

    Raises InputError naming a missing, unknown or ill-typed input.
    """
    names, constants = input_names(gm), facts(gm).constants
    if len(args) > len(names):
        raise InputError(f"{len(args)} positional inputs: the model was captured with {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    if twice := sorted(set(given) & set(kwargs)):
        raise InputError(f"{', '.join(twice)} given twice: by position and by name")
    given |= kwargs
    given = variable(names, constants, given)
    if missing := [name for name in names if name not in given]:
        raise InputError(f"missing input {', '.join(missing)}: the model was captured with {', '.join(names)}")
    _check(gm, given)
    return {name: given[name] for name in names}


def variable(names: Sequence[str], constants: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given without what is None, or is what the model was captured with.

    Raises InputError naming an input that is unknown, or another than the model was captured with.
    """
    for name, value in given.items():
        if name not in names and value is not None and (name not in constants or constants[name] != value):
            if name in constants:
                raise InputError(f"{name}={value!r}: the model was captured with {name}={constants[name]!r}")
            known = ", ".join(names)
            raise InputError(f"unknown input {name}: the model was captured with {known}; put it in calibration")
    return {name: value for name, value in given.items() if name in names}


def _check(gm: GraphModule, given: Mapping[str, Any]) -> None:
    sizes: dict[str, tuple[str, int]] = {}  # symbol -> the input that set it
    for node in gm.graph.find_nodes(op="placeholder"):
        name, value, wanted = str(node.target), given[str(node.target)], fake(node)
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is a {type(value).__name__}, not a tensor")
        if wanted is None:
            continue
        if value.dtype != wanted.dtype or value.dim() != wanted.dim():
            raise InputError(
                f"{name} is {value.dtype} of rank {value.dim()}: the model takes {wanted.dtype} of rank {wanted.dim()}"
            )
        if value.device != wanted.device:
            raise InputError(f"{name} is on {value.device}, the model on {wanted.device}: move one with .to()")
        for dim, size in enumerate(wanted.shape):
            found = value.shape[dim]
            other, same = sizes.setdefault(str(size), (name, found)) if not isinstance(size, int) else ("", size)
            if found != same:
                like = f"{other} has {same}" if other else f"the model takes {same} there"
                raise InputError(f"{name} has size {found} in dim {dim}: {like}")
