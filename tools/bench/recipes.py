"""What the benchmark of FAS trains and tunes: tasks, codes, T, and what each case is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import fasfx
from fasfx.tools.bench.tasks import TASKS
from fasfx.tools.bench.trained import HERE, Kept, calibration, original, stage_one

TUNING = 20  # batches of stage II
BRIEF = 5  # of them where T goes up to 32, and so does what a batch takes
QUICKER = 5  # a quick run trains for a fifth of the epochs
SYNCHRONOUS: dict[str, Any] = {"schedule": "synchronous", "nonlinear": "exact"}
FEW, MANY = (1, 2, 3, 4, 8), (1, 2, 4, 8, 16, 32)
TUNED, SEQUENTIAL, SPIKES = "after neuron", "sequential, uncalibrated", "spikes per value"  # rows that are held


class Target(NamedTuple):
    """What a row is held to at one T.

    loss: the most it may be worse than the original: a share of all rows of accuracy, of the perplexity.
    most: the most its figure may be.
    """

    row: str
    at: int
    loss: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Case:
    """One table: a task, what is sent as spikes, the T that are measured, and its targets.

    trained: the T of stage I, in closed form or through_time.  epochs: of it; 0: the original is converted as it is.
    spikes: weight of the number of spikes, in both stages.  settings: what else the conversion is told.
    tuning: batches of stage II.
    """

    task: str
    code: str
    coverage: str
    trained: int
    ticks: tuple[int, ...]
    targets: tuple[Target, ...]
    epochs: float = 3
    lr: float = 1e-4
    spikes: float = 0.0
    tuning: int = TUNING
    through_time: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> fasfx.SpikeConfig:
        """Functions stay float, as in the paper: what is compared is the code."""
        if self.coverage == "activation":
            return fasfx.SpikeConfig.fas(self.trained, code=self.code, **self.settings)
        return fasfx.SpikeConfig().replace(code=self.code, timesteps=self.trained, **SYNCHRONOUS, **self.settings)


# Epochs and learning rate of the original; Qwen2.5-Coder is taken as it comes.
ORIGINAL = {
    "valence": (3, 5e-5),
    "r8": (2, 5e-5),
    "digits": (40, 1e-3),
    "language": (1, 2e-5),
}
MULTI = ("multi", "matmul", 1, FEW, (Target(TUNED, 1, loss=0.003),))
# Of 20 levels a value is silent below 2^-20 of the threshold: almost none is. Of five, per channel, half of them are.
# Levels, margin, weight and epochs were chosen on a fifth of the rows to train on (decision 10).
SPARSE = ("multi", "matmul", 1, (1, 2), (Target(TUNED, 1, loss=0.005), Target(SPIKES, 1, most=0.5)))
CENTRED = {"centre": True}
FEWER = {"levels": 5, "granularity": "channel", "margin": 1.5, **CENTRED}
ACTIVATION = ("rate", "activation", 8, MANY, (Target(TUNED, 8, loss=0.003),))
# A gate keeps its function: without training, replacing it costs a hundred times the perplexity. 16 counts, not 8.
GATES = {"activation": "keep", "margin": 1.0, "population": 2}
RATE = ("rate", "matmul", 8, MANY, (Target(TUNED, 16, loss=0.02), Target(SEQUENTIAL, 8, loss=0.01)))
SPEECH = (Target(TUNED, 3, loss=0.015), Target(TUNED, 2, loss=0.06))
SPOKEN = ("multi", "matmul", 1, (1, 2, 3, 4), SPEECH)
# Two neurons for every value halve the ticks that as many spikes take; layers' biases hold what is usual.
PAIRS = {"population": 2, **CENTRED}
BUDGET = 0.75  # epochs of stage I on language: 331 steps of 256 tokens
TUNING_OF_LANGUAGE = 10
# Thresholds per channel take up what one per site spends many levels on: few are left, and so are few spikes.
FEW_SPOKEN = ("multi", "matmul", 5, (5,), (Target(TUNED, 5, loss=0.005),))
NARROW = {"levels": 8, "granularity": "channel", "margin": 2.0, **CENTRED}
SPARSE_LANGUAGE = Case(
    "language", *FEW_SPOKEN, epochs=0.5, lr=5e-5, spikes=0.1, tuning=TUNING_OF_LANGUAGE, settings=NARROW
)
LANGUAGE = Case("language", *SPOKEN, epochs=BUDGET, lr=5e-5, tuning=TUNING_OF_LANGUAGE, settings=PAIRS)
SPOKEN_ACTIVATION = ("rate", "activation", 8, FEW, (Target(TUNED, 8, loss=0.02),))
SINGLE = replace(LANGUAGE, trained=2, epochs=1.5, lr=1e-4, through_time=True, settings=CENTRED)
CASES = {
    "valence": Case("valence", *MULTI),
    "valence_activation": Case("valence", *ACTIVATION, tuning=BRIEF),
    "valence_rate": Case("valence", *RATE, tuning=BRIEF, settings=PAIRS),
    "valence_sparse": Case("valence", *SPARSE, epochs=4, spikes=3.0, settings=FEWER),
    "r8": Case("r8", *MULTI),
    "r8_activation": Case("r8", *ACTIVATION, tuning=BRIEF),
    "r8_rate": Case("r8", *RATE, tuning=BRIEF, settings=PAIRS),
    "digits": Case("digits", *MULTI, epochs=10, lr=3e-4),
    "digits_activation": Case("digits", *ACTIVATION, epochs=10, lr=3e-4),
    "language": LANGUAGE,
    "language_activation": Case(
        "language", *SPOKEN_ACTIVATION, epochs=BUDGET, lr=5e-5, tuning=TUNING_OF_LANGUAGE, settings=GATES
    ),
    "language_single": SINGLE,
    "language_untrained": replace(LANGUAGE, epochs=0),
    "code_untrained": replace(LANGUAGE, task="code", ticks=(1, 2, 3), epochs=0),
}


class Made(NamedTuple):
    """The original, the network of stage I (or the original again), the spiking network, and what made them."""

    original: Kept
    trained: Kept
    snn: fasfx.SpikingModel
    of: list[Any]


def teacher_of(task: str, seed: int, quick: bool = False) -> Kept:
    """The original, fine-tuned where its task asks for it."""
    if task not in ORIGINAL:
        return Kept(TASKS[task]().model(seed).eval().to(HERE), 0.0)
    epochs, lr = ORIGINAL[task]
    return original(task, seed, epochs / QUICKER if quick else epochs, lr)


def made_of(case: Case, seed: int, quick: bool = False) -> Made:
    """Everything before stage II."""
    first = teacher_of(case.task, seed, quick)
    epochs = case.epochs / QUICKER if quick else case.epochs
    of = [case.task, seed, *ORIGINAL.get(case.task, ()), epochs, case.lr, quick]
    of += [case.spikes] if case.spikes else []
    if not epochs:
        return Made(first, first, fasfx.convert(first.model, calibration(case.task, first.model), case.config), of)
    of += ["through time", case.trained] if case.through_time else []
    second = stage_one(case.task, seed, epochs, case.lr, case.config, first.model, case.spikes, of, case.through_time)
    return Made(first, second, fasfx.convert(second.model), of)
