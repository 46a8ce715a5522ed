"""SpikeConfig: every choice a conversion makes, as plain data."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from fasfx.errors import ConfigError
from fasfx.ops.codes import CODES

_CHOICES: dict[str, tuple[object, ...]] = {
    "code": tuple(CODES),
    "schedule": ("sequential", "synchronous"),
    "coverage": ("matmul", "activation"),
    "activation": ("keep", "replace"),
    "nonlinear": ("exact", "spiking"),
    "threshold": ("max", "percentile"),
    "granularity": (None, "tensor", "channel", "token"),
    "weights": ("float", "int8"),
    "centre": (False, True),
}
MAX_RADIX_STEPS = 24  # a count must be exact in float32
MAX_LEVELS = 24


@dataclass(frozen=True)
class SpikeConfig:
    """How a network becomes spiking.

    timesteps:   T, spikes a neuron may send per value (per threshold ladder for `multi`).
    code:        "multi" (signed powers of two), "radix" (binary digits), "rate" (QCFS, FAS's neuron).
    levels:      thresholds of a multi neuron, 1 to 24; independent of timesteps.
    population:  neurons per value, one after the other, each with T spikes of its own for what the others have left;
                 twice as many where two values are multiplied (of radix neurons as many as are exact). More spikes in a
                 tick, and fewer ticks.
    schedule:    "sequential": a layer starts when its input is complete; closed form, latency depth * T.
                 "synchronous": all layers tick together, an answer after every tick, latency T; not for radix.
    coverage:    "matmul": every operand of linear, convolution and matrix product is sent as spikes.
                 "activation": only what activation functions give, as in FAS's released code; the rest stays float.
    activation:  "keep", or "replace": QCFS takes the place of activation functions (FAS), which needs fine-tuning.
    nonlinear:   "spiking": functions are neuron groups, norms, gates and quotients products of spikes.
                 "exact": softmax, norms and activations stay float operators, reported as not spike-driven.
    threshold:   "max" of the calibration times margin, or its 99.9th "percentile" times margin.
    margin:      headroom; None: 4 for multi (two of its levels), 2 for rate, population * T / 6, at least 1, for radix,
                 whose finer steps at a larger T pay for more headroom (docs/decisions/0004-thresholds.md).
    granularity: "tensor" | "channel" (both fold into weights) | "token" (dynamic, one threshold per row, does
                 not fold). None: "tensor" for multi, "channel" else; with int8 weights one per tensor for what only
                 linear layers read, one per row for gated values.
    centre:      whether linear layers are sent how far each channel is from its median in the first calibration batch;
                 their biases hold the rest. For float weights, few ticks, and the rate code.
    group_size:  neurons of every group, more where T steps of the code need narrower ones; None: for each function
                 the fewest (a power of two) that are exact enough at this T.
    skip:        regular expressions (re.search) on module paths whose operators stay as they are.
    strict:      raise CoverageError if any operator that is not free is not spike-driven; with nonlinear="exact",
                 if any multiply-accumulate is not.

    Raises ConfigError for a value outside these.
    """

    timesteps: int = 4
    code: Literal["multi", "radix", "rate"] = "multi"
    levels: int = 20
    population: int = 1
    schedule: Literal["sequential", "synchronous"] = "sequential"
    coverage: Literal["matmul", "activation"] = "matmul"
    activation: Literal["keep", "replace"] = "keep"
    nonlinear: Literal["exact", "spiking"] = "spiking"
    threshold: Literal["max", "percentile"] = "max"
    margin: float | None = None
    granularity: Literal["tensor", "channel", "token"] | None = None
    weights: Literal["float", "int8"] = "float"
    centre: bool = False
    group_size: int | None = None
    skip: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        for name, low, high in (("timesteps", 1, None), ("population", 1, None), ("levels", 1, MAX_LEVELS)):
            _check_integer(name, getattr(self, name), low, high)
        if self.code == "radix" and self.steps > MAX_RADIX_STEPS:
            raise ConfigError(
                f"timesteps={self.timesteps}, population={self.population}: a radix count of {self.steps} steps is not "
                f"exact: of at most {MAX_RADIX_STEPS} it is"
            )
        needed = {"coverage": "matmul", "activation": "keep", "weights": "float"}
        for name, value in needed.items() if self.centre else ():
            if getattr(self, name) != value:
                raise ConfigError(f"centre=True goes with {name}={value!r} only, not {getattr(self, name)!r}")
        if self.group_size is not None:
            _check_integer("group_size", self.group_size, 2, 4096)
        if self.schedule == "synchronous" and CODES[self.code].ticking is None:
            ticking = ", ".join(repr(name) for name, code in CODES.items() if code.ticking)
            raise ConfigError(f"code={self.code!r} has no synchronous schedule: choose one of {ticking}")
        if self.margin is not None and not self.margin > 0:
            raise ConfigError(f"margin={self.margin!r}: must be a positive number or None")
        for pattern in self.skip:
            _check_pattern(pattern)

    @property
    def steps(self) -> int:
        """Spikes that the neurons of a value may send together."""
        return self.population * self.timesteps

    @property
    def resolved_margin(self) -> float:
        """Headroom over the calibrated maximum; 1 for dynamic thresholds, which no value exceeds."""
        if self.margin is not None:
            return self.margin
        if self.resolved_granularity == "token":
            return 1.0
        return {"multi": 4.0, "rate": 2.0, "radix": max(1.0, self.steps / 6)}[self.code]

    @property
    def resolved_granularity(self) -> str:
        """The granularity in force."""
        return self.granularity or ("tensor" if self.code == "multi" else "channel")

    def unit(self, steps: int) -> int:
        """What stands for the threshold of a neuron of so many spikes in a folded graph.

        N, or the code's own unit where T is not to matter.
        """
        code = CODES[self.code]
        if self.schedule == "synchronous" and code.ticking is not None:
            return code.ticking.unit(self.levels) * (steps // self.timesteps if code.ticking.averages else 1)
        return code.capacity(steps, self.levels)

    def group(self, population: int) -> tuple[str, int, int, int | None]:
        """(code, steps, levels, K or None) of a neuron group whose value so many neurons send on.

        Under the synchronous schedule nothing may depend on T: a group then settles within a tick, as finely as any.
        """
        _, steps, _ = self.neuron(population)
        return (
            self.code,
            CODES[self.code].settled if self.schedule == "synchronous" else steps,
            self.levels,
            self.group_size,
        )

    def neuron(self, population: int = 1) -> tuple[str, int, int]:
        """(code, steps, levels), the arguments every neuron operator takes, for so many neurons per value.

        Together they send up to population * T spikes; of radix neurons so many as keep the count exact in float32.
        """
        most = MAX_RADIX_STEPS // self.timesteps if self.code == "radix" else population
        return self.code, min(population, most) * self.timesteps, self.levels

    def replace(self, **changes: Any) -> SpikeConfig:
        """A copy with some fields changed; unknown names raise ConfigError."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ConfigError(f"unknown field {', '.join(unknown)}: SpikeConfig has {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def fas(cls, timesteps: int = 8, **changes: Any) -> SpikeConfig:
        """The paper's recipe: rate code, synchronous, QCFS in the place of activation functions, the rest in float."""
        recipe = {
            "code": "rate",
            "schedule": "synchronous",
            "coverage": "activation",
            "activation": "replace",
            "nonlinear": "exact",
        }
        return cls().replace(timesteps=timesteps, **(recipe | changes))

    @classmethod
    def low_latency(cls, timesteps: int = 5, **changes: Any) -> SpikeConfig:
        """Multi code, all layers ticking together."""
        return cls().replace(timesteps=timesteps, **({"schedule": "synchronous"} | changes))

    @classmethod
    def integer(cls, timesteps: int = 7, **changes: Any) -> SpikeConfig:
        """Radix code and int8 weights, functions in float: fewest spikes, fastest runtime."""
        recipe = {"code": "radix", "weights": "int8", "nonlinear": "exact"}
        return cls().replace(timesteps=timesteps, **(recipe | changes))


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r}: must be a whole number {span}")


def _check_pattern(pattern: object) -> None:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise ConfigError(f"skip={pattern!r} is not a regular expression: {error}") from error
