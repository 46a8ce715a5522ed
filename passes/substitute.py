"""CLIPPED -> SPIKING: clipped values become spiking neurons, functions of one variable neuron groups.

qcfs(x, theta)  ->  fire(x, theta)
f(x)  ->  group(x)   (nonlinear="spiking"; f: any row of fasfx.ops.functions, or one of the user's)
What a function is left in float for is noted with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.groups import Group, bound_formula, group
from fasfx.ledger import Bound, Entry, Exact
from fasfx.levels import is_skipped
from fasfx.ops.functions import FUNCTIONS, OPERATORS, Function, function_of
from fasfx.ops.reductions import REDUCTIONS
from fasfx.program import add_tensor, arguments, decline, facts, fake, insert, module_path
from fasfx.rewrite import rewrite
from fasfx.runner import Pass
from fasfx.synapses import carried_values

aten = torch.ops.aten
_OF_POSITIONS = {aten.sin.default, aten.cos.default}  # also made into groups where they make rotary tables


@rewrite(
    into=lambda x, theta, code, steps, levels, signed: ops.fire.op(x, theta, code, steps, levels, signed),
    error=Exact("constant input: the neuron's spikes sum to the closed form"),
    when=lambda code: code in ops.CODES or f"no neuron is known for code {code!r}",
)
def qcfs_to_fire(x: Tensor, theta: Tensor, code: str, steps: int, levels: int, signed: bool) -> Any:
    """A clipped value is the spike count of a neuron with threshold theta, initial potential theta / 2.

    Shape:  x any, theta broadcastable to x; result like x.   Unit: that of x.
    Error:  none for constant input; what clipping cost is in the ledger already.
    Source: Bu et al., ICLR 2022, eq. 9 (rate); the code's row in fasfx.ops.codes.
    """
    return ops.qcfs.op(x, theta, code, steps, levels, signed)


@rewrite(
    into=lambda x, theta, code, steps, levels, signed, initial: ops.fire.op(
        x, theta, code, steps, levels, signed, initial
    ),
    error=Exact("constant input: the neuron's spikes sum to the closed form"),
)
def tuned_qcfs_to_fire(
    x: Tensor, theta: Tensor, code: str, steps: int, levels: int, signed: bool, initial: Tensor
) -> Any:
    """The same with an initial potential on top of theta / 2.

    Shape:  x any, theta and initial broadcastable to x; result like x.   Unit: that of x.
    Error:  none for constant input.
    Source: FAS, arXiv 2502.04405, stage II.
    """
    return ops.qcfs.op(x, theta, code, steps, levels, signed, initial)


class Substitute(Pass):
    """Every qcfs becomes a neuron of the same code, every function of one variable a group of them.

    Error:  that of a group is certified (fasfx.groups) and in the ledger, in closed form in T and K.
    Source: universal group operators, STA, ICLR 2024.
    """

    name, takes, gives, numerics = "substitute", "CLIPPED", "SPIKING", "ledger"
    rules = (qcfs_to_fire, tuned_qcfs_to_fire)

    def rewrite(self, gm: GraphModule) -> bool:
        """The rule, then the functions, which stay exact while a network trains."""
        changed = super().rewrite(gm)
        if facts(gm).config.nonlinear == "spiking" and not facts(gm).trainable:
            changed |= functions_to_groups(gm)
        return changed


def functions_to_groups(gm: GraphModule) -> bool:
    """Every function on values, outside skipped modules; True if there was one."""
    values, stored = carried_values(gm), dict[tuple[Group, torch.dtype], tuple[Node, Node]]()
    for node in [n for n in gm.graph.nodes if n.target in OPERATORS]:
        if not (node in values or node.target in _OF_POSITIONS) or is_skipped(gm, node):
            continue
        name = function_of(node.target, arguments(node))
        if name is None:
            reason = f"no group is known for {node.target} with these arguments: register_function takes yours"
            decline(gm, "substitute", "function_to_group", node.name, reason)
        elif may_apply("substitute", "function_to_group", node):
            _to_group(gm, node, FUNCTIONS[name], stored)
    return bool(stored)


def _to_group(
    gm: GraphModule, node: Node, function: Function, stored: dict[tuple[Group, torch.dtype], tuple[Node, Node]]
) -> None:
    config, sites = facts(gm).config, facts(gm).sites
    population = max((sites[user.meta["site"]].population for user in node.users if "site" in user.meta), default=1)
    span = _with_headroom(*facts(gm).ranges[node.name]) if function.needs_range else None
    found = group(function.name, *config.group(population), span)
    value = fake(node)
    assert value is not None
    dtype = value.dtype if value.dtype.itemsize >= 4 else torch.float32  # half precision computes in float32
    if (found, dtype) not in stored:
        edges, values = (tensor.to(dtype=dtype, device=value.device) for tensor in (found.edges, found.values))
        stored[found, dtype] = (
            add_tensor(gm, f"edges_{function.name}", edges, node),
            add_tensor(gm, f"values_{function.name}", values, node),
        )
    left, right = (tail[0] if tail else 0.0 for tail in (function.left, function.right))
    place = (function.name, found.unit, found.rest, left, right, 1.0, found.code, found.steps)
    node.meta["group"] = node.name
    result = insert(gm, node, node, ops.group.op, node.args[0], *stored[found, dtype], *place)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    _note(gm, node, found)


def _with_headroom(low: float, high: float) -> tuple[float, float]:
    """The range seen, half as wide again at both ends, but not across 0: the function may end there."""
    spare = (high - low) / 2
    return (max(low - spare, 0.0) if low >= 0 else low - spare, min(high + spare, 0.0) if high <= 0 else high + spare)


def _note(gm: GraphModule, node: Node, found: Group) -> None:
    function = FUNCTIONS[found.function]
    reduction = REDUCTIONS[function.reduction]
    where = "calibrated range" if function.needs_range else "normal numbers" if reduction.normal else "all inputs"
    relative = ", relative to the power of two" if reduction.relative else ""
    bound = Bound(bound_formula(found), f"{where}{relative}; K = {found.size}; but for float rounding")
    entry = Entry("substitute", f"group_{found.function}", node.name, module_path(node), bound, found.bound)
    facts(gm).ledger.add(entry)
