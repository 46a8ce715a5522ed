"""Peers in torch: what stepwise spiking networks cost, and whether SpikingJelly converts the model as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fasfx
from fasfx.errors import RuntimeUnavailableError
from fasfx.tools.bench import cases, cost, jelly, timing
from fasfx.tools.bench.data import Batch
from fasfx.tools.bench.tables import Line, Table, plain

IF_STEPS, TICKS = 8, 5


class IntegrateAndFire(nn.Module):
    """FAS's neuron in the place of an activation function: soft reset, initial potential theta / 2 (2502.04405, eq. 2).

    What it sends for a tensor [...] is 0 or theta. `v` is the membrane potential, None before the first step.
    """

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """One time step."""
        v = x + (self.theta / 2 if self.v is None else self.v)
        spike = (v >= self.theta).to(x) * self.theta
        self.v = v - spike
        return spike


class Stepwise(nn.Module):
    """The paper's inference: the whole network once per time step, its outputs averaged."""

    def __init__(self, model: nn.Module, theta: float = 1.0) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        kinds = {type(module) for name, module in self.model.named_modules() if name.endswith("intermediate_act_fn")}
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if type(child) in kinds:
                    setattr(module, name, IntegrateAndFire(theta))

    def forward(self, **inputs: Tensor) -> Tensor:
        """The mean of the last hidden states, [B, S, D]."""
        neurons = [module for module in self.model.modules() if isinstance(module, IntegrateAndFire)]
        for neuron in neurons:
            neuron.v = None
        return torch.stack([self.model(**inputs).last_hidden_state for _ in range(IF_STEPS)]).mean(0)


def peers(quick: bool) -> Iterator[Table]:
    """Time in torch over the original's, batch × length."""
    model, calibration = cases.minilm()[0], cases.calibration("news", quick=True)
    shapes = ((1, 16),) if quick else ((1, 16), (1, 128), (8, 128))
    nets: dict[str, Callable[..., Any]] = {
        cost.ORIGINAL: model,
        "integer form, T = 7": fasfx.convert(model, calibration, fasfx.SpikeConfig.integer()),
        f"synchronous, T = {TICKS}": fasfx.convert(model, calibration, fasfx.SpikeConfig.low_latency(TICKS)),
        f"FAS's IF loop, T = {IF_STEPS} (activations only)": Stepwise(model),
    }
    rows: dict[str, list[float]] = {name: [] for name in nets}
    for rows_of, length in shapes:
        (batch,) = cases.evaluation("tales", 1, rows_of, length)
        calls = {name: partial(net, **batch) for name, net in nets.items()}
        for name, ratio in timing.ratios(timing.interleaved(calls, 2 if quick else 9), cost.ORIGINAL).items():
            rows[name].append(ratio.median)
    lines: list[Line] = [plain(name, figures, cost.RATIO) for name, figures in rows.items()]
    note = f"{timing.CONDITIONS}. {_spikingjelly(model, batch)}"
    yield Table("MiniLM-L6 in torch eager", ("", *(f"{b} × {s}" for b, s in shapes)), lines, note)


def _spikingjelly(model: nn.Module, batch: Batch) -> str:
    """What SpikingJelly 2 says to the model as transformers gives it."""
    what = "SpikingJelly 2's transformer recipe on the same model"
    try:
        jelly.converted(model, jelly.RECIPES[0])(**batch)
    except RuntimeUnavailableError:
        raise
    except Exception as error:
        return f"{what}: {jelly.refusal(error)}"
    return f"{what}: converted and run."
