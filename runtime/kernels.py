"""Which nodes of an export an execution provider has no kernel for, told without that provider or its hardware.

The kernels are facts from ONNX Runtime's own list, in fasfx/data (tools/kernel_table.py writes them).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx

from fasfx.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    import pandas

PROVIDERS = ("cuda",)
STANDARD = ("", "ai.onnx")  # the two names of the domain of standard operators


class _Kernel(NamedTuple):
    """Versions of an operator that one kernel takes, and its types by parameter (T, T1, ...)."""

    first: int
    last: int
    types: dict[str, tuple[str, ...]]


def missing_kernels(folder: str | Path, provider: str = "cuda") -> pandas.DataFrame:
    """The nodes of an exported network, bodies of Loop and If included, that the provider has no kernel for.

    ONNX Runtime runs these on the CPU and copies between the devices. A row each, none if every node has a kernel:
    node (its name), operator, version (of its schema), types (of its inputs, then its outputs), reason.
    Raises ConfigError for an unknown provider, CheckpointError for a folder without an export.
    Source: docs/OperatorKernels.md of ONNX Runtime.
    """
    import pandas

    require_provider(provider)
    try:
        model = onnx.load(Path(folder) / "model.onnx", load_external_data=False)
        (opset,) = (imported.version for imported in model.opset_import if imported.domain in STANDARD)
    except Exception as error:
        raise CheckpointError(f"the export in {folder} cannot be read: {first_line(error)}") from error
    rows = []
    for node, types in _nodes(onnx.shape_inference.infer_shapes(model).graph, {}):
        version, reason = _lack(node, opset, types, _kernels(provider))
        if reason:
            shown = (types.get(name) or "unknown" for name in (*node.input, *node.output) if name)
            rows.append((node.name, node.op_type, version, " ".join(shown), reason))
    found = pandas.DataFrame(rows, columns=["node", "operator", "version", "types", "reason"])
    return found.astype({"version": "Int64"})


def require_provider(provider: str) -> None:
    """Raise ConfigError for a provider whose kernels are not known."""
    if provider not in PROVIDERS:
        raise ConfigError(f"no list of kernels for provider {provider!r}: choose {', '.join(PROVIDERS)}")


def _nodes(
    graph: Any, outside: dict[str, str], fixed: frozenset[str] = frozenset()
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Every node that is not made of constants only, with the types of all values that it can see."""
    types = outside | {value.name: _type(value.type) for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: _name(tensor.data_type) for tensor in graph.initializer}
    fixed |= {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    for node in graph.node:
        bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        if node.op_type == "Constant" or (node.input and not bodies and fixed.issuperset(filter(None, node.input))):
            fixed |= {*node.output}  # ONNX Runtime computes these when it loads the file
            continue
        yield node, types
        for body in bodies:
            yield from _nodes(body, types, fixed)


def _lack(node: Any, opset: int, types: dict[str, str], kernels: dict[str, list[_Kernel]]) -> tuple[int | None, str]:
    """(version of the operator's schema, why no kernel takes the node; empty if one does)."""
    if node.domain not in STANDARD:
        return None, f"{node.domain} is not the standard domain"
    schema = onnx.defs.get_schema(node.op_type, opset)
    version = schema.since_version
    # ONNX Runtime lets an open range take its first version only: what a later one changes it cannot know.
    found = [kernel for kernel in kernels.get(node.op_type, []) if kernel.first <= version <= kernel.last]
    if not found:
        return version, f"no kernel for version {version}"
    values = [*_bound(schema.inputs, node.input), *_bound(schema.outputs, node.output)]
    if unknown := [name for name, _ in values if not types.get(name)]:
        return version, f"the type of {', '.join(unknown)} is not known"
    return version, min((_refused(kernel, values, types) for kernel in found), key=len)


def _bound(formal: Any, names: Any) -> Iterator[tuple[str, set[str]]]:
    """The values a node has, each with the names that a kernel may give its parameter; the last may repeat."""
    for place, name in enumerate(names):
        parameter = formal[min(place, len(formal) - 1)]
        if name:
            yield name, {parameter.type_str, parameter.name}


def _refused(kernel: _Kernel, values: list[tuple[str, set[str]]], types: dict[str, str]) -> str:
    """The types that the kernel does not take, in words."""
    wrong = {
        f"{parameter}={types[name]} ({', '.join(taken)})"
        for name, parameters in values
        for parameter, taken in kernel.types.items()
        if parameter in parameters and types[name] not in taken
    }
    return f"no kernel for {'; '.join(sorted(wrong))}" if wrong else ""


@cache
def _kernels(provider: str) -> dict[str, list[_Kernel]]:
    """Operator -> its kernels."""
    import pandas

    with resources.files("fasfx.data").joinpath(f"{provider}_kernels.csv").open(encoding="utf-8") as file:
        table = pandas.read_csv(file, comment="#")
    table["last"] = table["last"].fillna(table["first"]).astype(int)
    kernels: dict[str, list[_Kernel]] = {}
    for (operator, first, last), rows in table.groupby(["operator", "first", "last"]):
        types = {row.parameter: tuple(row.types.split()) for row in rows.itertuples()}
        kernels.setdefault(operator, []).append(_Kernel(first, last, types))
    return kernels


def _type(value: Any) -> str:
    """The type as the list writes it, "float" or "seq(float)"; empty if it is not known."""
    if value.HasField("sequence_type"):
        return f"seq({_type(value.sequence_type.elem_type)})"
    return _name(value.tensor_type.elem_type)


def _name(element: int) -> str:
    return onnx.TensorProto.DataType.Name(element).lower() if element else ""
