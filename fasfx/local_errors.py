"""What each neuron and each group does wrong on its own, and how much of it reaches the output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fasfx import ops
from fasfx.difference import main_output, output_mask
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.reductions import REDUCTIONS
from fasfx.passes import Clip, Substitute
from fasfx.passes.lower import look_up
from fasfx.program import arguments
from fasfx.runner import Runner

if TYPE_CHECKING:
    from fasfx.model import SpikingModel

Sender = tuple[str, str]
VECTORS = 8  # random vectors per prediction: each contribution is known to about a quarter of itself


class LocalErrors(Interpreter):
    """Runs the values of the original network through neurons and groups, which pass them on unharmed.

    values: ("site" or "group", its name) -> the exact value it is to send.   errors: -> what it sends, less that.
    groups: group -> figures over all runs so far.
    """

    def __init__(self, snn: SpikingModel) -> None:
        super().__init__(spiking_program(snn))
        self.values: dict[Sender, Tensor] = {}
        self.errors: dict[Sender, Tensor] = {}
        self.groups: dict[str, GroupFigures] = {}

    def run_node(self, n: Node) -> Any:
        """The exact value of every node."""
        if n.target not in (ops.fire.op, ops.lookup.op):
            return super().run_node(n)
        given = {k: self.env[v] if isinstance(v, Node) else v for k, v in arguments(n).items()}
        if n.target is ops.fire.op:
            sender, exact, sent = ("site", n.meta["site"]), given["x"].clone(), ops.qcfs.op(**given).detach()
        else:
            sender, exact = ("group", n.meta["group"]), FUNCTIONS[given["function"]].exact(given["x"])
            sent = self.groups.setdefault(n.meta["group"], GroupFigures(given["function"])).add(n.target, given)
        if torch.is_grad_enabled() and not exact.requires_grad:
            exact = exact.detach().requires_grad_()
        self.values[sender], self.errors[sender] = exact, sent - exact.detach()
        return exact


def spiking_program(snn: SpikingModel) -> GraphModule:
    """Neurons with their thresholds, groups in closed form; nothing folded, so every value has its own unit."""
    program = Runner([Clip(), Substitute()]).run(snn.ranged)
    look_up(program)
    return program


@dataclass
class GroupFigures:
    """Running figures of one group.

    measured: largest error of its sum of spikes, in the unit of its certified bound: relative to the power of two
              that the value was reduced by, where the bound is.
    clipped:  inputs outside a calibrated range.   values: all inputs.
    """

    function: str
    neurons: int = 0
    measured: float = 0.0
    clipped: int = 0
    values: int = 0

    @torch.no_grad()
    def add(self, operator: Any, given: dict[str, Any]) -> Tensor:
        """Note what `fasfx::group` or `fasfx::lookup` gives for these arguments, in float64; returns it."""
        x, function = given["x"], FUNCTIONS[given["function"]]
        wide = given | {k: v.double() for k, v in given.items() if k in ("x", "table", "edges", "values")}
        low, high, self.neurons, dtype = _extent(given)
        sent: Tensor = operator(**wide)
        gap = (sent / given["scale"] - function.exact(x.double())).abs()
        reduction = REDUCTIONS[function.reduction]
        z, parts = reduction.split(x.double())
        if reduction.relative:
            gap = gap / reduction.join(torch.ones_like(z), parts).abs()
        if function.needs_range:
            inside = (z >= low) & (z <= high)
            self.clipped, gap = self.clipped + int((~inside).sum()), gap[inside]
        if reduction.normal:
            gap = gap[x.abs() >= torch.finfo(dtype).tiny]
        finite = gap[gap.isfinite()]
        self.measured = max(self.measured, float(finite.max()) if finite.numel() else 0.0)
        self.values += x.numel()
        return sent.to(x.dtype)


def _extent(given: dict[str, Any]) -> tuple[float, float, int, torch.dtype]:
    """Both ends of what a group covers, its number of neurons, and the dtype it computes in."""
    if "edges" not in given:
        return given["low"], given["high"], given["neurons"], given["table"].dtype
    edges = given["edges"]
    return float(edges[0]), float(edges[-1]), len(edges) - 1, edges.dtype


@dataclass
class Prediction:
    """First-order prediction of the output's relative L2 error, for constant input.

    alone: ("site" or "group", its name) -> what its own error alone would cause.   total: all of them together.
    """

    alone: dict[Sender, float] = field(default_factory=dict)
    total: float = 0.0


def predict(local: LocalErrors, inputs: list[Tensor], batch: dict[str, Any]) -> Prediction:
    """|J e| of every local error e, from products of random signs v with the Jacobian J: E (v J e)^2 = |J e|^2.

    Values whose gradient is not finite, such as that of a root at 0, and outputs that are not, are left out; NaN if the
    output has no derivative at all.
    Memory: the activations of one pass through the network, and one gradient per site and group.
    Source: Hutchinson's estimator, 1989.
    """
    with torch.enable_grad():
        output = main_output(local.run(*inputs))
    mask = output_mask(batch)
    counts = torch.ones_like(output)
    if mask is not None and mask.shape == output.shape[: mask.dim()]:
        counts = counts * mask.reshape(*mask.shape, *[1] * (output.dim() - mask.dim())).to(output)
    generator = torch.Generator().manual_seed(0)
    senders = [sender for sender, value in local.values.items() if value.requires_grad]
    if not output.is_floating_point():  # a choice, such as an argmax, has no derivative
        return Prediction(dict.fromkeys(local.values, math.nan), math.nan)
    if not output.requires_grad:  # nothing that is sent reaches it
        return Prediction()
    squares, together = dict.fromkeys(senders, 0.0), 0.0
    for _ in range(VECTORS):
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        found = torch.autograd.grad(
            output, [local.values[s] for s in senders], signs * counts, retain_graph=True, allow_unused=True
        )
        moved = [
            0.0 if g is None else float((g.double() * local.errors[s].double()).nan_to_num(0.0, 0.0, 0.0).sum())
            for s, g in zip(senders, found, strict=True)
        ]
        together += sum(moved) ** 2 / VECTORS
        for sender, value in zip(senders, moved, strict=True):
            squares[sender] += value**2 / VECTORS
    size = float((output.detach().double().nan_to_num(0.0, 0.0, 0.0) * counts).norm())
    if not size:
        return Prediction()
    return Prediction({s: square**0.5 / size for s, square in squares.items()}, together**0.5 / size)
