"""`fasfx::group`: K spiking neurons that share one input, simulated step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fasfx.ops.codes import CODES
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.library import LIBRARY
from fasfx.ops.reductions import REDUCTIONS

LIBRARY.define(
    "group(Tensor x, Tensor edges, Tensor values, str function, float unit, float rest, float left, float right, "
    "float scale, str code, int steps) -> Tensor"
)


@dataclass(frozen=True)
class GroupNeuron:
    """One neuron: fires for the part of the input between `start` and start + direction * threshold.

    weight: what one of its counts adds to the group's output.   levels: so that 2^(levels - 1) counts are a threshold.
    """

    start: float
    direction: int
    unit: float
    weight: float
    levels: int

    def current(self, z: Tensor) -> Tensor:
        """Its input in counts, in [0, 2^(levels - 1)]; shape of z."""
        return ((z - self.start) * (self.direction / self.unit)).clamp(0, 2.0 ** (self.levels - 1))


def neurons_of(edges: Tensor, values: Tensor, unit: float, rest: float) -> Iterator[GroupNeuron]:
    """The neurons between consecutive breakpoints, each beginning at its end nearer to rest."""
    points, heights = edges.tolist(), values.tolist()
    for a, b, at_a, at_b in zip(points, points[1:], heights, heights[1:], strict=False):
        counts = round((b - a) / unit)
        weight, levels = (at_b - at_a) / counts, counts.bit_length()
        yield GroupNeuron(a, 1, unit, weight, levels) if a >= rest else GroupNeuron(b, -1, unit, -weight, levels)


def group(
    x: Tensor, edges: Tensor, values: Tensor, function: str, unit: float, rest: float, left: float, right: float,
    scale: float, code: str, steps: int,
) -> Tensor:  # fmt: skip
    """scale * f(x) from the spikes of a group: value at rest, plus the sum of weight * count, plus the tails' ramps.

    Shape:  x any; edges, values [K + 1]; result like x.   Unit: `unit` is the input of one count.
    Error:  the group's bound (fasfx.groups), certified on the core's interval and the tails.
    Grad:   that of the function itself.
    """
    wide = x.detach().to(edges.dtype)
    z, k = REDUCTIONS[FUNCTIONS[function].reduction].split(wide)
    total = torch.zeros_like(z) + values[edges == rest]
    for neuron in neurons_of(edges, values, unit, rest):
        events = CODES[code].spikes(neuron.current(z), steps, neuron.levels, False)
        total = total + neuron.weight * CODES[code].decode(events, neuron.levels).to(z.dtype)
    total = with_ramps(total, z, left, right)
    return like_function(REDUCTIONS[FUNCTIONS[function].reduction].join(total, k).to(x.dtype), x, function, scale)


def with_ramps(y: Tensor, z: Tensor, left: float, right: float) -> Tensor:
    """y plus left * min(z, 0) plus right * max(z, 0): the straight parts of a function, which no neuron has to bend."""
    y = y if right == 0 else y + (z.clamp(min=0) if right == 1 else right * z.clamp(min=0))
    return y if left == 0 else y + left * z.clamp(max=0)


def like_function(y: Tensor, x: Tensor, function: str, scale: float) -> Tensor:
    """y forward, the gradient of scale * f(x) backward."""
    if torch.is_grad_enabled() and x.requires_grad:
        smooth = scale * FUNCTIONS[function].exact(x)
        return smooth + (y - smooth).detach()
    return y


LIBRARY.impl("group", group, "CompositeImplicitAutograd")
op = torch.ops.fasfx.group.default
