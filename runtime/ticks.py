"""The synchronous schedule in torch: a step graph, called once per tick, and the state it hands on."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_unflatten
from torch.utils.checkpoint import checkpoint

from fasfx.difference import Difference, main_output
from fasfx.errors import ConfigError, InputError
from fasfx.program import facts, fake

_FUNCTIONS = {"FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod, "Max": max, "Min": min}


@dataclass(frozen=True)
class NetworkState:
    """What every neuron has sent, and how many ticks are done.

    sent: site -> integers, shape of the site's value, in the unit of `fasfx::tick`.
    """

    sent: dict[str, Tensor]
    ticks: int = 0

    def reset(self) -> NetworkState:
        """The state before the first tick, for inputs of the same shapes."""
        return NetworkState({site: torch.zeros_like(value) for site, value in self.sent.items()})

    def clone(self) -> NetworkState:
        """A copy with tensors of its own."""
        return NetworkState({site: value.clone() for site, value in self.sent.items()}, self.ticks)

    def detach(self) -> NetworkState:
        """The same values without their history: truncates the gradient through time."""
        return NetworkState({site: value.detach() for site, value in self.sent.items()}, self.ticks)

    def to(self, *args: Any, **kwargs: Any) -> NetworkState:
        """On another device or in another dtype; arguments as of Tensor.to."""
        return NetworkState({site: value.to(*args, **kwargs) for site, value in self.sent.items()}, self.ticks)

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(value.nbytes for value in self.sent.values())

    def __repr__(self) -> str:
        return f"NetworkState({len(self.sent)} sites, {self.nbytes:,} bytes, after tick {self.ticks})"


class Settled(NamedTuple):
    """The output of the last tick run, how many were run, its relative L2 change then, and whether that was enough."""

    output: Any
    ticks: int
    change: float
    settled: bool


def settle(outputs: Iterator[Any], tolerance: float) -> Settled:
    """Take running outputs until the main one changes by at most `tolerance`, or they end."""
    if not tolerance > 0:
        raise ConfigError(f"tolerance={tolerance!r}: must be a positive number")
    output, change, ticks = next(outputs), math.inf, 1
    for after in outputs:
        difference = Difference()
        difference.add(main_output(after), main_output(output))
        output, change, ticks = after, difference.relative_l2, ticks + 1
        if change <= tolerance:
            break
    return Settled(output, ticks, change, change <= tolerance)


class StepGraph:
    """Runs a program lowered for the synchronous schedule. Holds no state: any number of calls may be under way."""

    def __init__(self, program: GraphModule) -> None:
        self.program = program

    def state(self, inputs: Sequence[Tensor]) -> NetworkState:
        """The state before the first tick for inputs of these shapes, on their device."""
        values = zip(self._shapes(inputs).items(), self._dtypes, strict=True)
        return NetworkState({s: torch.zeros(shape, dtype=d, device=inputs[0].device) for (s, shape), d in values})

    def step(self, inputs: Sequence[Tensor], state: NetworkState, recompute: bool = False) -> tuple[Any, NetworkState]:
        """One tick: the running output, shapes as the model's own, and the state after it; neither argument changes.

        recompute: keep no activations for the gradient, compute them again when it is asked for.
        """
        tick = torch.tensor(state.ticks + 1, device=inputs[0].device)
        given = (*inputs, tick, *state.sent.values())
        if recompute and torch.is_grad_enabled():
            leaves, sent = checkpoint(self.program, *given, use_reentrant=False)
        else:
            leaves, sent = self.program(*given)
        output = self.output(leaves)
        return output, NetworkState(dict(zip(state.sent, sent, strict=True)), state.ticks + 1)

    def fitting(self, state: NetworkState, inputs: Sequence[Tensor]) -> NetworkState:
        """The state, in the order of the graph; InputError if it is not one for these inputs."""
        sent = {}
        for site, shape in self._shapes(inputs).items():
            if site not in state.sent or tuple(state.sent[site].shape) != tuple(shape):
                found = list(state.sent[site].shape) if site in state.sent else "none"
                raise InputError(f"the state of site {site} has shape {found}: these inputs need {list(shape)}")
            sent[site] = state.sent[site]
        return NetworkState(sent, state.ticks)

    def output(self, leaves: Sequence[Any]) -> Any:
        """The model's own output type from its leaves."""
        spec = facts(self.program).outputs
        assert spec is not None
        return tree_unflatten(leaves, spec)

    def ticks(self, inputs: Sequence[Tensor], steps: int, recompute: bool = False) -> Iterator[Any]:
        """The running outputs of `steps` ticks from a fresh state."""
        state = self.state(inputs)
        for _ in range(steps):
            output, state = self.step(inputs, state, recompute)
            yield output

    # --- shapes --------------------------------------------------------------------------------------------

    def _shapes(self, inputs: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """Site -> shape of its state for these inputs."""
        shapes = self._shape_function(*(size for value in inputs for size in value.shape))
        return dict(zip(facts(self.program).states, shapes, strict=True))

    @cached_property
    def _shape_function(self) -> Any:
        sizes = placeholder_sizes(self.program)
        known = facts(self.program)
        given = [size for name, shape in sizes.items() if name not in known.added for size in shape]
        return shape_function(given, [sizes[name] for name in known.states.values()])

    @cached_property
    def _dtypes(self) -> list[torch.dtype]:
        names = facts(self.program).states.values()
        values = {str(n.target): n.meta["val"].dtype for n in self.program.graph.find_nodes(op="placeholder")}
        return [values[name] for name in names]


def placeholder_sizes(gm: GraphModule) -> dict[str, tuple[sympy.Expr, ...]]:
    """The symbolic shape of every input of a graph, for sympy."""
    values = {str(n.target): fake(n) for n in gm.graph.find_nodes(op="placeholder")}
    return {name: tuple(_expression(size) for size in v.shape) for name, v in values.items() if v is not None}


def shape_function(sizes: Sequence[sympy.Expr], shapes: Sequence[tuple[sympy.Expr, ...]]) -> Any:
    """A function from the sizes of all inputs, in a row, to shapes given as expressions in their symbols."""
    symbols = [s if s.is_Symbol and s not in sizes[:i] else sympy.Dummy() for i, s in enumerate(sizes)]
    return sympy.lambdify(symbols, list(shapes), modules=[_FUNCTIONS, "math"])


def _expression(size: Any) -> sympy.Expr:
    """A size of a symbolic shape for sympy."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
