"""The network that stage II tunes: a step graph whose thresholds and initial potentials learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fasfx.alignment import TINY, disagreement, mean, relative_errors
from fasfx.errors import ConfigError
from fasfx.learnable import (
    LOG_SCALE,
    SHARE,
    UNIT,
    Shapes,
    learn_potentials,
    learn_thresholds,
    learned_potentials,
    learned_thresholds,
)
from fasfx.ops import tick
from fasfx.program import attribute, copy_program, facts, freeze, set_dropout
from fasfx.runner import tidy
from fasfx.teaching import Taught, Tensors
from fasfx.through_time import ThroughTime, step_graph

FACTORS = tuple(2.0 ** (quarter / 4) for quarter in range(-12, 5))  # of a threshold, that `search` tries


class Student:
    """The network as a step graph whose thresholds and potentials learn; everything else is frozen.

    recompute: keep the activations of one tick only for the gradient.
    """

    def __init__(
        self,
        ranged: GraphModule,
        shapes: Callable[[GraphModule], Shapes],
        logits: float,
        spikes: float,
        recompute: bool = False,
    ) -> None:
        found: Shapes = {}

        def learn(program: GraphModule) -> None:
            set_dropout(program, False)
            freeze(program)
            found.update(shapes(program))
            if not found:
                raise ConfigError("thresholds of this network are computed row by row: there are none to tune")
            learn_potentials(program, found)
            learn_thresholds(program, found)

        self.program = program = step_graph(ranged, learn)
        tidy(program)
        self._through, self._recompute = ThroughTime(program), recompute
        self._logits, self._spikes, self._sites = logits, spikes, frozenset(found)
        config = facts(program).config
        # A rate neuron spreads its initial potential over its ticks.
        self._spread = config.timesteps if tick.ticking(config.code).averages else 1
        self.scales = [p for n, p in program.named_parameters() if n.endswith(LOG_SCALE)]
        self.shares = [p for n, p in program.named_parameters() if n.endswith(SHARE)]

    @property
    def sparse(self) -> bool:
        """Whether fewer spikes are asked for."""
        return self._spikes > 0

    def loss(self, batch: Taught) -> tuple[Tensor, Tensor]:
        """(the whole loss, the alignment in it)."""
        seen = self._through.run(batch.inputs, self.sparse, self._recompute)
        alignment = mean(relative_errors(seen.values, batch.values))
        kl = disagreement(seen.output, batch.output, batch.mask) if self._logits else 0.0
        return alignment + self._logits * kl + self._spikes * seen.spikes, alignment

    @torch.no_grad()
    def measure(self, batches: Iterable[Taught]) -> tuple[float, float]:
        """`loss` over batches, in float."""
        found = [self.loss(batch) for batch in batches]
        loss, alignment = (fmean(float(part) for part in parts) for parts in zip(*found, strict=True))
        return loss, alignment

    @torch.no_grad()
    def errors(self, batches: Iterable[Taught]) -> Tensors:
        """Site -> relative squared error, mean over batches."""
        found = [relative_errors(self._through.run(batch.inputs).values, batch.values) for batch in batches]
        return {site: torch.stack([one[site] for one in found]).mean() for site in found[0]}

    @torch.no_grad()
    def search(self, batches: Iterable[Taught]) -> Tensors:
        """Site -> the squared error to the teacher of every threshold times each of FACTORS, [17, ...].

        Neurons are run on the currents that the network gives them now; changes elsewhere are not foreseen.
        """
        errors: dict[str, Tensor] = {}
        theta = learned_thresholds(self.program)
        for batch in batches:
            for site, us in self._learning(self._through.currents(batch.inputs)):
                shape = attribute(self.program, f"theta_{site}{LOG_SCALE}").shape
                gaps = (self._neuron(site, us, theta[site], factor) - batch.values[site] for factor in FACTORS)
                found = torch.stack([gap.square().sum_to_size(shape) for gap in gaps])
                errors[site] = errors.get(site, 0.0) + found
        return errors

    @torch.no_grad()
    def rescale(self, errors: Tensors, least: float) -> None:
        """Closed form: every threshold becomes the best of FACTORS times itself, by what `search` found.

        Those whose error falls by less than the share `least` stay.
        """
        factors, same = torch.tensor(FACTORS), FACTORS.index(1.0)
        for site, found in errors.items():
            scale = attribute(self.program, f"theta_{site}{LOG_SCALE}")
            worth = found.amin(0) < (1 - least) * found[same]
            scale.add_(torch.where(worth, factors.to(scale)[found.argmin(0)].log(), 0.0))

    def _neuron(self, site: str, currents: list[Tensor], theta: Tensor, factor: float) -> Tensor:
        """What the site transmits after the last tick if its threshold is `factor` times theta, what it is now."""
        of, config = facts(self.program).sites[site], facts(self.program).config
        row, (_, steps, levels) = tick.ticking(config.code), config.neuron(of.population)
        sent = torch.zeros_like(currents[0])
        for number, current in enumerate(currents, 1):
            for _ in range(steps // config.timesteps):
                sent = row.tick(current / factor, sent, torch.tensor(number), levels, of.signed)
        return sent * (theta * factor / config.unit(steps)) / (len(currents) if row.averages else 1)

    @torch.no_grad()
    def means(self, batches: Iterable[Taught]) -> Tensors:
        """Site -> its mean error, in the unit and shape of its potential."""
        gaps: dict[str, list[Tensor]] = {}
        for batch in batches:
            for site, value in self._learning(self._through.run(batch.inputs).values):
                shape = attribute(self.program, f"potential_{site}{SHARE}").shape
                gap = (batch.values[site] - value) * self._spread
                gaps.setdefault(site, []).append(gap.sum_to_size(shape) * (math.prod(shape) / gap.numel()))
        return {site: torch.stack(found).mean(0) for site, found in gaps.items()}

    @torch.no_grad()
    def match_means(self, means: Tensors, share: float) -> None:
        """Closed form: every potential takes up `share` of its site's mean error."""
        for site, mean_error in means.items():
            attribute(self.program, f"potential_{site}{SHARE}").add_(mean_error * share / self._unit(site))

    @torch.no_grad()
    def set_units(self, batches: Iterable[Taught]) -> None:
        """Potentials are learned in units of the root of their site's mean squared error."""
        squares: dict[str, list[Tensor]] = {}
        for batch in batches:
            for site, value in self._learning(self._through.run(batch.inputs).values):
                squares.setdefault(site, []).append((value - batch.values[site]).square().mean())
        for site, found in squares.items():
            self._unit(site).copy_(torch.stack(found).mean().sqrt() * self._spread).clamp_(min=TINY)

    def _learning(self, by_site: dict[str, Any]) -> list[tuple[str, Any]]:
        """Those that can learn: a threshold computed row by row cannot."""
        return [(site, value) for site, value in by_site.items() if site in self._sites]

    def _unit(self, site: str) -> Tensor:
        unit: Tensor = attribute(self.program, f"potential_{site}{UNIT}")
        return unit

    def state(self) -> Tensors:
        """What has been learned, copied."""
        return {n: p.detach().clone() for n, p in self.program.named_parameters() if n.endswith((LOG_SCALE, SHARE))}

    def load(self, state: Tensors) -> None:
        """Take up what `state` gave."""
        with torch.no_grad():
            for name, value in state.items():
                attribute(self.program, name).copy_(value)

    def result(self, ranged: GraphModule) -> GraphModule:
        """The program at RANGED with what was learned as facts of its sites."""
        new = copy_program(ranged)
        theta, initial = learned_thresholds(self.program), learned_potentials(self.program)
        facts(new).sites = {
            name: dataclasses.replace(site, tuned=theta[name], initial=initial[name]) if name in theta else site
            for name, site in facts(new).sites.items()
        }
        return new
