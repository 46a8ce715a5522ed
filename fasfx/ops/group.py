"""`fasfx::group`: K spiking neurons that share one input, simulated step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fasfx.ops.codes import CODES
from fasfx.ops.functions import FUNCTIONS
from fasfx.ops.library import LIBRARY, implement
from fasfx.ops.reductions import REDUCTIONS

LIBRARY.define(
    "group(Tensor x, Tensor edges, Tensor values, str function, float unit, float rest, float left, float right, "
    "float scale, str code, int steps) -> Tensor"
)


class Neurons(NamedTuple):
    """The neurons between consecutive breakpoints, one entry each, [K].

    start:     the end nearer to rest, where a neuron begins to fire.
    direction: 1 if it fires for more than that, -1 if for less.
    counts:    its threshold, a power of two.
    """

    start: Tensor
    direction: Tensor
    counts: Tensor

    @property
    def levels(self) -> list[int]:
        """So that 2^(levels - 1) counts are the threshold."""
        return [int(counts).bit_length() for counts in self.counts.tolist()]

    def weights(self, values: Tensor) -> Tensor:
        """What one count of each adds to the group's output."""
        return self.direction * values.diff() / self.counts


def neurons_of(edges: Tensor, unit: float, rest: float) -> Neurons:
    """From breakpoints [K + 1]."""
    upwards = edges[:-1] >= rest
    start, direction = torch.where(upwards, edges[:-1], edges[1:]), torch.where(upwards, 1.0, -1.0).to(edges)
    return Neurons(start, direction, (edges.diff() / unit).round())


def group(
    x: Tensor, edges: Tensor, values: Tensor, function: str, unit: float, rest: float, left: float, right: float,
    scale: float, code: str, steps: int,
) -> Tensor:  # fmt: skip
    """scale * f(x) from the spikes of a group: value at rest, plus the sum of weight * count, plus the tails' ramps.

    Shape:  x any; edges, values [K + 1]; result like x.   Unit: that of scale * f(x); `unit` is the input of one count.
    Error:  the group's bound (fasfx.groups), certified on the core's interval and the tails.
    Grad:   that of the function itself.
    Source: universal group operators, Jiang et al., STA, ICLR 2024; theirs are trained, these are computed.
    """
    reduction = REDUCTIONS[FUNCTIONS[function].reduction]
    z, k = reduction.split(x.detach().to(edges.dtype))
    neurons = neurons_of(edges, unit, rest)
    total = torch.zeros_like(z) + (values * (edges == rest)).sum()
    sent = events(z, neurons, unit, code, steps)
    for weight, levels, spikes in zip(neurons.weights(values), neurons.levels, sent, strict=True):
        total = total + weight * CODES[code].decode(spikes, levels).to(z.dtype)
    return like_function(reduction.join(with_ramps(total, z, left, right), k).to(x.dtype), x, function, scale)


def events(z: Tensor, neurons: Neurons, unit: float, code: str, steps: int) -> Iterator[Tensor]:
    """What each neuron sends for the reduced input z, int8 [steps, ...], one neuron at a time."""
    for start, direction, counts, levels in zip(*neurons, neurons.levels, strict=True):
        current = ((z - start) * (direction / unit)).clamp(min=0).minimum(counts)
        yield CODES[code].spikes(current, steps, levels, False)


def with_ramps(y: Tensor, z: Tensor, left: float, right: float) -> Tensor:
    """y plus left * min(z, 0) plus right * max(z, 0): the straight parts of a function, which no neuron has to bend."""
    y = y + right * z.clamp(min=0) if right else y
    return y + left * z.clamp(max=0) if left else y


def like_function(y: Tensor, x: Tensor, function: str, scale: float) -> Tensor:
    """y forward, the gradient of scale * f(x) backward."""
    if torch.is_grad_enabled() and x.requires_grad:
        smooth = scale * FUNCTIONS[function].exact(x)
        return smooth + (y - smooth).detach()
    return y


implement("group", group)
op = torch.ops.fasfx.group.default
