"""What a network is tuned towards: its batches with the answers of two teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fasfx.alignment import Seen, seen_by
from fasfx.capture import evaluating
from fasfx.difference import output_mask
from fasfx.passes import Clip
from fasfx.program import copy_program, facts
from fasfx.runner import Runner
from fasfx.through_time import ThroughTime, step_graph

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Taught:
    """Inputs in the network's order, what the teachers give for them, and which positions count."""

    inputs: list[Tensor]
    values: Tensors
    output: Any
    mask: Tensor | None


class Lessons:
    """Batches with the teachers' answers, worked out whenever they are asked for, not kept.

    Site values come from the first teacher, logits from the second.
    """

    def __init__(self, ranged: GraphModule, teacher: nn.Module | None, given: list[Tensors]) -> None:
        self._first, self._second, self._given = _first_teacher(ranged), teacher, given
        self._constants = facts(ranged).constants

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[Taught]:
        return map(self._taught, self._given)

    def _taught(self, inputs: Tensors) -> Taught:
        with torch.no_grad():
            seen = self._first([*inputs.values()])
            output = seen.output
            if self._second is not None:
                with evaluating(self._second):
                    output = self._second(**inputs, **self._constants)
        return Taught([*inputs.values()], seen.values, output, output_mask(inputs))


def _first_teacher(ranged: GraphModule) -> Callable[[list[Tensor]], Seen]:
    """What stage I trained, at the T it was trained with or the larger one of now; else the original."""
    program = copy_program(ranged)
    of = facts(program)
    if of.trained is None:
        return partial(seen_by, program)
    of.config = of.config.replace(timesteps=max(of.trained, of.config.timesteps))
    of.sites = {n: dataclasses.replace(site, tuned=None, initial=None) for n, site in of.sites.items()}
    if not of.through_time:
        return partial(seen_by, Runner([Clip()]).run(program))
    return ThroughTime(step_graph(program)).run
