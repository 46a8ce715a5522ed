"""RANGED -> CLIPPED: every site passes through its code's closed form (QCFS for the rate code), trainable.

x  ->  qcfs(x, theta): theta is a parameter, one per tensor or channel, or computed per row ("token").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fasfx import ops
from fasfx.applying import may_apply
from fasfx.config import SpikeConfig
from fasfx.errors import ConfigError
from fasfx.ledger import Bound, Entry
from fasfx.passes.observe import replaced_activations
from fasfx.program import Site, add_tensor, arg, describe, facts, fake, insert
from fasfx.runner import Pass
from fasfx.synapses import RELAYS, carried_values, is_gated, operand, sums_exponentials, synapses

aten = torch.ops.aten
QUIET = 0.75  # quantile of the channels' peaks, the floor of every threshold: unseen text wakes quiet channels
RAISED = 2.0  # the most that one factor for all heads may raise a threshold by
CHANNEL_FLOOR = 1.0  # share of the floor that is in force


class Clip(Pass):
    """Insert qcfs at every site.

    Error:  the code's bound, for |x| <= theta; `margin` is what keeps unseen values inside.
    Source: Bu et al., ICLR 2022; the other codes' papers in fasfx.ops.codes.
    """

    name, takes, gives, numerics = "clip", "RANGED", "CLIPPED", "ledger"

    def rewrite(self, gm: GraphModule) -> bool:
        """One qcfs per site, read by its synaptic users only: residual paths keep the value itself."""
        config = facts(gm).config
        code = ops.CODES[config.code]
        check_dtype(gm, code)
        theta = thresholds(gm)
        replaced = replaced_activations(gm)
        nodes, live = {node.name: node for node in gm.graph.nodes}, {node for node, _ in synapses(gm)}
        for site in facts(gm).sites.values():
            value = nodes[site.name]
            if not may_apply(self.name, f"{config.code}_neuron", value):
                continue
            before = next(n for n in _from(value.next) if n.op != "placeholder")
            if site.dynamic:
                threshold, top = _per_row(gm, value, before, config), None
            else:
                threshold = add_tensor(gm, f"theta_{site.name}", theta[site.name], before, trainable=True)
                top = float(theta[site.name].max())
            neuron = config.neuron(site.population)
            initial = [] if site.initial is None else [site.initial]
            wider: float = 1  # the bound of a neuron: half a count, and the lift
            if site.lift and not initial:
                initial = [site.lift * theta[site.name] / code.capacity(neuron[1], config.levels)]
                wider = 1 + 2 * site.lift
            tuned = [add_tensor(gm, f"initial_{site.name}", v, before, trainable=True) for v in initial]
            clipped = insert(gm, before, value, ops.qcfs.op, value, threshold, *neuron, site.signed, *tuned)
            clipped.meta["site"] = site.name
            every = config.coverage == "activation" or value in replaced
            for user in _other_users(value, clipped) if every else _spiking_users(live, value, site):
                user.replace_input_with(value, clipped)
            if value in replaced:
                replaced[value].replace_all_uses_with(arg(replaced[value], 0))
            bound = Bound(
                wider * code.bound.subs(ops.codes.T, neuron[1] // config.timesteps * ops.codes.T),
                "constant input, |x| <= theta" + ("" if top else " (theta: largest |x| of the row)"),
            )
            value_at = wider * code.error_bound(top, neuron[1], config.levels) if top else None
            facts(gm).ledger.add(Entry(self.name, f"{config.code}_neuron", value.name, site.module, bound, value_at))
        return bool(facts(gm).sites)


def check_dtype(gm: GraphModule, code: ops.Code) -> None:
    """Raise ConfigError if the counts of some site are not exact in its dtype."""
    for node in gm.graph.nodes:
        value, site = fake(node), facts(gm).sites.get(node.name)
        if site is None or value is None:
            continue
        _, steps, levels = facts(gm).config.neuron(site.population)
        if (top := code.capacity(steps, levels)) > 2 / torch.finfo(value.dtype).eps:
            raise ConfigError(
                f"spike counts up to {top} are not exact in {value.dtype} ({describe(node)}): convert model.float(), "
                "or choose fewer levels or time steps"
            )


def _from(node: Node) -> Iterator[Node]:
    while True:
        yield node
        node = node.next


def _other_users(value: Node, clipped: Node) -> list[Node]:
    """An activation function that is sent or replaced has no value of its own any more."""
    return [user for user in value.users if user is not clipped]


def _spiking_users(live: set[Node], value: Node, site: Site) -> list[Node]:
    """Users that meet the value as spikes: synapses, relays to synapses, and sums of a deferred softmax."""
    sums = [user for user in value.users if user.target is aten.sum.dim_IntList and site.fixed is not None]
    relays = [user for user in value.users if user.target in RELAYS and operand(user) is value]
    return [user for user in value.users if user in live] + sums + relays


def _per_row(gm: GraphModule, value: Node, before: Node, config: SpikeConfig) -> Node:
    """The dynamic threshold of each row: largest |x| over the last dim, times margin."""
    peak = insert(gm, before, value, aten.amax.default, insert(gm, before, value, aten.abs.default, value), [-1], True)
    margin, smallest = config.margin or 1, config.unit(config.timesteps) * torch.finfo(torch.float32).tiny
    scaled = peak if margin == 1 else insert(gm, before, value, aten.mul.Tensor, peak, margin)
    return insert(gm, before, value, aten.clamp.default, scaled, smallest)


def thresholds(gm: GraphModule) -> dict[str, Tensor]:
    """theta of every site with a static threshold: what training or tuning found, else calibrated.

    The products' constraint on channels holds for those that are calibrated; learned ones keep it (fasfx.learnable).
    """
    config, values = facts(gm).config, carried_values(gm)
    gates = {node.name for node in values if is_gated(node, values)}
    sums = {node.name for node in values if node.target is aten.matmul.default and sums_exponentials(node)}
    theta = {n: _threshold(site, config, n in gates, n in sums) for n, site in facts(gm).sites.items()}
    for node, live in synapses(gm):
        if node.target is aten.matmul.default and len(live) == 2:
            _couple(theta, node, config.weights == "int8")
    for name, site in facts(gm).sites.items():
        if (learned := site.theta if site.tuned is None else site.tuned) is not None:
            theta[name] = learned
    return theta


def _threshold(site: Site, config: SpikeConfig, product: bool, summed: bool) -> Tensor:
    assert site.peak is not None
    if site.fixed is not None:
        return torch.full_like(site.peak.amax(), site.fixed)
    seen = site.tail if config.threshold == "percentile" else site.peak
    assert seen is not None
    whole = seen.amax()
    margin = config.resolved_margin ** (2 if summed else 1)  # a sum over positions grows with their number
    theta = whole * margin
    # Element by element, scales per channel cost nothing; between the layers they would not leave a sum.
    if config.resolved_granularity == "channel" or (config.granularity is None and site.population > config.population):
        # Unseen factors of a product exceed their maxima by the margin each, the product by its square.
        theta = margin ** (2 if product else 1) * floored(seen, product)
    return torch.where(theta > 0, theta, torch.ones_like(theta))  # a value that is always 0 has any threshold


def floored(seen: Tensor, product: bool) -> Tensor:
    """What channels [..] that were quiet in calibration may reach on other text: their peaks, and a floor for all."""
    floor = torch.quantile(seen.flatten().float(), QUIET).to(seen)
    if not product:  # one massive channel must not coarsen the others, nor must many that are alike
        floor = torch.minimum(floor, seen.amax() / 8)
    return torch.hypot(seen, CHANNEL_FLOOR * floor)


def _couple(theta: dict[str, Tensor], node: Node, heads: bool) -> None:
    """Make theta_a[d] * theta_b[d] the same for every summed channel d, by raising both: then it leaves the sum.

    heads: the same for every head too, which one factor then scales, where no head is much narrower than another.
    """
    names = [operand(arg).name for arg in node.args]
    if not all(name in theta for name in names):
        return
    a, b = (theta[name] for name in names)
    per_channel = (a.dim() >= 1 and a.shape[-1] > 1, b.dim() >= 2 and b.shape[-2] > 1)
    if all(per_channel):
        product = a * b.transpose(-1, -2)
        widest = product.amax(-1, keepdim=True)
        if heads and widest.amax() <= RAISED**2 * widest.amin():
            widest = widest.amax()
        factor = (widest / product).sqrt()
        theta[names[0]], theta[names[1]] = a * factor, b * factor.transpose(-1, -2)
    elif per_channel[0]:
        theta[names[0]] = a.amax(-1, keepdim=True)
    elif per_channel[1]:
        theta[names[1]] = b.amax(-2, keepdim=True)
