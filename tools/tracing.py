"""Runs a program of any level and measures every neuron and group on its own input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fasfx import ops
from fasfx.local_errors import GroupFigures
from fasfx.ops.functions import FUNCTIONS
from fasfx.passes import Substitute
from fasfx.program import Site, arg, arguments, facts, module_path
from fasfx.runtime.ticks import StepGraph

ROUNDINGS = 4  # of a value, which its neuron is not blamed for
SAMPLES = 2**12  # values that are simulated step by step where only the error is asked for: a group's takes K neurons


@dataclass(frozen=True)
class Sent:
    """What one neuron or group did, over all its values.

    bound:    the largest error that is promised: of a neuron as a share of its threshold, of a group in the unit of its
              certified bound; None: none is, or the ledger is not there.
    measured: the largest error on its own input, in the same unit.
    excess:   the largest error over the bound at its place, of values in the range that is promised; at most 1 is kept.
    rate:     spikes per neuron and step; None for a group, and in a transparent run.
    """

    kind: str
    module: str
    bound: float | None
    measured: float
    excess: float
    rate: float | None = None


class Trace(Interpreter):
    """One run of a program.

    transparent: neurons and groups hand on what they are given, so that only other operators can change the output.
    values: site -> the value that its neuron is to send, until that is in other units; group -> its value; of a program
            without sites, node -> its value.
    shares: site -> what its neuron hands on, as a share of its threshold, whatever its unit.
    sent:   site or group -> what it did.
    """

    def __init__(self, program: GraphModule, transparent: bool) -> None:
        super().__init__(program)
        self.values: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self.sent: dict[str, Sent] = {}
        self._facts, self._transparent = facts(program), transparent
        self._bounds = {e.node: e.value for e in self._facts.ledger.entries if e.pass_name == Substitute.name}
        self._sent_so_far: dict[Node, Tensor] = {}  # by the ticks of this run

    def run_node(self, n: Node) -> Any:
        """The node's value, or what its neuron or group hands on."""
        if n.target not in ops.NEURONS | ops.GROUPS:
            value = super().run_node(n)
            named = n.name in self._facts.sites or not self._facts.sites
            if named and isinstance(value, Tensor) and value.is_floating_point():
                self.values[n.name] = value
            return value
        given = {k: self.env[v] if isinstance(v, Node) else v for k, v in arguments(n).items()}
        return self._group(n, given) if n.target in ops.GROUPS else self._neuron(n, given)

    def _group(self, n: Node, given: dict[str, Any]) -> Tensor:
        name, figures, x = str(n.meta["group"]), GroupFigures(given["function"]), given["x"]
        real = figures.add(n.target, given | _sampled({"x": x}) if self._transparent else given)
        exact = FUNCTIONS[given["function"]].exact(x)
        bound = self._bounds.get(name)
        excess = figures.measured / bound if bound else 0.0
        self.values[name] = exact if self._transparent else real / given["scale"]
        self.sent[name] = Sent("group", module_path(n), bound, figures.measured, excess)
        return exact * given["scale"] if self._transparent else real

    def _neuron(self, n: Node, given: dict[str, Any]) -> Tensor:
        handed: Tensor = given["x" if "x" in given else "u"]
        theta = self._threshold(n, given)
        self.shares[str(n.meta["site"])] = handed / theta
        if n.target is ops.tick.op:
            given["sent"] = self._sent_so_far.get(arg(n, 1), given["sent"])
        elif n.target is ops.fire.op and self._transparent:
            given |= _sampled({k: given[k] for k in ("x", "theta", "initial") if given[k] is not None})
            theta = given["theta"]
        real = arrived = n.target(**given)  # type: ignore[operator]
        if n.target is ops.tick.op:
            self._sent_so_far[n] = real
            if ops.tick.ticking(given["code"]).averages:
                arrived, handed = real / given["number"], handed * given["number"]
        elif n.target is ops.byte_count.op:  # integers are what its readers take
            zero = ops.byte_count.zero_of(*(given[k] for k in ("code", "steps", "levels", "signed")))
            arrived, handed = real.to(handed.dtype) - zero, real
        self._note(n, given, theta, arrived)
        return handed if self._transparent else real

    def _threshold(self, n: Node, given: dict[str, Any]) -> Any:
        """In the unit of the neuron's input."""
        if "theta" in given:
            return given["theta"]
        if n.target is ops.tick.op:
            return float(self._facts.config.unit(self._steps(n)))
        return float(ops.CODES[given["code"]].capacity(given["steps"], given["levels"]))

    def _steps(self, n: Node) -> int:
        return self._facts.config.neuron(self._facts.sites[str(n.meta["site"])].population)[1]

    def _note(self, n: Node, given: dict[str, Any], theta: Any, arrived: Tensor) -> None:
        """What the neuron did on the values that it was given."""
        site, code, steps = self._facts.sites[str(n.meta["site"])], ops.CODES[given["code"]], self._steps(n)
        x, levels, signed = given["x" if "x" in given else "u"], given["levels"], given["signed"]
        bound, share, error = code.error_bound(1.0, steps, levels), x / theta, (arrived - x).abs() / theta
        rate = None
        if not self._transparent:
            events = code.spikes(share * code.capacity(steps, levels), steps, levels, signed)
            rate = float((events != 0).double().mean())
            self.shares[site.name] = arrived / theta
        if n.target is ops.qcfs.op and (seen := self._seen(site)) is not None:  # also at the end of what was seen
            share = torch.cat([share.flatten(), (seen / theta).clamp(max=1).flatten()])
            error = torch.cat([error.flatten(), ((n.target(**given | {"x": seen}) - seen).abs() / theta).flatten()])
        inside = (share.abs() <= 1) & ((share >= 0) | bool(signed)) & (site.initial is None)
        over = (error - ROUNDINGS * torch.finfo(x.dtype).eps * share.abs()) / bound
        excess = float(torch.where(inside, over, 0.0).max())
        self.sent[site.name] = Sent("neuron", site.module, bound, float(error.max()), excess, rate)

    def _seen(self, site: Site) -> Tensor | None:
        """The largest values that calibration has seen and that must not be clipped; None for other thresholds."""
        seen = site.tail if self._facts.config.threshold == "percentile" else site.peak
        if site.dynamic or seen is None or any(t is not None for t in (site.fixed, site.theta, site.tuned)):
            return None
        return seen * min(1.0, self._facts.config.resolved_margin)


def _sampled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some of the values at random, and what belongs to them; all of them if they are few."""
    wide = dict(zip(given, torch.broadcast_tensors(*given.values()), strict=True))
    size = wide["x"].numel()
    if size <= SAMPLES:
        return given
    chosen = torch.randint(size, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    return {name: value.flatten()[chosen] for name, value in wide.items()}


@torch.no_grad()
def trace(program: GraphModule, inputs: Sequence[Tensor], transparent: bool) -> tuple[Trace, list[Tensor]]:
    """(the run, the tensors that it returns). A step graph runs all its ticks; the run is then that of the last."""
    run = Trace(program, transparent)
    if not facts(program).tick:
        return run, _tensors(run.run(*inputs))
    graph = StepGraph(program)
    state = [*graph.state(inputs).sent.values()]
    found: Any = None
    for number in range(1, facts(program).config.timesteps + 1):
        run._sent_so_far.clear()
        found, state = run.run(*inputs, torch.tensor(number), *state)
        last: Any = arg(program.graph.output_node(), 0)[1]
        state = [run._sent_so_far.get(node, value) for node, value in zip(last, state, strict=True)]
    return run, _tensors(found)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
