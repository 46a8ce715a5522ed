"""fasfx.energy: operations and energies by hand, against SpikingJelly's counter, and layers that do nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasfx
from fasfx.errors import InputError, LivenessError
from fasfx.tools.bench.models import tiny, tiny_inputs

RATE = fasfx.SpikeConfig(code="rate", timesteps=4, margin=1.0, granularity="tensor", nonlinear="exact")
SPIKINGJELLY = "spikingjelly.activation_based"
SHARED = 0.01  # how far SpikingJelly's count of a network may be from ours


def three_layers() -> tuple[nn.Module, Tensor]:
    """Thresholds 1, 1.5, 1.5; spikes 4 + 2, 3 + 1 + 4, 4 + 2 at T = 4."""
    layers = [nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)]
    weights = ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 0.5]], [[1.0, 1.0]])
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(torch.tensor(weight))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval(), torch.tensor([[1.0, 0.5]])


def counted(module: nn.Module, x: Tensor, config: fasfx.SpikeConfig, **options: Any) -> fasfx.EnergyReport:
    return fasfx.energy(fasfx.convert(module.eval(), [{"input": x}], config), [{"input": x}], **options)


# --- by hand ---------------------------------------------------------------------------------------------


def test_three_layers_are_what_the_formulas_say_by_hand() -> None:
    found = counted(*three_layers(), RATE)
    layers = found.table[found.table.kind == "synapse"]
    assert layers.macs.tolist() == [6, 6, 2] and layers.acs.tolist() == [18, 16, 6]
    assert layers.papers_original.tolist() == [4.6 * 6, 4.6 * 6, 4.6 * 2]
    assert layers.papers_spiking.tolist() == [0.9 * 18, 0.9 * 16, 0.9 * 6]
    sites = found.table[found.table.kind == "neuron"]
    assert sites.spikes.tolist() == [6, 8, 6] and sites["values"].tolist() == [2, 3, 2]
    assert sites.neuron_steps.tolist() == [8, 12, 8]
    assert found.bits == 3  # 2^3 - 2 is next to 1 / bound = 8
    by_hand = {
        "papers": (4.6 * 14, 0.9 * 40),
        "quantised": (0.039375 * 14, 0.01125 * 40),
        "memory": (0.039375 * 14 + 12.5 * 3 / 8 * (14 + 2 * 7), 0.01125 * 40 + 12.5 * (3 / 8 * 40 + 8 * 28)),
    }
    for row in found.totals.itertuples():
        assert (row.original_pj, row.spiking_pj) == pytest.approx(by_hand[row.counting], rel=1e-12)
        assert row.saved == pytest.approx(1 - row.spiking_pj / row.original_pj) and row.not_spiking == 0
    assert found.headline == pytest.approx(1 - 0.9 * 40 / (4.6 * 14))
    assert found.spikes == 20 / 7


def test_an_eight_bit_code_is_held_against_eight_bits() -> None:
    found = counted(*three_layers(), RATE.replace(code="radix", timesteps=7))
    quantised = found.totals.set_index("counting").loc["quantised"]
    assert found.bits == 8 and quantised.original_pj == pytest.approx(0.23 * 14)
    assert quantised.spiking_pj == pytest.approx(0.03 * float(found.table.acs.sum()))


def test_batches_add_up_and_layers_sum_their_operators() -> None:
    module, x = three_layers()
    snn = fasfx.convert(module, [{"input": x}], RATE)
    once, twice = fasfx.energy(snn, [{"input": x}]), fasfx.energy(snn, [(x,), {"input": torch.cat([x, x])}])
    assert twice.table.acs.tolist() == (3 * once.table.acs).tolist()
    assert twice.totals.saved.tolist() == pytest.approx(once.totals.saved.tolist())
    layers = twice.layers.set_index("module")
    assert layers.acs["2"] == 3 * 16 and layers.macs.sum() == twice.table.macs.sum() == 3 * 14


def test_what_is_left_in_float_costs_the_original_and_is_told() -> None:
    module, x = three_layers()
    found = counted(module, x, RATE.replace(skip=("^2$",)))
    assert found.table.float_macs.sum() == 6 and found.table.acs.sum() == 18 + 6
    papers = found.totals.set_index("counting").loc["papers"]
    assert papers.spiking_pj == pytest.approx(0.9 * 24 + 4.6 * 6)
    assert papers.not_spiking == pytest.approx(4.6 * 6 / papers.spiking_pj)
    assert found.headline == pytest.approx(1 - 0.9 * 24 / (4.6 * 8)), "the paper's rule leaves out what is not spiking"


# --- where operations are ----------------------------------------------------------------------------------


class Products:
    """Multiply-accumulates of a model's linear layers, counted in its own forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.macs = 0
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        self.macs += output.numel() * layer.in_features


