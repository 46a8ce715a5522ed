"""NORMAL -> RANGED: calibration batches stream through the program and every site learns its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fasfx.errors import CalibrationError, ConfigError
from fasfx.feedback import block_of
from fasfx.integer import evens_channels
from fasfx.levels import is_skipped, spiking_operands
from fasfx.ops.codes import CODES
from fasfx.ops.functions import FUNCTIONS, OPERATORS
from fasfx.program import Site, arg, describe, facts, fake, module_path, set_attribute
from fasfx.runner import Pass
from fasfx.synapses import (
    ACTIVATIONS,
    RELAYS,
    SYNAPSES,
    activations,
    carried_values,
    channel_dims,
    is_gated,
    non_negative,
    operand,
    reduce_peak,
)

aten = torch.ops.aten
TAIL = 0.999  # threshold="percentile" takes this quantile of |value|
MAX_SAMPLES = 2**20  # per batch and channel row, of a site whose values are sorted


class Observe(Pass):
    """Finds the sites, runs the batches, keeps peaks and tails, and the medians that centre takes off. The graph stays.

    batches: model inputs by name; streamed, one in memory at a time.
    on_batch: called after each batch with the number done (progress).
    Raises CalibrationError for no batches at all and for NaN or infinity at a site, naming batch, node and line.
    """

    name, takes, gives = "observe", "NORMAL", "RANGED"

    def __init__(self, batches: Iterable[dict[str, Any]], on_batch: Callable[[int], None] | None = None) -> None:
        self._batches, self._on_batch = batches, on_batch

    def rewrite(self, gm: GraphModule) -> bool:
        """Fill `facts(gm).sites`."""
        facts(gm).sites, facts(gm).ranges = find_sites(gm), {}
        watcher, done = _Watcher(gm), 0
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        for batch in self._batches:
            watcher.batch = done
            try:
                with torch.no_grad():
                    watcher.run(*(batch[name] for name in names))
            except (IndexError, RuntimeError) as error:
                why = str(error).partition("\n")[0]
                raise CalibrationError(f"the model cannot run calibration batch {done}: {why}") from error
            done += 1
            if self._on_batch:
                self._on_batch(done)
        watcher.finish()
        lifted = any(site.lift for site in facts(gm).sites.values())
        facts(gm).centres = []
        facts(gm).lifted = facts(gm).config.timesteps if lifted else None
        if not done:
            raise CalibrationError("the calibration data holds no batches: pass at least one dict of model inputs")
        return False


def find_sites(gm: GraphModule) -> dict[str, Site]:
    """Every value that is to become spikes, once, in the order of the graph.

    coverage="matmul": what enters a synaptic operation. coverage="activation", or activation="replace": what an
    activation function gives.
    """
    config, found = facts(gm).config, dict[Node, Site]()
    replaced = replaced_activations(gm)
    for node, position in spiking_operands(gm):
        value = operand(node.args[position])
        channel = channel_dims(node, position)
        population = config.population * (2 if node.target is aten.mul.Tensor else 1)
        if value in found:
            found[value].population = max(population, found[value].population)
            kept = set(found[value].channel) & set(channel)
            found[value].channel = tuple(d for d in channel if d in kept)
            continue
        bounded = _is_deferred_softmax(value)
        found[value] = Site(
            value.name,
            module_path(value),
            () if bounded else channel,
            not (non_negative(value) or value in replaced),
            fixed=1.0 if bounded else None,
            population=population,
        )
    if config.coverage == "activation" or config.activation == "replace":
        for value in _sent_activations(gm):
            signed = not (non_negative(value) or value in replaced)
            found.setdefault(value, _activation_site(value, signed, config.population))
    values, per_row = carried_values(gm), _gates_per_row(gm)
    for node, site in found.items():
        token = config.resolved_granularity == "token" and site.fixed is None
        site.dynamic = token or (per_row and site.channel == (-1,) and is_gated(node, values))
    return {node.name: found[node] for node in gm.graph.nodes if node in found}


def _gates_per_row(gm: GraphModule) -> bool:
    """Whether gated values get a threshold per row: rows differ too much for one, where counts are bytes."""
    config = facts(gm).config
    asked = config.weights == "int8" and config.granularity is None and CODES[config.code].rounds
    return asked and not facts(gm).trainable


def _lifted_top(gm: GraphModule) -> int:
    """N of a radix neuron that int8 weights read; 0 for others, and while a network is trained."""
    config = facts(gm).config
    if config.weights != "int8" or config.code != "radix" or facts(gm).trainable:
        return 0
    return CODES[config.code].capacity(config.steps, config.levels)


def replaced_activations(gm: GraphModule) -> dict[Node, Node]:
    """activation="replace": what an activation function gives -> the operator whose place QCFS takes."""
    return _sent_activations(gm) if facts(gm).config.activation == "replace" else {}


def _sent_activations(gm: GraphModule) -> dict[Node, Node]:
    found = {value: operator for value, operator in activations(gm).items() if not is_skipped(gm, value)}
    if not found:
        known = ", ".join(sorted(str(target).split(".")[-2] for target in ACTIVATIONS))
        raise ConfigError(f"the configuration is about activation functions, and the model has none of {known}")
    return found


def _activation_site(value: Node, signed: bool, population: int) -> Site:
    shared = [set(channel_dims(reader, p)) for reader, p in _readers_by_channel(value)]
    channel = tuple(sorted(set.intersection(*shared))) if shared else ()
    return Site(value.name, module_path(value), channel, signed, population=population)


def _readers_by_channel(value: Node) -> Iterator[tuple[Node, int]]:
    """(synaptic operation or gate, position) for everything that reads a value so, perhaps through a relay."""
    for user in value.users:
        if user.target in RELAYS:
            yield from _readers_by_channel(user)
        elif user.target in SYNAPSES or user.target is aten.mul.Tensor:
            yield user, next(i for i, given in enumerate(user.args) if given is value)


def _is_deferred_softmax(value: Node) -> bool:
    """exp(s - clamp(max s)) as normalise writes it: in [0, 1] whatever the data, unlike an exp of the user's own."""
    inner = value.args[0] if value.target is aten.exp.default else None
    if not isinstance(inner, Node) or inner.target is not aten.sub.Tensor or not isinstance(inner.args[1], Node):
        return False
    clamp = inner.args[1]
    peak = clamp.args[0] if clamp.target is aten.clamp.default else None
    return isinstance(peak, Node) and peak.target is aten.amax.default and peak.args[0] is inner.args[0]


