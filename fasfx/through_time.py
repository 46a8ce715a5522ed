"""A step graph run from its first tick to its last, to learn from: gradients flow through time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from fasfx.alignment import Recorder, Seen, mean
from fasfx.ops import tick
from fasfx.program import drops, facts
from fasfx.runtime.ticks import StepGraph


class ThroughTime:
    """All ticks of a step graph.

    One spike of a multi neuron reaches all that is unsent, so that by its surrogate nothing of what it sent before is
    left in what it has sent now: gradients flow through the last tick alone, and no other is kept for them. (A value
    that jumps by more than a threshold loses what of its gradient one spike does not reach.) They flow through every
    tick where spikes are averaged, or counted. Dropout has the same masks in every tick.
    """

    def __init__(self, program: GraphModule) -> None:
        config = facts(program).config
        self._program, self._graph, self._steps = program, StepGraph(program), config.timesteps
        self._averages = tick.ticking(config.code).averages

    def keeps(self, spikes: bool) -> bool:
        """Whether every tick is kept for the gradient, not the last alone. spikes: whether they are counted."""
        return spikes or self._averages

    def run(self, inputs: Sequence[Tensor], spikes: bool = False, recompute: bool = False) -> Seen:
        """What is seen after the last tick.

        spikes:    whether to count them.
        recompute: keep the activations of one tick only for the gradient.
        """
        sent, active = [*self._graph.state(inputs).sent.values()], torch.zeros(())
        first = _random_state(inputs) if drops(self._program) else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.keeps(spikes)):
            passing = self._passing
            if recompute and torch.is_grad_enabled():
                passing = partial(checkpoint, passing, use_reentrant=False)
            for number in range(1, self._steps):
                with _again(first if number > 1 else None):
                    sent, now = passing(spikes, *inputs, torch.tensor(number), *sent)
                active = active + now
        with _again(first if self._steps > 1 else None):
            recorder, leaves, _ = self._tick(spikes, *inputs, torch.tensor(self._steps), *sent)
        return Seen(recorder.values, self._graph.output(leaves), active + mean(recorder.active))

    @torch.no_grad()
    def currents(self, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Site -> its neuron's input in every tick, in units of its threshold."""
        found: dict[str, list[Tensor]] = {}
        sent = [*self._graph.state(inputs).sent.values()]
        for number in range(1, self._steps + 1):
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


def _random_state(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """(of the CPU, devices of the inputs, of each of these)"""
    return torch.get_rng_state(), *get_device_states(*inputs)


@contextmanager
def _draws(state: tuple[Any, ...]) -> Iterator[None]:
    cpu, devices, states = state
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _again(state: tuple[Any, ...] | None) -> Any:
    """Random numbers are those that followed this state; what is drawn later goes on as if none had been drawn."""
    return nullcontext() if state is None else _draws(state)
