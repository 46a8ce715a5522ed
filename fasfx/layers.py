"""Activation checkpointing of a program: its layers run one by one, and again when gradients are asked for."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_unflatten
from torch.utils.checkpoint import checkpoint

from fasfx.program import copy_program, module_path


class Layers:
    """Runs a program like itself, with the same tensors, keeping only what goes from layer to layer.

    A layer is what the innermost numbered module of the first numbering holds ("encoder.layer.3"); a program without
    numbered modules is one layer, and nothing is saved.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._outputs = gm.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        flat = copy_program(gm)
        flat.graph.set_codegen(CodeGen())
        flat.recompile()
        number = _layer_numbers(flat)
        self._split = split_module(flat, flat, number.__getitem__, keep_original_order=True)
        for part in self._split.children():
            if isinstance(part, GraphModule):
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        """The program's output; gradients flow, dropout is the same again."""
        return tree_unflatten(self._split(*inputs.values()), self._outputs)


def _layer_numbers(gm: GraphModule) -> dict[Node, int]:
    """Every node's layer, growing along the graph."""
    numbers, current, number = dict[Node, int](), "", 0
    for node in gm.graph.nodes:
        found = re.match(r".*?\.\d+(?=\.|$)", module_path(node))
        if found and found[0] != current:
            current, number = found[0], number + 1
        numbers[node] = number
    return numbers
