"""Thresholds and initial potentials that learn: parameters of a program's neurons, kept positive and foldable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.program import add_tensor, arg, attribute, facts, insert
from fasfx.synapses import operand, synapses

aten = torch.ops.aten
LOG_SCALE, SHARE, UNIT = "_log_scale", "_share", "_unit"
Shapes = dict[str, tuple[int, ...]]


def neurons(gm: GraphModule) -> dict[str, Node]:
    """Site -> its neuron: the clipped form or the spiking one. Only those with a stored threshold, which can learn."""
    found = [n for n in gm.graph.nodes if n.target in (ops.qcfs.op, ops.fire.op)]
    return {str(n.meta["site"]): n for n in found if isinstance(n.args[1], Node) and n.args[1].op == "get_attr"}


def _theta(gm: GraphModule, node: Node) -> Tensor:
    """The stored threshold of a neuron."""
    found: Tensor = attribute(gm, str(arg(node, 1).target))
    return found.detach()


def per_layer(gm: GraphModule) -> Shapes:
    """One factor for every site."""
    return {site: () for site in neurons(gm)}


def per_channel(gm: GraphModule) -> Shapes:
    """A factor for every channel of a site, as far as `_leaving_sums` allows."""
    peaks = {site: facts(gm).sites[site].peak for site in neurons(gm)}
    return _leaving_sums(gm, {site: tuple(peak.shape) for site, peak in peaks.items() if peak is not None})


def as_stored(gm: GraphModule) -> Shapes:
    """A factor for every element of a stored threshold, as far as `_leaving_sums` allows."""
    stored = {site: _theta(gm, node) for site, node in neurons(gm).items()}
    return _leaving_sums(gm, {site: tuple(theta.shape) for site, theta in stored.items()})


def _leaving_sums(gm: GraphModule, shapes: Shapes) -> Shapes:
    """One factor for all channels that a product of two spiking values sums over.

    The product of both thresholds has to be the same for all of them, or it does not leave the sum.
    """
    summed = _summed_dims(gm)
    return {
        site: tuple(1 if d - len(shape) in summed.get(site, set()) else n for d, n in enumerate(shape))
        for site, shape in shapes.items()
    }


def _summed_dims(gm: GraphModule) -> dict[str, set[int]]:
    """Site -> dims, from the end, that a product of two spiking values sums over."""
    found: dict[str, set[int]] = {}
    for node, live in synapses(gm):
        if node.target is aten.matmul.default and len(live) == 2:
            for position, dim in ((0, -1), (1, -2)):
                if (site := operand(node.args[position]).meta.get("site")) is not None:
                    found.setdefault(site, set()).add(dim)
    return found


def learn_thresholds(gm: GraphModule, shapes: Shapes) -> None:
    """theta becomes theta * exp(s) with a parameter s = 0 of the given shape: positive, and steps of s are relative."""
    for site, node in neurons(gm).items():
        theta, value = arg(node, 1), _theta(gm, node)
        base = add_tensor(gm, f"theta_{site}_base", value, node)
        start = torch.zeros(shapes[site], dtype=value.dtype, device=value.device)
        scale = add_tensor(gm, f"theta_{site}{LOG_SCALE}", start, node, trainable=True)
        node.update_arg(
            1, insert(gm, node, node, aten.mul.Tensor, base, insert(gm, node, node, aten.exp.default, scale))
        )
        gm.graph.erase_node(theta)
        delattr(gm, str(theta.target))
    gm.recompile()


def learn_potentials(gm: GraphModule, shapes: Shapes) -> None:
    """Every neuron gets an initial potential on top of theta / 2: what it had, plus a unit times a parameter p = 0.

    The unit is 1 until someone knows better which steps are worth taking (`potential_*_unit`, []).
    """
    for site, node in neurons(gm).items():
        start, theta = facts(gm).sites[site].initial, _theta(gm, node)
        one = torch.ones((), dtype=theta.dtype, device=theta.device)
        base = add_tensor(gm, f"potential_{site}_base", 0 * one if start is None else start, node)
        zeros = torch.zeros(shapes[site], dtype=theta.dtype, device=theta.device)
        share = add_tensor(gm, f"potential_{site}{SHARE}", zeros, node, trainable=True)
        step = insert(gm, node, node, aten.mul.Tensor, add_tensor(gm, f"potential_{site}{UNIT}", one, node), share)
        node.args = (*node.args[:6], insert(gm, node, node, aten.add.Tensor, base, step))
    gm.recompile()


def learned_thresholds(gm: GraphModule) -> dict[str, Tensor]:
    """Site -> its threshold now, a copy; of a program in which thresholds learn."""
    found = _parameters(gm, "theta_", LOG_SCALE)
    return {site: attribute(gm, f"theta_{site}_base") * scale.exp() for site, scale in found.items()}


def learned_potentials(gm: GraphModule) -> dict[str, Tensor]:
    """Site -> its initial potential now, a copy; of a program in which potentials learn."""
    found = _parameters(gm, "potential_", SHARE)
    parts = {site: [attribute(gm, f"potential_{site}{part}") for part in ("_base", UNIT)] for site in found}
    return {site: base + unit * found[site] for site, (base, unit) in parts.items()}


def _parameters(gm: GraphModule, before: str, after: str) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in gm.named_parameters() if name.startswith(before) and name.endswith(after)}
    return {name.removeprefix(before).removesuffix(after): value for name, value in named.items()}
