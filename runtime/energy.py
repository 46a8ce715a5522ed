"""fasfx.energy: what a spiking network costs on data, by three countings side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fasfx.calibration import as_batch
from fasfx.config import SpikeConfig
from fasfx.errors import InputError
from fasfx.passes import Clip, Substitute
from fasfx.program import facts
from fasfx.runner import Runner
from fasfx.runtime.counting import Sent
from fasfx.runtime.countings import AC, COUNTINGS, MAC, bits_of
from fasfx.runtime.liveness import problems, require_alive
from fasfx.runtime.operations import NEURON, QUANTITIES, Operations, upstream

if TYPE_CHECKING:
    import pandas

    from fasfx.model import SpikingModel


@dataclass(frozen=True)
class EnergyReport:
    """What fasfx.energy counted, all batches together; energies in pJ.

    table: a row for every site (kind "neuron") and every operator that is not free (kinds of fasfx.coverage): node,
           module, operator, kind, spike_driven, and how many
           macs            multiply-accumulates of the original network, float_macs those that no spike drives,
           acs             accumulates: spikes that meet a weight, those of neuron groups among them,
           functions       values of functions of one variable and of other operators without multiply-accumulates,
                           float_functions those that are computed in float,
           values, spikes  numbers that a site sends, and spikes of a site or a neuron group,
           neuron_steps    neurons times the steps in which each holds a potential.
           Then two columns for each counting, <counting>_original and <counting>_spiking.
    problems: site, module, problem: sites that never fire, always fire or only copy another on these batches.
    bits: of the original that the countings "quantised" and "memory" compare with.
    """

    table: pandas.DataFrame
    problems: pandas.DataFrame
    config: SpikeConfig
    bits: int

    @property
    def totals(self) -> pandas.DataFrame:
        """A row for each counting: counting, original_pj, spiking_pj, saved (share of the original's, negative if
        the spiking network costs more), not_spiking (share of spiking_pj that no spike drives), formulas, source."""
        import pandas

        rows = []
        for one in COUNTINGS:
            before, after, left = (
                float(pj(self.table, self.bits).sum()) for pj in (one.original, one.spiking, one.left)
            )
            rows.append(
                {
                    "counting": one.name,
                    "original_pj": before,
                    "spiking_pj": after,
                    "saved": 1 - after / before if before else 0.0,
                    "not_spiking": left / after if after else 0.0,
                    "original_formula": one.formula[0],
                    "spiking_formula": one.formula[1],
                    "source": one.source,
                }
            )
        return pandas.DataFrame(rows)

    @property
    def layers(self) -> pandas.DataFrame:
        """The table's sums for each module, in the order of the network."""
        numbers = self.table.drop(columns=["node", "operator", "kind", "spike_driven"])
        return numbers.groupby("module", sort=False).sum().reset_index()

    @property
    def headline(self) -> float:
        """Saved by the rule behind FAS's -96.63 %: of products that spikes drive only, everything else left out.

        1 - 0.9 acs / (4.6 macs), so the paper's figure says at most 0.17 accumulates for a multiply-accumulate. Set it
        against the row "papers" of `totals`, which leaves out no product and no spike. NaN if spikes drive nothing.
        """
        driven = self.table[self.table["spike_driven"] & (self.table["macs"] > 0)]
        macs = float(driven["macs"].sum())
        return 1 - AC * float(driven["acs"].sum()) / (MAC * macs) if macs else float("nan")

    @property
    def spikes(self) -> float:
        """Spikes for every value that a site sends, all steps together."""
        sites = self.table[self.table["kind"] == NEURON]
        return float(sites["spikes"].sum() / max(1, sites["values"].sum()))

    def _repr_html_(self) -> str:
        note = f"{self.headline:.2%} saved by the rule of FAS's headline, of products that spikes drive only"
        return f"{self.totals.to_html(index=False)}<p>{note}</p>"

    def __str__(self) -> str:
        return str(self.totals.iloc[:, :5].to_string(index=False))


def energy(snn: SpikingModel, batches: Iterable[Any], strict: bool = False) -> EnergyReport:
    """Count the operations of a spiking network on batches of inputs, masked positions too, and what they cost.

    Additions of currents and biases, comparisons and moves cost nothing, in either network and every counting
    (fasfx.coverage.FREE). A spike of a neuron group meets one weight.
    Raises InputError for no batches or inputs that do not fit; with strict=True LivenessError if a site never fires,
    always fires or only copies another.
    """
    program = Runner([Clip(), Substitute()]).run(snn.ranged)
    operations, sent = Operations(snn, program), dict[str, list[Sent]]()
    counted = []
    for batch in batches:
        rows, sites = operations.count(as_batch(snn, batch))
        counted.append(rows)
        for site, found in sites.items():
            sent.setdefault(site, []).append(found)
    if not counted:
        raise InputError("nothing to count on: batches is empty")
    modules = {name: site.module for name, site in facts(snn.ranged).sites.items()}
    dead = problems(sent, upstream(program))
    if strict:
        require_alive(dead, modules)
    bits = bits_of(snn.spike_config)
    return EnergyReport(_table(counted, bits), _problems(dead, modules), snn.spike_config, bits)


def _table(counted: list[list[dict[str, Any]]], bits: int) -> pandas.DataFrame:
    """The rows of all batches, added up, with what they cost."""
    import pandas

    table, *more = (pandas.DataFrame(rows) for rows in counted)
    for other in more:
        table[[*QUANTITIES]] += other[[*QUANTITIES]]
    for one in COUNTINGS:
        table[f"{one.name}_original"] = one.original(table, bits)
        table[f"{one.name}_spiking"] = one.spiking(table, bits)
    return table


def _problems(dead: dict[str, str], modules: dict[str, str]) -> pandas.DataFrame:
    import pandas

    rows = [(site, modules[site], problem) for site, problem in dead.items()]
    return pandas.DataFrame(rows, columns=["site", "module", "problem"])
