"""Several neurons for every value: what they send in a tick, how it is counted, and what it is worth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import EXACT, classifier, inputs, text
from torch import nn

import fasfx
from fasfx.errors import ConfigError
from fasfx.passes.clip import thresholds
from fasfx.program import facts

BATCH = inputs(text())


def converted(**fields: Any) -> fasfx.SpikingModel:
    return fasfx.convert(classifier(), [BATCH], EXACT.replace(**fields))


def logits(snn: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return snn(**BATCH).logits


@pytest.mark.parametrize(("code", "steps"), [("multi", 2), ("radix", 10)])
def test_two_neurons_send_what_one_does_in_twice_the_steps(code: Any, steps: int) -> None:
    two, one = converted(code=code, timesteps=steps // 2, population=2), converted(code=code, timesteps=steps)
    assert torch.equal(logits(two), logits(one))
    assert fasfx.energy(two, [BATCH]).totals.equals(fasfx.energy(one, [BATCH]).totals)
    (a,), (b,) = (fasfx.check(classifier(), n, [BATCH], [n.timesteps]).table["bound"] for n in (two, one))
    assert a == b


def test_lifts_are_found_for_the_counts_of_all() -> None:
    lifts = []
    for steps, population in ((6, 1), (3, 2)):
        snn = converted(code="radix", weights="int8", timesteps=steps, population=population)
        lifts.append([site.lift for site in facts(snn.ranged).sites.values()])
    assert any(lifts[0]) and lifts[0] == lifts[1]


def test_radix_factors_have_as_many_as_stay_exact() -> None:
    """Four neurons of seven steps would not: three are."""
    assert fasfx.SpikeConfig(code="radix", timesteps=7, population=2).neuron(4)[1] == 21
    assert fasfx.SpikeConfig(code="radix", timesteps=13).neuron(2)[1] == 13


def test_the_first_tick_of_many_is_their_closed_form() -> None:
    ticking = converted(timesteps=1, population=3, schedule="synchronous")
    assert torch.equal(logits(ticking), logits(converted(timesteps=1, population=3)))


def test_every_tick_is_worth_more() -> None:
    wanted, errors = logits(classifier()), dict[int, list[float]]()
    for population in (1, 2):
        snn = converted(timesteps=3, population=population, schedule="synchronous")
        errors[population] = [float((out.logits - wanted).norm() / wanted.norm()) for out in snn.ticks(**BATCH)]
    assert all(two < 0.5 * one for one, two in zip(errors[1], errors[2], strict=True))


def test_spikes_and_bounds_count_all_of_them() -> None:
    snn = converted(timesteps=2, population=2)
    trains = snn.spikes(**BATCH)
    assert {train.events.shape[0] for train in trains.values()} == {4}
    one = converted(timesteps=2)
    assert 1.2 < fasfx.energy(snn, [BATCH]).spikes / fasfx.energy(one, [BATCH]).spikes <= 2
    bounds = [{e.node: e.value for e in network.ledger.entries} for network in (snn, converted(timesteps=4))]
    assert bounds[0] == bounds[1]


def test_factors_of_products_have_twice_as_many() -> None:
    snn = fasfx.convert(classifier(), [BATCH], fasfx.SpikeConfig(population=2))
    assert {site.population for site in facts(snn.ranged).sites.values()} == {2, 4}
    theta, sites = thresholds(snn.ranged), facts(snn.ranged).sites
    assert all(theta[name].dim() == 0 for name, site in sites.items() if site.population == 2)  # as of one neuron
    assert any(theta[name].dim() > 0 for name, site in sites.items() if site.population == 4)


def test_exports_have_them(tmp_path: Path) -> None:
    snn = converted(timesteps=2, population=2, schedule="synchronous")
    snn.to_onnx(tmp_path)
    assert torch.allclose(fasfx.runtime.OnnxModel(tmp_path)(**BATCH).logits, logits(snn), atol=1e-5)


@pytest.mark.parametrize("population", [0, -1, 1.5, True])
def test_less_than_one_is_refused(population: Any) -> None:
    with pytest.raises(ConfigError, match="population=.*must be a whole number"):
        fasfx.SpikeConfig(population=population)


def test_radix_digits_of_all_neurons_stay_exact() -> None:
    with pytest.raises(ConfigError, match="population=2: a radix count of 26 steps is not exact"):
        fasfx.SpikeConfig(code="radix", timesteps=13, population=2)


def test_the_bound_of_a_product_is_that_of_the_steps_it_has() -> None:
    """Two radix neurons of 13 steps would not be exact: factors keep one, and their bound is of 13 steps."""
    config = fasfx.SpikeConfig(code="radix", timesteps=13, margin=1.0)
    snn = fasfx.convert(classifier(), [BATCH], config)
    for entry in snn.ledger.entries:
        if entry.rule == "radix_neuron" and entry.value is not None:
            theta = float(thresholds(snn.ranged)[entry.node].max())
            assert entry.promise.at(theta=theta, T=13, levels=20) == pytest.approx(entry.value)
