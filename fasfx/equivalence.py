"""fasfx.check: how far a spiking network is from its original, against T, and site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasfx import ops
from fasfx.calibration import as_batch
from fasfx.capture import evaluating
from fasfx.config import SpikeConfig
from fasfx.difference import Difference, main_output, output_mask
from fasfx.errors import InputError
from fasfx.local_errors import GroupFigures, LocalErrors, Prediction, predict
from fasfx.model import SpikingModel, depth
from fasfx.passes import Substitute
from fasfx.program import facts
from fasfx.synapses import reduce_peak

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Progress = Callable[[str, int, int | None], None]
Batch = dict[str, Any]
Row = dict[str, float]


@dataclass(frozen=True)
class Equivalence:
    """What fasfx.check measured.

    table: timesteps, relative_l2, cosine, max (of the main output), bound (the largest share of its threshold by
           which one neuron may err for constant input: a bound per neuron, not of the output), spikes (per value
           sent, up to that T). Under the synchronous schedule a row is what stands there after that tick.
    sites: at the model's own T, per site: firing_rate (spikes per neuron and step), clip_share (values beyond the
           threshold), dead_share (channels that never fire), snr_db (decoded spikes against the original's value,
           errors of earlier layers included), predicted (relative L2 error of the output that the site's own error
           alone would cause, to first order and for constant input).
    groups: at the model's own T, per neuron group: function, neurons (K), bound (certified) and measured (the largest
           error on these batches, in the bound's unit), clip_share (inputs beyond a calibrated range), predicted.
    predicted: the same for all sites and groups together, on the first batch.
    depth: most neurons on any path; a sequential network answers after depth * T ticks.
    """

    table: pandas.DataFrame
    sites: pandas.DataFrame
    groups: pandas.DataFrame
    predicted: float
    config: SpikeConfig
    depth: int

    def latency(self, tolerance: float) -> dict[str, int] | None:
        """The first T of the table whose error is at most `tolerance`, and the ticks until the answer then.

        {"timesteps": T, "ticks": T or, for the sequential schedule, depth * T}; None if no T reaches it.
        """
        reached = self.table[self.table["relative_l2"] <= tolerance]
        if reached.empty:
            return None
        steps = int(reached["timesteps"].min())
        return {"timesteps": steps, "ticks": steps * (1 if self.config.schedule == "synchronous" else self.depth)}

    @property
    def contributions(self) -> pandas.DataFrame:
        """Sites and groups by their predicted share of the output's error, largest first: name, module, predicted."""
        import pandas

        columns = ["name", "module", "predicted"]
        tables = [t.rename(columns={c: "name"}) for t, c in ((self.sites, "site"), (self.groups, "group")) if len(t)]
        if not tables:
            return pandas.DataFrame(columns=columns)
        found = pandas.concat([table[columns] for table in tables])
        return found.sort_values("predicted", ascending=False, ignore_index=True)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Error and bound against T, and the signal-to-noise ratio along the network; saved if a path is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.semilogy(self.table["timesteps"], self.table["relative_l2"], "o-", label="output, relative L2 error")
        left.semilogy(self.table["timesteps"], self.table["bound"], "s--", label="one neuron's bound / threshold")
        step = "tick" if self.config.schedule == "synchronous" else "time steps T"
        left.set(xlabel=step, title=f"{self.config.code} code, {self.config.schedule}: error")
        left.legend()
        right.plot(range(len(self.sites)), self.sites["snr_db"], ".-")
        right.set(
            xlabel="site, in the order of the network",
            ylabel="dB",
            title=f"signal-to-noise at T = {self.config.timesteps}",
        )
        for axes in (left, right):
            axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _repr_html_(self) -> str:
        return f"{self.table.to_html(index=False)}{self.contributions.head().to_html(index=False)}"

    def __str__(self) -> str:
        return str(self.table.to_string(index=False))


def check(
    model: nn.Module,
    snn: SpikingModel,
    batches: Iterable[Any],
    timesteps: Sequence[int] = (1, 2, 4, 8, 16),
    progress: Progress | None = None,
) -> Equivalence:
    """Measure a spiking network against its original on batches of inputs.

    Positions masked by attention_mask do not count. `snn` has its own T again afterwards.
    Raises InputError for no batches, no timesteps, or inputs the network was not captured with, ConfigError for a T
    below 1.
    """
    held = [as_batch(model, batch) for batch in batches]
    if not held:
        raise InputError("nothing to check on: batches is empty")
    if not timesteps:
        raise InputError("nothing to check: timesteps is empty")
    for steps in timesteps:
        snn.spike_config.replace(timesteps=steps)
    report = progress or (lambda stage, done, total: None)
    with torch.no_grad(), evaluating(model):
        expected = [main_output(model(**batch)) for batch in held]
    own = snn.timesteps
    try:
        if snn.schedule == "synchronous":
            rows = _tick_rows(snn, held, expected, sorted(set(timesteps)), report)
        else:
            rows = _rows(snn, held, expected, timesteps, report)
    finally:
        snn.timesteps = own
    sites, groups, predicted = _local(snn, held)
    return Equivalence(_frame(rows), sites, groups, predicted, snn.spike_config, depth(snn.graph_module))