@pytest.mark.parametrize(
    ("family", "schedule"), [("bert", "synchronous"), ("llama", "sequential"), ("t5", "sequential")]
)
def test_operations_are_those_of_the_shapes_that_ran(family: str, schedule: str) -> None:
    """Not of the shapes it was captured with; spikes are those that the network reports itself."""
    model, batch = tiny(family), tiny_inputs(family, batch_size=3, length=9)
    snn = fasfx.convert(model, [tiny_inputs(family)], fasfx.SpikeConfig(timesteps=2, schedule=schedule))
    found, sent = fasfx.energy(snn, [batch]).table, snn.count_spikes(**batch)
    own = Products(model)
    model(**batch)
    assert found.macs[found.operator == "linear"].sum() == own.macs
    sites = found[found.kind == "neuron"].set_index("node")
    totals = sent.drop(columns="values").sum(axis=1) * sent["values"]
    assert sites.spikes.to_dict() == pytest.approx(totals.to_dict())
    functions = found[found.kind == "function"]
    assert sorted(functions.spikes / functions.functions) == pytest.approx(sorted(snn.group_spikes(**batch).values()))


def test_a_group_s_spikes_are_accumulates_of_its_function() -> None:
    x = torch.linspace(-3, 3, 40).reshape(5, 8)
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    snn = fasfx.convert(module.eval(), [{"input": x}], fasfx.SpikeConfig())
    found = fasfx.energy(snn, [{"input": x}])
    (group,) = (row for row in found.table.itertuples() if row.kind == "function")
    (per_value,) = snn.group_spikes(input=x).values()
    neurons = int(snn.coverage.table.set_index("kind").reason["function"].split()[0])
    assert group.functions == 40 and group.acs == group.spikes == pytest.approx(40 * per_value)
    assert group.neuron_steps == 40 * neurons * snn.timesteps and group.module == "1"
    in_float = counted(module, x, fasfx.SpikeConfig(nonlinear="exact"))
    assert in_float.table.float_functions.sum() == 40 and in_float.totals.not_spiking[1] > 0


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
def test_a_product_of_spiking_values_costs_the_fewer_spikes_or_both(schedule: str) -> None:
    snn = fasfx.convert(tiny("bert"), [tiny_inputs("bert")], fasfx.SpikeConfig(nonlinear="exact", schedule=schedule))
    batch = tiny_inputs("bert", batch_size=2, length=9)
    found, sent = fasfx.energy(snn, [batch]), snn.count_spikes(**batch)
    per_value = sent.drop(columns="values").sum(axis=1)
    products = found.table[found.table.operator == "matmul"]
    heads, length, size = 4, 9, 8
    assert set(products.macs) == {2 * heads * length * length * size}
    pick = min if schedule == "sequential" else sum
    possible = {round(pick(pair) * 2 * heads * length * length * size) for pair in _pairs(per_value.tolist())}
    assert {round(acs) for acs in products.acs} <= possible


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return [(a, b) for a in values for b in values]


def test_the_border_of_a_convolution_meets_fewer_weights() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = x[0, 0, 1, 1] = 1.0
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(32, 1))
    found = counted(module, x, RATE).table.set_index("operator")
    assert found.acs["conv2d"] == 4 * 2 * (4 + 9), "four spikes each; a corner meets 4 weights of 9, two channels"
    assert found.macs["conv2d"] == 16 * 2 * 9