class _Watcher(Interpreter):
    """Runs a program and records the range of every site."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._sites, self.batch = facts(gm).sites, 0
        self._centres, self._masks = facts(gm).centres, dict[Node, Tensor]()
        self._ranges = facts(gm).ranges
        self._open = {n for n in gm.graph.nodes if n.target in OPERATORS and FUNCTIONS[OPERATORS[n.target]].needs_range}
        self._moments = evens_channels(gm)
        self._rows: dict[str, int] = {}  # of a site with a moment: how many rows it is the sum of
        self._top = _lifted_top(gm)
        self._lifts: dict[str, list[float]] = {}
        self._tails = facts(gm).config.threshold == "percentile"

    def run_node(self, n: Node) -> Any:
        if self.batch == 0 and n.name in self._centres:
            self._find_centre(n)
        value = super().run_node(n)
        if n.op == "placeholder" and n.target in ("attention_mask", "decoder_attention_mask"):
            self._masks[n] = value
        if (site := self._sites.get(n.name)) is not None:
            self._record(site, value, n)
        if n in self._open:
            self._widen(n)
        return value

    def _find_centre(self, difference: Node) -> None:
        """What is taken off a value: the median of each of its channels [D] in the first batch, 0 for a single row.

        Rows that the mask of their own positions takes out (padding) do not count.
        """
        value, centre = self.env[arg(difference, 0)], arg(difference, 1)
        _require_finite(value, difference, self.batch)
        mask = next((kept for n, kept in self._masks.items() if _are_positions(n, arg(difference, 0))), None)
        each = value.reshape(-1, value.shape[-1])
        rows = _rows(each if mask is None else each[mask.flatten().bool()], (-1,))
        if rows.shape[-1] <= 1:  # which says nothing about how far others are from it
            return
        self.env[centre] = rows.median(-1).values
        set_attribute(self.module, str(centre.target), self.env[centre])

    def _widen(self, node: Node) -> None:
        """The range of the input of a function without tails."""
        low, high = self.env[arg(node, 0)].aminmax()
        _require_finite(torch.stack([low, high]), node, self.batch)
        seen = self._ranges.get(node.name, (math.inf, -math.inf))
        self._ranges[node.name] = (min(seen[0], float(low)), max(seen[1], float(high)))

    def _record(self, site: Site, value: Tensor, node: Node) -> None:
        depth = max((-d for d in site.channel), default=0)
        peak = reduce_peak(value, site.channel)
        peak = peak.reshape(peak.shape[peak.dim() - depth :])
        _require_finite(peak, node, self.batch)
        site.peak = peak if site.peak is None else torch.maximum(site.peak, peak)
        if self._moments and site.channel == (-1,):
            self._add_moment(site, value)
        if self._top and site.fixed is not None:
            self._lifts.setdefault(site.name, []).append(lift_of(value * (self._top / site.fixed)))
        if self._tails:
            tail = _tail(value, site.channel).reshape(peak.shape)
            site.tail = tail if site.tail is None else torch.maximum(site.tail, tail)

    def _add_moment(self, site: Site, value: Tensor) -> None:
        """Sum x x' over the rows, in blocks of channels; of a row with a threshold of its own, as a share of that."""
        rows = (value.float() if value.dtype.itemsize < 4 else value).flatten(0, -2)
        if site.dynamic:
            rows = rows / rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        blocks = rows.unflatten(-1, (-1, block_of(rows.shape[-1]))).transpose(0, 1)
        moment = blocks.mT @ blocks
        site.moment = moment if site.moment is None else site.moment.add_(moment)
        self._rows[site.name] = self._rows.get(site.name, 0) + len(rows)

    def finish(self) -> None:
        """From sums to means. What two channels have in common is trusted as far as there are rows that show it."""
        for name, rows in self._rows.items():
            moment = self._sites[name].moment
            assert moment is not None
            own = moment.diagonal(dim1=-2, dim2=-1)
            trust = rows / (rows + moment.shape[-1])
            self._sites[name].moment = (trust * moment + (1 - trust) * torch.diag_embed(own)) / rows
        for name, lifts in self._lifts.items():
            self._sites[name].lift = sum(lifts) / len(lifts)


