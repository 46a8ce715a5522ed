"""A step graph run from its first tick to its last, to learn from: gradients flow through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fasfx.alignment import Recorder, Seen
from fasfx.ops import tick
from fasfx.passes import Clip, Substitute
from fasfx.passes.lower import look_up
from fasfx.program import drops, facts
from fasfx.runner import Runner
from fasfx.runtime.ticks import StepGraph
from fasfx.step import make_step_graph


def step_graph(ranged: GraphModule, learn: Callable[[GraphModule], None] | None = None) -> GraphModule:
    """The step graph of a program at RANGED, thresholds not folded. learn: makes parameters of what is to learn."""
    program = Runner([Clip(), Substitute()]).run(ranged)
    if learn is not None:
        learn(program)
    make_step_graph(program, folded=False)
    look_up(program)
    return program


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
        here = inputs[0].device
        same_masks = partial(  # what a tick draws is forgotten, but for the last
            torch.random.fork_rng,
            [] if here.type == "cpu" else [here],
            enabled=drops(self._program),
            device_type=here.type,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.keeps(spikes)):
            passing = self._passing
            if recompute and torch.is_grad_enabled():
                passing = partial(checkpoint, passing, use_reentrant=False)
            for number in range(1, self._steps):
                with same_masks():
                    sent, now = passing(spikes, *inputs, torch.tensor(number), *sent)
                active = active + now
        recorder, leaves, _ = self._tick(spikes, *inputs, torch.tensor(self._steps), *sent)
        return Seen(recorder.values, self._graph.output(leaves), active + recorder.per_value)

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
        return sent, recorder.per_value
