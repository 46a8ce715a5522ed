"""Where it went wrong: the first pass, the first application of a rule in it, the node that breaks its promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch.fx import GraphModule

from fasfx.applying import Application
from fasfx.difference import Difference, main_output, output_mask
from fasfx.errors import ConfigError
from fasfx.tools.subjects import Stage, Subject, apply_partly, output
from fasfx.tools.verifying import Broken, against

# metric: (the tolerance where none is given, what it says)
METRICS: dict[str, tuple[float, str]] = {
    "promise": (1.0, "largest error of a node over what its pass promises, neurons and groups transparent"),
    "relative_l2": (0.01, "relative L2 error of the main output"),
    "max": (0.01, "largest error of the main output"),
    "cosine": (0.001, "1 - cosine of the main outputs"),
}


@dataclass(frozen=True)
class Culprit:
    """What bisect found.

    pass_name:   the first pass after which the metric is above the tolerance.
    application: the first application of a rule after which it is; None if the pass asks for none (fasfx.applying).
    number, of:  which one of how many.
    measured:    the metric after that application.
    node:        the first node of the graph that breaks its promise then; None if every node keeps it.
    before:      the program that the pass was given.
    """

    pass_name: str
    application: Application | None
    number: int
    of: int
    measured: float
    node: Broken | None
    before: GraphModule = field(repr=False)

    def __str__(self) -> str:
        lines = [f"pass {self.pass_name}: {self.measured:.3g}"]
        if self.application is not None:
            a = self.application
            where = f" in {a.module}" if a.module else ""
            lines.append(f"rule {a.rule} at {a.node}{where}: application {self.number} of {self.of}")
        lines.append(f"node {self.node}" if self.node else "every node keeps its promise")
        return "\n".join(lines)


def bisect(subject: Subject, metric: str = "promise", tolerance: float | None = None) -> Culprit | None:
    """The first pass, rule application and node that take the metric above the tolerance; None if nothing does.

    The application is found by halving, so the metric must not fall again once it is too high.
    Raises ConfigError for an unknown metric, and what a pass raises.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    limit = METRICS[metric][0] if tolerance is None else tolerance
    of_output = None if metric == "promise" else _of_output(subject, metric)
    for stage in subject.stages():
        broken_by = against(stage.before, subject.inputs)
        measure = of_output or partial(_of_promises, broken_by)
        if (measured := measure(stage.after)) > limit:
            return _first_application(stage, measure, broken_by, limit, measured)
    return None


Measure = Callable[[GraphModule], float]
Breaks = Callable[[GraphModule], list[Broken]]


def _first_application(stage: Stage, measure: Measure, broken_by: Breaks, limit: float, measured: float) -> Culprit:
    """Invariant: after `good` applications the metric is within the limit, after `bad` it is not."""
    good, bad, after = 0, len(stage.applied), stage.after
    while bad - good > 1:
        middle = (good + bad) // 2
        partly = apply_partly(stage.one, stage.before, middle)
        if (found := measure(partly)) > limit:
            bad, after, measured = middle, partly, found
        else:
            good = middle
    broken = broken_by(after)
    last = stage.applied[bad - 1] if bad else None
    first = broken[0] if broken else None
    return Culprit(stage.name, last, bad, len(stage.applied), measured, first, stage.before)


def _of_promises(broken_by: Breaks, after: GraphModule) -> float:
    return max((broken.ratio for broken in broken_by(after)), default=0.0)


def _of_output(subject: Subject, metric: str) -> Measure:
    """A program, perhaps after a part of a pass -> the metric of its output."""
    names = subject.batches[0]
    mask = output_mask(dict(zip(names, subject.inputs, strict=True)))
    expected = main_output(output(subject.program, subject.inputs))

    def measure(after: GraphModule) -> float:
        difference = Difference()
        difference.add(expected, main_output(output(after, subject.inputs)), mask)
        found = {"relative_l2": difference.relative_l2, "max": difference.largest, "cosine": 1 - difference.cosine}
        return found[metric]

    return measure