def _are_positions(mask: Node, value: Node) -> bool:
    """Whether a mask [batch, length] has an element for every row of [batch, length, D] or [batch * length, D]."""
    positions, seen = fake(mask), fake(value)
    assert positions is not None and seen is not None
    both = (positions.shape, (positions.numel(),))
    return any(statically_known_true(sym_eq(tuple(shape), tuple(seen.shape[:-1]))) for shape in both)


def _require_finite(value: Tensor, node: Node, batch: int) -> None:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            f"calibration batch {batch} gives NaN or infinity at {describe(node)}\n"
            "  check that batch's inputs and the model's weights"
        )


def lift_of(u: Tensor) -> float:
    """What must be added to currents u, in spike counts, for their rounded sum to be the sum of u; 0 to 1 / 2.

    Most exponentials are below half a spike: rounded as they are, attention loses what they hold together.
    """
    u = u.flatten()[:: max(1, u.numel() // MAX_SAMPLES)].float()
    rest = u - u.round()
    short = rest[rest > 0]
    lost = min(int(rest.sum()), short.numel())
    return 0.5 - float(short.kthvalue(short.numel() + 1 - lost).values) if lost > 0 else 0.0


def _tail(value: Tensor, channel: tuple[int, ...]) -> Tensor:
    """The TAIL quantile of |value| per channel."""
    rows = _rows(value.abs(), channel)
    rank = max(1, round(TAIL * rows.shape[-1]))
    return torch.kthvalue(rows, rank, dim=-1).values


def _rows(value: Tensor, channel: tuple[int, ...]) -> Tensor:
    """The values of every channel [.., n]; an even subsample where there are very many."""
    kept = [d % value.dim() for d in channel]
    rest = [d for d in range(value.dim()) if d not in kept]
    rows = value.permute(*sorted(kept), *rest).reshape(*[value.shape[d] for d in sorted(kept)], -1)
    return rows[..., :: max(1, rows.shape[-1] // MAX_SAMPLES)]
