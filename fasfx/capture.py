"""Capture: a model becomes a torch.fx program. The only file that knows transformers.exporters and torch.export."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, default_decompositions
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils.generic import find_labels

from fasfx.config import SpikeConfig
from fasfx.errors import CaptureError, first_line
from fasfx.program import FACTS, Facts, attribute, facts, fake, module_path, set_dropout

Inputs = dict[str, Any]
MAX_REFINEMENTS = 4
# Written out by torch.export itself, which also makes the graph functional; nothing else is decomposed.
_DECOMPOSED = (torch.ops.aten.einsum.default,)


def capture(model: nn.Module, batch: Mapping[str, Any], config: SpikeConfig, training: bool = False) -> GraphModule:
    """The model as a program at CAPTURED: same inputs by name, same outputs, dynamic batch and length.

    batch: one set of model inputs; tensors are inputs of the graph, everything else is a constant of it.
    training: keep dropout as nodes, off until `set_dropout`; batch norms stay in evaluation; tied weights get one name.
    The model keeps its weights (shared), its train/eval state and its forward.
    Raises CaptureError with torch.export's reason.
    """
    tensors = {k: at_least_two(v) for k, v in batch.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
    if not tensors:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without tensor inputs: pass calibration=[{{name: tensor}}]"
        )
    exported = _exported(model, tensors, constants, training)
    if training and (random := _random_modules(exported)):
        warnings.warn(
            f"trains without what {', '.join(random[:3])} do at random: only dropout can be switched off again",
            stacklevel=2,
        )
        exported = _exported(model, tensors, constants, training, random)
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.target = torch.ops.aten.detach.default  # a model's cache is full of them, and no number changes
    if any(_mutates(node) or node.target in _DECOMPOSED for node in exported.graph.nodes):
        table = default_decompositions()
        exported = exported.run_decompositions({target: table[target] for target in _DECOMPOSED})
    captured = program(exported.module(check_guards=False), config, constants)
    facts(captured).trainable = training
    _one_dropout(captured)
    set_dropout(captured, False)
    if training:
        tie(captured, model)
    return captured


def _one_dropout(gm: GraphModule) -> None:
    """Functional graphs spell dropout native_dropout(x, p, train)[0]."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.native_dropout.default):
        with gm.graph.inserting_before(node):
            plain = gm.graph.call_function(torch.ops.aten.dropout.default, node.args)
        for user in list(node.users):
            plain.meta = dict(user.meta)
            user.replace_all_uses_with(plain)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.recompile()


def _exported(
    model: nn.Module, tensors: Inputs, constants: Inputs, training: bool, still: Collection[str] = ()
) -> ExportedProgram:
    with evaluating(model, dropout=training, still=still), flags_set(model, constants):
        return _export_refining(model, tensors, constants)


def _random_modules(exported: ExportedProgram) -> list[str]:
    """Paths of modules that draw random numbers for anything but dropout, such as stochastic depth."""
    drawn = [
        node
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and node.target not in (torch.ops.aten.dropout.default, torch.ops.aten.scaled_dot_product_attention.default)
    ]
    return sorted({module_path(node) for node in drawn})


def program(module: GraphModule, config: SpikeConfig, constants: Inputs) -> GraphModule:
    """A program at CAPTURED from an exported module."""
    # Rebuilt, because an exported module refuses train() and eval().
    gm = GraphModule(module, module.graph)
    gm.meta[FACTS] = Facts(level="CAPTURED", config=config, constants=dict(constants), symbols=_symbols(gm))
    return gm.eval()


def tie(gm: GraphModule, original: nn.Module) -> None:
    """One name for every parameter: of tied weights, the one under which the original lists it."""
    listed = {name for name, _ in original.named_parameters()}
    names = {id(p): name for name, p in gm.named_parameters(remove_duplicate=False) if name in listed}
    for node in gm.graph.find_nodes(op="get_attr"):
        node.target = names.get(id(attribute(gm, str(node.target))), node.target)
    gm.delete_all_unused_submodules()
    gm.recompile()


def dynamic_shapes(tensors: Mapping[str, Tensor], longest: int | None = None) -> dict[str, dict[int, Any]]:
    """One batch symbol for dim 0 of every input, one length symbol for dim 1 of every integer or boolean input.

    longest: the largest length. Inputs named decoder_* have a length of their own. Dims of floating point inputs
    (pixels, features) other than the batch are static.
    """
    batch = Dim("batch", min=1)
    lengths = {False: Dim("length", min=1, max=longest), True: Dim("decoder_length", min=1)}
    shapes: dict[str, dict[int, Any]] = {}
    for name, value in tensors.items():
        shapes[name] = {0: batch} if value.dim() else {}
        if value.dim() >= 2 and not value.is_floating_point():
            shapes[name][1] = lengths[name.startswith("decoder_")]
    return shapes


