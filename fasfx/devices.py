"""A program on another device: what its graph makes there, what is known of its values, and its sites' ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree

from fasfx.errors import ConfigError
from fasfx.program import facts, fake, fake_mode


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's tensors are; None if it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else None


def moved(batch: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    """A batch with its tensors on a device; None: where they are."""
    return {n: v.to(device) if isinstance(v, Tensor) and device is not None else v for n, v in batch.items()}


def follow(gm: GraphModule, device: torch.device | None) -> None:
    """Let everything but the weights follow them to a device."""
    if device is None:
        return
    retarget(gm, device)
    sites = facts(gm).sites
    for name, site in sites.items():
        held = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
        sites[name] = dataclasses.replace(site, **moved(held, device))


def require_dtypes(gm: GraphModule, change: Callable[[Tensor], Tensor]) -> None:
    """Raise ConfigError if a change of tensors is one of their dtype: torch.export writes dtypes into the graph."""
    captured = {value.dtype for node in gm.graph.find_nodes(op="get_attr") if (value := fake(node)) is not None}
    for dtype in captured:
        if (wanted := change(torch.empty(0, dtype=dtype)).dtype) != dtype:
            raise ConfigError(
                f"the network was captured in {dtype} and cannot become {wanted}: prepare model.to({wanted}); "
                "for mixed precision leave it, and use autocast or TrainingArguments(bf16=True)"
            )


def retarget(gm: GraphModule, device: torch.device) -> None:
    """What the graph itself makes, and what is known of its values: torch.export writes the device into the graph.

    torch.export.passes.move_to_device_pass does so for exported programs.
    """

    def moved_shape(value: Tensor) -> Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    with fake_mode(gm.graph):
        for node in gm.graph.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", device)
            if node.target is torch.ops.aten.to.device:
                node.update_arg(1, device)
            if "val" in node.meta:
                node.meta["val"] = _pytree.tree_map_only(Tensor, moved_shape, node.meta["val"])
    gm.recompile()
