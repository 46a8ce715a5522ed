"""In float64 nothing but the text itself decides what a network says: not its neighbours, padding or place."""

from typing import Any

import pytest
import torch
from strategies import same
from torch import Tensor

import fasfx
from fasfx.config import SpikeConfig
from fasfx.ops import CODES
from fasfx.program import copy_program, facts
from fasfx.tools.bench.models import tiny, tiny_inputs

FLOAT_ACCURACY = 1e-9
STEPS = {"multi": 3, "radix": 6, "rate": 8}
FAMILIES = ("bert", "llama")
OUTPUT = {"bert": "last_hidden_state", "llama": "logits"}


@pytest.fixture(scope="module", params=FAMILIES)
def spiking(request: pytest.FixtureRequest) -> tuple[str, dict[str, fasfx.SpikingModel]]:
    """One float64 network of a family per code."""
    family = request.param
    calibration = [without_cache(family, tiny_inputs(family, batch_size=4, seed=seed)) for seed in range(2)]
    config = SpikeConfig(nonlinear="exact", code="multi", timesteps=STEPS["multi"])
    multi = fasfx.convert(tiny(family).double(), calibration=calibration, config=config)
    return family, {code: multi if code == "multi" else recoded(multi, code) for code in CODES}


def recoded(snn: fasfx.SpikingModel, code: str) -> fasfx.SpikingModel:
    """The same calibrated network with another code: capturing it again would take seconds."""
    ranged = copy_program(snn.ranged)
    facts(ranged).config = SpikeConfig(nonlinear="exact", code=code, timesteps=STEPS[code])
    return fasfx.SpikingModel(ranged, snn.config)


def without_cache(family: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    return batch | ({"use_cache": False} if family == "llama" else {})


def run(spiking: tuple[str, dict[str, fasfx.SpikingModel]], code: str, batch: dict[str, Tensor]) -> Any:
    """(output [batch, length, features], site -> counts)."""
    family, networks = spiking
    with torch.no_grad():
        output = networks[code](**batch)[OUTPUT[family]]
    return output, {site: train.counts() for site, train in networks[code].spikes(**batch).items()}


@pytest.mark.parametrize("code", CODES)
def test_permuting_the_batch_permutes_everything(spiking: Any, code: str) -> None:
    batch = tiny_inputs(spiking[0], batch_size=5, seed=7)
    order = torch.tensor([3, 0, 4, 2, 1])
    output, counts = run(spiking, code, batch)
    permuted, permuted_counts = run(spiking, code, {name: value[order] for name, value in batch.items()})
    assert same([output[order]], [permuted], FLOAT_ACCURACY)
    for site, value in counts.items():
        assert torch.equal(value[order] if value.shape[0] == 5 else value, permuted_counts[site]), site


@pytest.mark.parametrize("code", CODES)
def test_neighbours_in_the_batch_change_nothing(spiking: Any, code: str) -> None:
    """Alone, in a pair, or among seven: batch sizes other than any seen in calibration."""
    batch = tiny_inputs(spiking[0], batch_size=7, seed=8)
    output, counts = run(spiking, code, batch)
    for size in (1, 2, 3):
        part, part_counts = run(spiking, code, {name: value[:size] for name, value in batch.items()})
        assert same([output[:size]], [part], FLOAT_ACCURACY)
        for site, value in part_counts.items():
            assert torch.equal(counts[site][:size] if counts[site].shape[0] == 7 else counts[site], value), site


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("extra", [1, 4, 11])
def test_padding_changes_nothing(spiking: Any, code: str, extra: int) -> None:
    """Masked positions after the text: outputs and counts of the text are those without them."""
    batch = tiny_inputs(spiking[0], batch_size=3, length=8, seed=9)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    tail = torch.full((3, extra), 5)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], tail], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(tail)], 1),
    }
    output, counts = run(spiking, code, batch)
    longer, longer_counts = run(spiking, code, padded)
    assert same([output], [longer[:, :8]], FLOAT_ACCURACY)
    assert counts.keys() == longer_counts.keys()
    for site, value in counts.items():
        window = tuple(slice(0, size) for size in value.shape)
        assert torch.equal(value, longer_counts[site][window]), site


@pytest.mark.parametrize("code", CODES)
def test_what_padding_says_changes_nothing(spiking: Any, code: str) -> None:
    batch = tiny_inputs(spiking[0], batch_size=3, length=8, seed=10)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77))
    kept = batch["attention_mask"].bool()
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert same([run(spiking, code, batch)[0][kept]], [run(spiking, code, other)[0][kept]], FLOAT_ACCURACY)


@pytest.mark.parametrize("code", CODES)
def test_a_causal_network_does_not_look_ahead(spiking: Any, code: str) -> None:
    if spiking[0] != "llama":
        pytest.skip("only the decoder is causal")
    batch = tiny_inputs("llama", batch_size=2, length=10, seed=11)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    shorter = {name: value[:, :6] for name, value in batch.items()}
    assert same([run(spiking, code, batch)[0][:, :6]], [run(spiking, code, shorter)[0]], FLOAT_ACCURACY)


@pytest.mark.parametrize("code", CODES)
def test_same_inputs_same_answer(spiking: Any, code: str) -> None:
    """Bitwise; also after other steps have been tried and set back."""
    family, networks = spiking
    batch = tiny_inputs(family, seed=12)
    output, counts = run(spiking, code, batch)
    networks[code].timesteps = STEPS[code] + 1
    assert not torch.equal(run(spiking, code, batch)[0], output)
    networks[code].timesteps = STEPS[code]
    again, again_counts = run(spiking, code, batch)
    assert torch.equal(output, again)
    assert all(torch.equal(counts[site], again_counts[site]) for site in counts)


@pytest.mark.parametrize("code", CODES)
def test_decoded_trains_are_the_counts_of_the_forward(spiking: Any, code: str) -> None:
    family, networks = spiking
    batch = tiny_inputs(family, seed=13)
    for site, train in networks[code].spikes(**batch).items():
        assert train.events.dtype == torch.int8 and train.events.shape[0] == STEPS[code], site
        assert torch.equal(train.decode(), train.counts().to(train.scale.dtype) * train.scale), site
        assert 0.0 <= train.firing_rate <= 1.0