# --- against SpikingJelly ------------------------------------------------------------------------------------


class Complete(nn.Module):
    """The sequential schedule: a layer starts when its input is complete, so every step sees the mean. [T, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x)


def test_spikingjelly_counts_the_same() -> None:
    counter = pytest.importorskip(
        "spikingjelly.activation_based.op_counter", reason="pip install --no-deps spikingjelly"
    )
    from spikingjelly.activation_based.layer import SeqToANNContainer
    from spikingjelly.activation_based.neuron import IFNode

    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Linear(4 * 36, 10, bias=False)
    x = torch.rand(3, 2, 6, 6)
    module = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear)
    snn = fasfx.convert(module.eval(), [{"input": x}], RATE.replace(timesteps=8))
    ours = fasfx.energy(snn, [{"input": x}])

    theta = [float(t) for t in snn._static_thresholds().values()]
    nodes = [IFNode(v_threshold=t, v_reset=None, step_mode="m") for t in theta]
    first, second = SeqToANNContainer(_times(convolution, theta[0])), SeqToANNContainer(_times(linear, theta[1]))
    theirs = nn.Sequential(nodes[0], first, Complete(), nodes[1], SeqToANNContainer(nn.Flatten()), second)
    profiler = counter.SimpleEnergyProfiler()
    profiler.bind_model(theirs)
    for node, t in zip(nodes, theta, strict=True):
        node.v = t / 2
    with profiler, torch.no_grad():
        theirs(x.expand(8, *x.shape))
    counts = profiler.get_report().counts
    assert ours.table.acs.sum() == pytest.approx(counts["synop"], rel=SHARED) and counts["synop"] > 1000
    assert ours.table.neuron_steps.sum() * 4 == pytest.approx(counts["neuron_state_read_bytes"], rel=SHARED)
    assert ours.table.acs.sum() * 4 == pytest.approx(counts["weight_read_bytes"], rel=SHARED)
    assert ours.totals.spiking_pj[0] == pytest.approx(0.9 * counts["synop"], rel=SHARED)


def _times(layer: nn.Module, factor: float) -> nn.Module:
    """The same layer for spikes of size 1 instead of theta."""
    layer.weight = nn.Parameter(layer.weight.detach() * factor)
    return layer


# --- liveness --------------------------------------------------------------------------------------------


class Relay(nn.Module):
    """What its first layer is given goes through an identity into its second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
        weight = {"only copies": torch.eye(3), "never fires": -torch.eye(3), "always fires": torch.zeros(3, 3)}[kind]
        self.first.weight, self.shift = nn.Parameter(weight), float(kind == "always fires")

    def forward(self, input: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(input) + self.shift))


@pytest.mark.parametrize("schedule", ["sequential", "synchronous"])
@pytest.mark.parametrize("kind", ["never fires", "always fires", "only copies"])
def test_layers_that_do_nothing_are_reported(kind: str, schedule: str) -> None:
    x = torch.rand(4, 3) * torch.tensor([1.0, 0.3, 0.1])
    config = RATE.replace(schedule=schedule)
    snn = fasfx.convert(Relay(kind).eval(), [{"input": x}], config)
    problems = fasfx.energy(snn, [{"input": x}]).problems
    assert [problem.startswith(kind) for problem in problems.problem] == [True]
    site = problems.site[0]
    with pytest.raises(LivenessError, match=f"{site}.*{kind}"):
        fasfx.energy(snn, [{"input": x}], strict=True)


def test_layers_that_work_are_not() -> None:
    assert counted(*three_layers(), RATE, strict=True).problems.empty


def test_no_batches_is_an_error() -> None:
    snn = fasfx.convert(three_layers()[0], [{"input": three_layers()[1]}], RATE)
    with pytest.raises(InputError, match="empty"):
        fasfx.energy(snn, [])


def test_a_network_without_spikes_has_no_headline() -> None:
    module, x = three_layers()
    found = counted(module, x, RATE.replace(skip=(".*",)))
    assert math.isnan(found.headline) and found.totals.saved[0] == 0
