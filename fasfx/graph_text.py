"""Canonical graph text: one line per node, valid Python, stable, and it parses back.

    # fasfx graph 1
    # facts {"level": ...}
    # call {"in_spec": ..., "out_spec": ...}
    input_ids = placeholder("input_ids")  # int64[batch, length]
    weight = get_attr("encoder.weight")  # float32[384, 384]
    linear = aten.linear.default(input_ids, weight, None)  # float32[batch, length, 384] @ encoder.query
    return [linear]

Weights are named, not written; `parse` takes them from a mapping.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree

from fasfx.config import SpikeConfig
from fasfx.errors import GraphTextError
from fasfx.levels import LEVELS
from fasfx.program import FACTS, Facts, attribute, facts, infer_node, module_path, source_line

FORMAT = 1
_CARRIED = ("site", "group", "sends")  # which site or group a neuron, a group or a running estimate is of
_TYPES = {"device": torch.device, "float": float, "slice": slice}
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"}
_SIZE_FUNCTIONS = {
    "operator": {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow"} | _COMPARE,
    "math": {"floor", "ceil", "trunc"},
    "torch": {"sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum"},
}


# --- writing ---------------------------------------------------------------------------------------------


def text(gm: GraphModule) -> str:
    """The program as text. Same program, same text."""
    codegen = gm.graph._codegen
    call: dict[str, Any] = {}
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        call = {
            "args": info.orig_args,
            "in_spec": _pytree.treespec_dumps(info.in_spec),
            "out_spec": _pytree.treespec_dumps(info.out_spec) if info.out_spec is not None else None,
        }
    lines = [f"# fasfx graph {FORMAT}", f"# level {facts(gm).level}", f"# call {json.dumps(call)}"]
    return "\n".join([*lines, *(_line(gm, node) for node in gm.graph.nodes)]) + "\n"


def _line(gm: GraphModule, node: Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    if node.op in ("placeholder", "get_attr"):
        call = f"{node.op}({json.dumps(str(node.target))})"
    else:
        arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
        call = f"{target_name(node.target)}({', '.join(arguments)})"
    note = {"module": module_path(node), "line": source_line(node)} | {k: node.meta.get(k) for k in _CARRIED}
    tail = "".join(f" {k}={json.dumps(v)}" for k, v in note.items() if v)
    return f"{node.name} = {call}  # {_type(gm, node)}{tail}"


def _type(gm: GraphModule, node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = [_symbol(gm, size) for size in value.shape]
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
    return _symbol(gm, value) if isinstance(value, torch.SymInt) else type(value).__name__


def _symbol(gm: GraphModule, size: Any) -> str:
    names = facts(gm).symbols
    return re.sub(r"[su]\d+", lambda m: names.get(m[0], m[0]), str(size))


def target_name(target: Any) -> str:
    """How a call target is written: aten.linear.default, operator.getitem, torch.sym_max."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        prefix = "aten" if namespace == "aten" else f"torch.ops.{namespace}"
        return f"{prefix}.{name}.{target._overloadname}"
    module = {"_operator": "operator"}.get(target.__module__, target.__module__)
    return f"{module}.{target.__name__}"


def _value(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_value(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    return repr(value)  # numbers, strings, None, torch.float32, torch.contiguous_format


# --- reading ---------------------------------------------------------------------------------------------


def parse(source: str, tensors: Mapping[str, Tensor], config: SpikeConfig | None = None) -> GraphModule:
    """The program of a text; weights come from `tensors`, shared; its level is the one in the text.

    Shapes are computed again from the inputs' types, with the symbols named in the text.
    Raises GraphTextError naming the line; also for another format number and for a missing weight.
    """
    lines = source.splitlines()
    if not lines or lines[0] != f"# fasfx graph {FORMAT}":
        raise GraphTextError(f"line 1: not a fasfx graph text of format {FORMAT}: {lines[0] if lines else '(empty)'!r}")
    header = dict(line[2:].split(" ", 1) for line in lines[1:] if line.startswith("# "))
    if not lines[-1].startswith("return ") or not {"level", "call"} <= set(header):
        raise GraphTextError("the text is cut off: it must have a level, a call and end in a return line")
    reader = _Reader(tensors)
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            reader.read(number, line)
    if header["level"] not in LEVELS:
        raise GraphTextError(f"unknown level {header['level']!r}: known are {', '.join(LEVELS)}")
    try:
        if call := json.loads(header["call"]):
            for name in call["args"]:
                _check_path(name)
            spec_in, spec_out = (_treespec(call[key]) for key in ("in_spec", "out_spec"))
            reader.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(call["args"], spec_in, spec_out)))
    except (ValueError, KeyError, TypeError, NotImplementedError, AttributeError, ImportError) as error:
        raise GraphTextError(f"the call line cannot be read: {error}") from error
    gm = GraphModule(reader.root, reader.graph)
    gm.graph.lint()
    gm.meta[FACTS] = Facts(header["level"], config or SpikeConfig(), symbols=reader.symbols)
    return gm.eval()


def _check_path(path: Any) -> None:
    """torch.fx writes these names into Python source: only dotted identifiers may get that far."""
    if not isinstance(path, str) or not all(part.isidentifier() or part.isdigit() for part in path.split(".")):
        raise GraphTextError(f"{path!r} is no name")