def _longest(model: nn.Module, tensors: Inputs) -> int | None:
    """The size of a text model's one table of positions: torch.export finds that limit too, but only by failing."""
    tables = {value.shape[-1] for name, value in model.named_buffers() if name.split(".")[-1] == "position_ids"}
    return tables.pop() if len(tables) == 1 and not any(v.is_floating_point() for v in tensors.values()) else None


def _export_refining(model: nn.Module, tensors: Inputs, constants: Inputs) -> ExportedProgram:
    """Export, taking over the limits torch.export finds (a maximum length, a fixed size) until it is content.

    A condition on shapes that is no such limit (a length that must differ from another) is checked at run time.
    """
    shapes: Any = dynamic_shapes(tensors, _longest(model, tensors))
    defer = False
    for _ in range(MAX_REFINEMENTS):
        try:
            return _export(model, tensors, constants, shapes, defer)
        except torch._dynamo.exc.UserError as error:
            message = str(error).split("\n\n")[0]
            if "Suggested fixes" in message:
                shapes = refine_dynamic_shapes_from_suggested_fixes(message, shapes)
            elif not defer:
                defer = True
            else:
                raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {message}") from error
        except Exception as error:
            raise CaptureError(f"cannot capture {type(model).__name__}: {first_line(error)}") from error
    raise CaptureError(f"torch.export found no shapes for {type(model).__name__} after {MAX_REFINEMENTS} refinements")


# A GPU's fused attention asks for lengths that are multiples of 8; the program writes attention out anyway.
@sdpa_kernel(SDPBackend.MATH)
def _export(model: nn.Module, tensors: Inputs, constants: Inputs, shapes: Any, defer: bool) -> ExportedProgram:
    if is_hugging_face(model):
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        settings = DynamoConfig(dynamic=True, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=defer)
        program = DynamoExporter().export(model, {**tensors, **constants}, settings).program
        assert isinstance(program, ExportedProgram)
        return program
    with torch.no_grad():
        every = shapes | dict.fromkeys(constants)
        return torch.export.export(
            model,
            (),
            {**tensors, **constants},
            dynamic_shapes=every,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=defer,
        )


def is_hugging_face(model: nn.Module) -> bool:
    """Whether transformers' exporters take this model."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def at_least_two(value: Tensor) -> Tensor:
    """A batch of one doubled: torch.export specialises sizes of 1."""
    return torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value


def parameters_of(model: nn.Module) -> list[str]:
    """Names of the model's forward arguments, without self and catch-alls; of a program, those of its inputs."""
    if (names := getattr(model, "input_names", None)) is not None:
        return list(names)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind not in kinds]


def labels_of(model: nn.Module) -> list[str]:
    """Names of the forward's arguments that only the loss reads, as transformers.Trainer tells them."""
    return list(find_labels(type(model))) if is_hugging_face(model) else []


def takes_any(model: nn.Module) -> bool:
    """Whether the model's forward has a catch-all for named arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@contextlib.contextmanager
def flags_set(model: nn.Module, constants: Inputs) -> Iterator[None]:
    """use_cache and the like on the config of every part of the model, as they were again outside.

    transformers' exporter sets them on the model's own config only; T5's stacks have copies.
    """
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    before = [(c, k, getattr(c, k)) for c in configs.values() for k in constants if hasattr(c, k)]
    try:
        for config, name, _ in before:
            setattr(config, name, constants[name])
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


@contextlib.contextmanager
def evaluating(model: nn.Module, dropout: bool = False, still: Collection[str] = ()) -> Iterator[None]:
    """The model in eval mode inside, every module's own mode again outside.

    dropout: in train mode instead, but for batch norms, whose statistics stay as they are, and the modules `still`.
    """
    modes = {module: module.training for module in model.modules()}
    stay = {module for name, module in model.named_modules() if name in still}
    for module in modes:
        module.training = dropout and not (isinstance(module, nn.modules.batchnorm._BatchNorm) or module in stay)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _symbols(gm: GraphModule) -> dict[str, str]:
    """torch's symbols named as users know them: batch, length, decoder_length."""
    names: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake(node)
        for dim, size in enumerate(value.shape if value is not None else ()):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                length = "decoder_length" if str(node.target).startswith("decoder_") else "length"
                name = "batch" if dim == 0 else length
                names[str(size)] = name if name not in names.values() else f"{name}_{len(names)}"
    return names
