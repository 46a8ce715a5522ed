"""OnnxModel as a host uses it: streams, warm-up, threads, wrong inputs, damaged files, missing providers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

import fasfx
from fasfx.errors import CheckpointError, ConfigError, InputError, RuntimeUnavailableError
from fasfx.runtime import OnnxModel
from fasfx.runtime.feeding import refused
from fasfx.runtime.integrity import SUMS
from fasfx.tools.bench.models import tiny, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
FORMS: dict[str, dict[str, Any]] = {"integer": {}, "closed": {}, "step": {"schedule": "synchronous"}}


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    config = fasfx.SpikeConfig.low_latency(3) if request.param == "step" else fasfx.SpikeConfig.integer()
    given = tiny_inputs("bert") | {"use_cache": False}
    fasfx.convert(tiny("bert"), [given], config).to_onnx(made, form=request.param)
    return made


def batch(rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return tiny_inputs("bert", rows, length, seed)


def test_a_stream_gives_what_calls_give_and_takes_no_batch_before_its_turn(folder: Path) -> None:
    model, taken = OnnxModel(folder, threads=1), []

    def source() -> Iterator[dict[str, Tensor]]:
        for seed in range(4):
            taken.append(seed)
            yield batch(1 + seed, 5 + seed, seed)

    stream = model.stream(source())
    for seed in range(4):
        found = next(stream).last_hidden_state
        assert torch.equal(found, model(**batch(1 + seed, 5 + seed, seed)).last_hidden_state)
        assert len(taken) <= seed + 2
    assert next(stream, None) is None


def test_what_a_stream_raises_is_the_sources_own(folder: Path) -> None:
    def source() -> Iterator[dict[str, Tensor]]:
        yield batch()
        raise LookupError("no more")

    stream = OnnxModel(folder, threads=1).stream(source())
    next(stream)
    with pytest.raises(LookupError, match="no more"):
        next(stream)


def test_a_stream_can_be_left_and_passes_on_nothing(folder: Path) -> None:
    waiting: Queue[dict[str, Tensor]] = Queue()
    waiting.put(batch())
    stream = OnnxModel(folder, threads=1).stream(iter(waiting.get, None))
    next(stream)
    stream.close()  # while the next batch is waited for
    with pytest.raises(TypeError):
        list(OnnxModel(folder, threads=1).stream([batch(), None]))


def test_a_run_that_fails_does_not_go_on_elsewhere(folder: Path) -> None:
    assert OnnxModel(folder).session._enable_fallback is False


def test_what_memory_or_a_device_fails_at_is_no_wrong_input() -> None:
    def run() -> None:
        raise MemoryError

    with pytest.raises(RuntimeUnavailableError, match="gave up: MemoryError"):
        refused(run)


@pytest.mark.parametrize("damage", [lambda text: b"", lambda text: text[: len(text) // 2], lambda text: b"\xff" + text])
def test_damaged_checksums_are_found(folder: Path, damage: Any, tmp_path: Path) -> None:
    saved = Path(shutil.copytree(folder, tmp_path / "saved"))
    (saved / SUMS).write_bytes(damage((saved / SUMS).read_bytes()))
    with pytest.raises(CheckpointError, match="damaged|missing"):
        OnnxModel(saved)


def test_warm_up_runs_the_sizes_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = OnnxModel(folder, threads=1), []
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, **inputs: seen.append(inputs))
    model.warm_up(3, 11)
    assert {name: tuple(value.shape) for name, value in seen[0].items()} == dict.fromkeys(batch(), (3, 11))
    assert all(bool((value == 1).all()) and value.dtype == torch.int64 for value in seen[0].values())
    with pytest.raises(ConfigError, match="give 2, those of"):
        model.warm_up(3)


def test_one_model_serves_two_threads(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    batches = [batch(1 + seed % 3, 3 + seed, seed) for seed in range(8)]
    expected = [model(**one).last_hidden_state for one in batches]
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda at: model(**batches[at % 8]).last_hidden_state, range(48))
        assert all(torch.equal(value, expected[at % 8]) for at, value in enumerate(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"input_ids": b["input_ids"]}, "missing input attention_mask"),
        (lambda b: b | {"ids": b["input_ids"]}, "unknown input ids"),
        (lambda b: b | {"output_hiden_states": True}, "unknown input output_hiden_states: the model was captured"),
        (lambda b: b | {"use_cache": True}, "was captured with use_cache=False"),
        (lambda b: b | {"input_ids": b["input_ids"][0]}, "input_ids has rank 1: the model takes rank 2"),
        (
            lambda b: b | {"input_ids": b["input_ids"].float()},
            "input_ids is torch.float32: the model takes torch.int64",
        ),
    ],
)
def test_wrong_inputs_are_named(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxModel(folder, threads=1)(**change(batch()))


def test_none_and_what_was_captured_change_nothing(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    found = model(**batch(), labels=None, use_cache=False).last_hidden_state
    assert torch.equal(found, model(**batch()).last_hidden_state)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "export.json"])
def test_a_flipped_bit_is_found(folder: Path, name: str, tmp_path: Path) -> None:
    saved = Path(shutil.copytree(folder, tmp_path / "saved"))
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 4
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        OnnxModel(saved)
    (saved / SUMS).unlink()  # another program's export has none: what ONNX Runtime can read is run
    if name == "model.onnx.data":
        OnnxModel(saved)


def test_providers_that_are_missing_are_named(folder: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="install onnxruntime-gpu"):
        OnnxModel(folder, device="cuda")
    with pytest.raises(ConfigError, match="'tpu': choose cpu, cuda, webgpu"):
        OnnxModel(folder, device="tpu")


def test_a_missing_plug_in_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasfx.runtime.providers.PLUGIN", "no_such_plug_in")
    monkeypatch.setattr("onnxruntime.get_ep_devices", lambda: [])
    with pytest.raises(RuntimeUnavailableError, match="pip install onnxruntime-ep-webgpu"):
        OnnxModel(folder, device="webgpu")
