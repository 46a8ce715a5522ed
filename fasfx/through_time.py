"""A step graph run from its first tick to its last, to learn from: gradients flow through time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fasfx.alignment import Recorder, mean
from fasfx.ops import tick
from fasfx.program import facts
from fasfx.runtime.ticks import StepGraph


class Seen(NamedTuple):
    """What a network did with a batch.

    values: site -> what it transmits in the end.   output: in the model's own type.   spikes: per value, [].
    """

    values: dict[str, Tensor]
    output: Any
    spikes: Tensor


class ThroughTime:
    """All ticks of a step graph.

    One spike of a multi neuron reaches all that is unsent, so that by its surrogate nothing of what it sent before is
    left in what it has sent now: gradients flow through the last tick alone, and no other is kept for them. (A value
    that jumps by more than a threshold loses what of its gradient one spike does not reach.) They flow through every
    tick where spikes are averaged, or counted.
    """

    def __init__(self, program: GraphModule) -> None:
        config = facts(program).config
        self._program, self._steps, self._ticks = program, StepGraph(program), config.timesteps
        self._averages = tick.ticking(config.code).averages

    def run(
        self, inputs: Sequence[Tensor], spikes: bool = False, recompute: bool = False, seed: int | None = None
    ) -> Seen:
        """What is seen after the last tick.

        spikes:    whether to count them.
        recompute: keep the activations of one tick only for the gradient.
        seed:      of dropout, for the same masks in every tick; None where there is none.
        """
        sent, active = [*self._steps.state(inputs).sent.values()], torch.zeros(())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (spikes or self._averages)):
            passing = self._passing
            if recompute and torch.is_grad_enabled():
                passing = partial(checkpoint, passing, use_reentrant=False)
            for number in range(1, self._ticks):
                with _masks_of(seed):
                    sent, now = passing(spikes, *inputs, torch.tensor(number), *sent)
                active = active + now
        with _masks_of(seed):
            recorder, leaves, _ = self._tick(spikes, *inputs, torch.tensor(self._ticks), *sent)
        return Seen(recorder.values, self._steps.output(leaves), active + mean(recorder.active))

    @torch.no_grad()
    def currents(self, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Site -> its neuron's input in every tick, in units of its threshold."""
        found: dict[str, list[Tensor]] = {}
        sent = [*self._steps.state(inputs).sent.values()]
        for number in range(1, self._ticks + 1):
            recorder, _, sent = self._tick(False, *inputs, torch.tensor(number), *sent)
            for site, current in recorder.currents.items():
                found.setdefault(site, []).append(current)
        return found

    def _tick(self, spikes: bool, *given: Tensor) -> tuple[Recorder, list[Any], list[Tensor]]:
        recorder = Recorder(self._program, spikes)
        leaves, sent = recorder.run(*given)
        return recorder, leaves, sent

    def _passing(self, spikes: bool, *given: Tensor) -> tuple[list[Tensor], Tensor]:
        """A tick that is not the last: only its state and its spikes count."""
        recorder, _, sent = self._tick(spikes, *given)
        return sent, mean(recorder.active)


@contextmanager
def _masks_of(seed: int | None) -> Iterator[None]:
    """Random numbers begin at a seed; those drawn elsewhere go on as if none had been drawn here."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