def _rows(
    snn: SpikingModel, batches: list[Batch], expected: list[Tensor], timesteps: Sequence[int], report: Progress
) -> list[Row]:
    """One pass through the network per T."""
    rows = []
    for done, steps in enumerate(timesteps):
        report("check", done, len(timesteps))
        snn.timesteps = steps
        difference = Difference()
        with torch.no_grad():
            for batch, reference in zip(batches, expected, strict=True):
                difference.add(reference, main_output(snn(**batch)), output_mask(batch))
        rows.append(_row(snn.spike_config, steps, difference, spikes_so_far(snn, batches[0])[-1]))
    report("check", len(timesteps), len(timesteps))
    return rows


def _tick_rows(
    snn: SpikingModel, batches: list[Batch], expected: list[Tensor], timesteps: list[int], report: Progress
) -> list[Row]:
    """All T from one run: the output after tick t is what a network of t ticks gives."""
    snn.timesteps = timesteps[-1]
    found = by_tick(snn, batches, expected, report)
    sent = spikes_so_far(snn, batches[0])
    return [_row(snn.spike_config, tick, found[tick - 1], sent[tick - 1]) for tick in timesteps]


@torch.no_grad()
def by_tick(
    snn: SpikingModel, batches: Sequence[Batch], expected: Sequence[Tensor], report: Progress
) -> list[Difference]:
    """The difference of the running output from what is expected, after every tick, over all batches."""
    found = [Difference() for _ in range(snn.timesteps)]
    for done, (batch, reference) in enumerate(zip(batches, expected, strict=True)):
        report("check", done, len(batches))
        for difference, output in zip(found, snn.ticks(**batch), strict=True):
            difference.add(reference, main_output(output), output_mask(batch))
    report("check", len(batches), len(batches))
    return found


def spikes_so_far(snn: SpikingModel, batch: Batch) -> list[float]:
    """Spikes per value sent, up to each time step or tick, over the whole network; 0 for one without neurons."""
    frame = snn.count_spikes(**batch)
    values = frame.pop("values")
    return list(frame.mul(values, axis=0).sum().cumsum() / max(1, values.sum()))


def _row(config: SpikeConfig, steps: int, difference: Difference, spikes: float) -> Row:
    bound = ops.CODES[config.code].error_bound(1.0, config.population * steps, config.levels)
    figures = {"relative_l2": difference.relative_l2, "cosine": difference.cosine, "max": difference.largest}
    return {"timesteps": steps, **figures, "bound": bound, "spikes": spikes}


def _local(snn: SpikingModel, batches: list[Batch]) -> tuple[pandas.DataFrame, pandas.DataFrame, float]:
    """What every site and every group does on its own, and the prediction of what comes of it."""
    sites = facts(snn.ranged).sites
    stats, static, local = {name: _SiteStatistics() for name in sites}, snn._static_thresholds(), LocalErrors(snn)
    for batch in batches:
        inputs = [*snn._inputs((), batch).values()]
        with torch.no_grad():
            local.run(*inputs)
            for name, train in snn.spikes(**batch).items():
                stats[name].add(
                    local.values["site", name], train.decode(), train.events, static.get(name), sites[name].channel
                )
    first = batches[0]
    share = predict(local, [*snn._inputs((), first).values()], first)
    rows = [
        {"site": n, "module": sites[n].module, **s.figures(), "predicted": share.alone.get(("site", n), 0.0)}
        for n, s in stats.items()
    ]
    return _frame(rows), _groups(snn, local.groups, share), share.total


def _groups(snn: SpikingModel, figures: dict[str, GroupFigures], share: Prediction) -> pandas.DataFrame:
    """A row for every neuron group; its bound is in the ledger."""
    promised = {entry.node: entry for entry in snn.ledger.entries if entry.pass_name == Substitute.name}
    return _frame(
        [
            {
                "group": name,
                "module": promised[name].module,
                "function": found.function,
                "neurons": found.neurons,
                "bound": promised[name].value,
                "measured": found.measured,
                "clip_share": found.clipped / max(1, found.values),
                "predicted": share.alone.get(("group", name), 0.0),
            }
            for name, found in figures.items()
        ]
    )


class _SiteStatistics:
    """Running figures of one site."""

    def __init__(self) -> None:
        self._difference, self._spikes, self._slots, self._clipped, self._values = Difference(), 0, 0, 0, 0
        self._fired: Tensor | None = None

    def add(
        self, value: Tensor, decoded: Tensor, events: Tensor, theta: Tensor | None, channel: tuple[int, ...]
    ) -> None:
        """value, decoded [...]; events [T, ...]; theta broadcastable, None if dynamic (nothing is clipped then)."""
        self._difference.add(value, decoded)
        self._spikes += int(events.count_nonzero())
        self._slots += events.numel()
        self._values += value.numel()
        if theta is not None:
            self._clipped += int((value.abs() > theta * (1 + 1e-6)).count_nonzero())
        fired = reduce_peak(events.any(0), channel or (-1,)).flatten()
        if self._fired is None or self._fired.shape == fired.shape:
            self._fired = fired if self._fired is None else self._fired | fired

    def figures(self) -> dict[str, float]:
        """firing_rate, clip_share, dead_share in [0, 1]; snr_db."""
        assert self._fired is not None
        return {
            "firing_rate": self._spikes / self._slots,
            "clip_share": self._clipped / self._values,
            "dead_share": float((~self._fired).double().mean()),
            "snr_db": self._difference.snr_db,
        }


def _frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows)