def _treespec(dumped: str) -> Any:
    from transformers.exporters.metadata import load_treespec

    return load_treespec(dumped)


class _Reader:
    """Builds a graph line by line."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.root = Graph(), torch.nn.Module()
        self._tensors, self._nodes = tensors, dict[str, Node]()
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._symbols: dict[str, torch.SymInt] = {}

    def read(self, number: int, line: str) -> None:
        """Add the node of one line."""
        try:
            statement = (
                ast.parse(textwrap.dedent(line), mode="exec").body[0] if not line.startswith("return ") else None
            )
            if statement is None:
                self.graph.output(self._evaluate(ast.parse(line.removeprefix("return "), mode="eval").body))
                return
            assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
            name = statement.targets[0].id  # type: ignore[attr-defined]
            self._nodes[name] = self._node(name, statement.value, line.partition("  # ")[2])
        except GraphTextError as error:
            raise GraphTextError(f"line {number}: {error}") from None
        except Exception as error:
            raise GraphTextError(f"line {number}: {type(error).__name__}: {error}\n  {line[:160]}") from error

    def _node(self, name: str, call: ast.Call, note: str) -> Node:
        args = [self._evaluate(a) for a in call.args]
        kwargs = {str(k.arg): self._evaluate(k.value) for k in call.keywords}
        function = ast.unparse(call.func)
        kind = note.partition("]")[0]
        if name in self._nodes:
            raise GraphTextError(f"{name!r} is defined twice")
        if function in ("placeholder", "get_attr"):
            _check_path(args[0])
        if function == "placeholder":
            node = self.graph.create_node("placeholder", args[0], (), {}, name)
            node.meta["val"] = self._input(kind)
        elif function == "get_attr":
            self._register(args[0])
            node = self.graph.create_node("get_attr", args[0], (), {}, name)
            node.meta["val"] = self._mode.from_tensor(attribute(self.root, args[0]).detach(), static_shapes=True)
        else:
            node = self.graph.create_node("call_function", self._target(call.func), tuple(args), kwargs, name)
            with self._mode:
                infer_node(node)
        self._provenance(node, note)
        return node

    def _provenance(self, node: Node, note: str) -> None:
        found = {k: json.loads(v) for k, v in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*")', note)}
        node.meta |= {k: found[k] for k in _CARRIED if k in found}
        if "module" in found:
            node.meta["nn_module_stack"] = {found["module"]: (found["module"], "")}
        if "line" in found:
            node.meta["stack_trace"] = found["line"]

    def _register(self, path: str) -> None:
        if path not in self._tensors:
            raise GraphTextError(f"no weight is named {path!r}")
        module, (*parents, leaf) = self.root, path.split(".")
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        value = self._tensors[path]
        if isinstance(value, torch.nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value)

    def _input(self, kind: str) -> Tensor | None:
        if "[" not in kind:
            return None
        dtype, _, sizes = kind.partition("[")
        shape = [int(s) if s.isdigit() else self._symbol(s) for s in sizes.split(", ") if s]
        with self._mode:
            return torch.empty(shape, dtype=getattr(torch, dtype))

    def _symbol(self, name: str) -> torch.SymInt:
        if name not in self._symbols:
            hint = 2 + 3 * len(self._symbols)
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            size = self._mode.from_tensor(torch.empty(hint), symbolic_context=context).shape[0]
            assert isinstance(size, torch.SymInt)
            self._symbols[name] = size
        return self._symbols[name]

    @property
    def symbols(self) -> dict[str, str]:
        """torch's symbol -> the name in the text."""
        return {str(size): name for name, size in self._symbols.items()}

    def _target(self, function: ast.expr) -> Any:
        """A torch operator, or a function on sizes; nothing else can be called from a text."""
        path = ast.unparse(function)
        namespace, _, rest = path.partition(".")
        if namespace in _SIZE_FUNCTIONS and rest in _SIZE_FUNCTIONS[namespace]:
            return getattr(importlib.import_module(namespace), rest)
        value: Any = torch.ops
        for part in path.removeprefix("torch.ops.").split("."):
            value = getattr(value, part, None)
        if not isinstance(value, torch._ops.OpOverload):
            raise GraphTextError(f"unknown operator {path!r}")
        return value

    def _evaluate(self, expression: ast.expr) -> Any:
        match expression:
            case ast.Name(id=name):
                if name not in self._nodes:
                    raise GraphTextError(f"{name!r} is used before it is defined")
                return self._nodes[name]
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items):
                return [self._evaluate(i) for i in items]
            case ast.Tuple(elts=items):
                return tuple(self._evaluate(i) for i in items)
            case ast.Dict(keys=keys, values=values):
                return {ast.literal_eval(k): self._evaluate(v) for k, v in zip(keys, values, strict=True) if k}
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._evaluate(inner)
            case ast.Call(func=ast.Name(id=kind), args=items) if kind in _TYPES:
                return _TYPES[kind](*(self._evaluate(i) for i in items))
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                if isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format):
                    return found
        raise GraphTextError(f"cannot read {ast.unparse(expression)!r}")
