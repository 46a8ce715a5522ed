"""Bad input: one clear error of the right class, nothing half written, the caller's model as it was."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasfx
from fasfx import checkpoint
from fasfx.errors import (
    CalibrationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    FasfxError,
    InputError,
)
from fasfx.tools.bench.models import tiny, tiny_inputs

Batch = dict[str, Any]
FILES = ("spike_config.json", "graph.txt", "model.safetensors", "config.json")


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()]


def assert_as_it_was(model: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> None:
    after, modes = state(model)
    assert modes == before[1]
    assert after.keys() == before[0].keys()
    for name, value in before[0].items():
        assert value.view(torch.uint8).equal(after[name].view(torch.uint8)), f"{name} changed"  # NaN counts as equal


def text() -> Batch:
    return tiny_inputs("bert", 4)


def image(fill: float | None = None) -> Batch:
    batch = tiny_inputs("vit", 4)
    if fill is not None:
        batch["pixel_values"][1, 2, 3, 4] = fill
    return batch


def without(batch: Batch, name: str) -> Batch:
    return {k: v for k, v in batch.items() if k != name}


# --- calibration ----------------------------------------------------------------------------------------

# name: (family, calibration, error, a part of its message)
CALIBRATIONS: dict[str, tuple[str, Callable[[], Any], type[FasfxError], str]] = {
    "empty": ("bert", lambda: [], CalibrationError, "holds no batches"),
    "empty generator": ("bert", lambda: iter(()), CalibrationError, "holds no batches"),
    "one batch instead of a list": ("bert", text, CalibrationError, "pass a list of batches"),
    "one tensor instead of a list": (
        "bert",
        lambda: text()["input_ids"],
        CalibrationError,
        "pass a list of batches",
    ),
    "texts": ("bert", lambda: ["not tokenised"], CalibrationError, "pass dicts of model inputs"),
    "no inputs": ("bert", lambda: [{}], CaptureError, "without tensor inputs"),
    "constants only": ("bert", lambda: [{"use_cache": False}], CaptureError, "without tensor inputs"),
    "unknown key": ("bert", lambda: [text() | {"colour": text()["input_ids"]}], InputError, "colour"),
    "missing key later": (
        "bert",
        lambda: [text(), without(text(), "attention_mask")],
        InputError,
        "batch 1 lacks attention_mask",
    ),
    "extra key later": (
        "bert",
        lambda: [text(), text() | {"token_type_ids": text()["attention_mask"]}],
        InputError,
        "batch 1 has token_type_ids",
    ),
    "float ids": (
        "bert",
        lambda: [text() | {"input_ids": text()["input_ids"].float()}],
        CaptureError,
        "Long, Int",
    ),
    "other dtype later": (
        "bert",
        lambda: [text(), text() | {"input_ids": text()["input_ids"].int()}],
        InputError,
        "input_ids is torch.int32",
    ),
    "other rank later": (
        "bert",
        lambda: [text(), {k: v[0] for k, v in text().items()}],
        InputError,
        "rank 1",
    ),
    "list instead of tensor later": (
        "bert",
        lambda: [text(), {k: v.tolist() for k, v in text().items()}],
        InputError,
        "input_ids is a list",
    ),
    "inputs of different batch size": (
        "bert",
        lambda: [text(), text() | {"attention_mask": text()["attention_mask"][:3]}],
        CalibrationError,
        "batch 1",
    ),
    "token beyond the vocabulary": (
        "bert",
        lambda: [text(), text() | {"input_ids": text()["input_ids"] + 500}],
        CalibrationError,
        "batch 1",
    ),
    "NaN first": ("vit", lambda: [image(float("nan"))], CalibrationError, "batch 0: pixel_values holds NaN"),
    "NaN later": (
        "vit",
        lambda: [image(), image(float("nan"))],
        CalibrationError,
        "batch 1: pixel_values holds NaN",
    ),
    "infinity": ("vit", lambda: [image(float("inf"))], CalibrationError, "batch 0: pixel_values holds NaN"),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibration(case: str) -> None:
    family, calibration, expected, words = CALIBRATIONS[case]
    model = tiny(family).train()
    next(model.children()).eval()  # a mode of its own, which must survive too
    before = state(model)
    with pytest.raises(expected, match=words) as caught:
        fasfx.convert(model, calibration())
    assert type(caught.value) is expected
    assert_as_it_was(model, before)


@pytest.mark.parametrize("name", ["encoder.layer.1.intermediate.dense.weight", "embeddings.word_embeddings.weight"])
def test_nan_in_weights_names_the_place(name: str) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    before = state(model)
    with pytest.raises(CalibrationError, match="NaN or infinity") as caught:
        fasfx.convert(model, [text()])
    assert "check that batch's inputs and the model's weights" in str(caught.value)
    if "encoder" in name:
        assert "layer.1" in str(caught.value)
    assert_as_it_was(model, before)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_plain_module_without_calibration() -> None:
    with pytest.raises(CalibrationError, match=r"pass calibration=\[example inputs"):
        fasfx.convert(Plain())


def test_plain_module_with_unknown_input() -> None:
    with pytest.raises((InputError, CaptureError), match="colour"):
        fasfx.convert(Plain(), [{"x": torch.ones(2, 3), "colour": torch.ones(2, 3)}])


def test_model_whose_inputs_the_config_does_not_tell() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,), "num_conv_pos_embeddings": 4}
    model = Wav2Vec2Model(Wav2Vec2Config(**sizes, **layers, num_conv_pos_embedding_groups=2))
    with pytest.raises(CalibrationError, match=r"pass calibration=\[example inputs"):
        fasfx.convert(model)


def test_text_model_without_tokenizer_is_not_calibrated_on_unknown_tokens(tmp_path: Path) -> None:
    from transformers import AutoModel

    tiny("bert").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="come from random inputs"):
        fasfx.convert(AutoModel.from_pretrained(tmp_path))


# --- configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timesteps", 0), ("timesteps", -1), ("timesteps", 1.5), ("timesteps", True), ("timesteps", "4"),
        ("levels", 0), ("levels", 25), ("code", "morse"), ("code", None), ("granularity", "row"),
        ("margin", 0.0), ("margin", float("nan")), ("skip", ("(",)), ("skip", (3,)), ("threshold", "mean"),
    ],
)  # fmt: skip
def test_config_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        fasfx.SpikeConfig(**{field: value})
    with pytest.raises(ConfigError, match=field):
        fasfx.SpikeConfig().replace(**{field: value})


def test_config_unknown_field() -> None:
    with pytest.raises(ConfigError, match="unknown field time_steps.*timesteps"):
        fasfx.SpikeConfig().replace(time_steps=4)


def test_radix_beyond_exact_counts() -> None:
    with pytest.raises(ConfigError, match="not exact"):
        fasfx.SpikeConfig(code="radix", timesteps=25)


# --- writing --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snn() -> fasfx.SpikingModel:
    return fasfx.convert(tiny("bert"), [text()])


@pytest.fixture(scope="module")
def old_snn() -> fasfx.SpikingModel:
    """What lies in the target before: another network in every file."""
    return fasfx.convert(tiny("gpt2"), [text()], fasfx.SpikeConfig(timesteps=2))


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_call(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """The real function until its `number`-th call, which finds the disk full."""
    calls = iter(range(1, 10_000))
    return lambda *args, **kwargs: no_space() if next(calls) == number else real(*args, **kwargs)


WRITERS: dict[str, tuple[str, int]] = {
    "making the folder": ("tempfile.mkdtemp", 1),
    "graph": ("pathlib.Path.write_text", 1),
    "weights": ("safetensors.torch.save_file", 1),
    "Hugging Face config": ("transformers.PretrainedConfig.save_pretrained", 1),
    "settings": ("pathlib.Path.write_text", 2),
    "first rename": ("os.replace", 1),
    "second rename": ("os.replace", 2),
    "third rename": ("os.replace", 3),
}


def fill_disk(patch: pytest.MonkeyPatch, where: str) -> None:
    path, number = WRITERS[where]
    owner, name = path.rsplit(".", 1)
    import pathlib
    import tempfile

    import safetensors.torch
    import transformers

    places = {"os": os, "tempfile": tempfile, "safetensors.torch": safetensors.torch}
    places |= {"pathlib.Path": pathlib.Path, "transformers.PretrainedConfig": transformers.PretrainedConfig}
    real = getattr(places[owner], name)
    patch.setattr(places[owner], name, on_call(number, real))


def output(model: fasfx.SpikingModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**text())[0]
    return result


@pytest.mark.parametrize("where", [w for w in WRITERS if w not in ("second rename", "third rename")])
def test_full_disk_on_a_new_folder(where: str, snn: fasfx.SpikingModel, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, where)
        with pytest.raises(CheckpointError, match="No space left on device"):
            snn.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", WRITERS)
def test_full_disk_leaves_the_old_checkpoint(
    where: str, snn: fasfx.SpikingModel, old_snn: fasfx.SpikingModel, tmp_path: Path, monkeypatch: Any
) -> None:
    target = tmp_path / "out"
    old_snn.save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with monkeypatch.context() as patch:
        fill_disk(patch, where)
        try:
            snn.save_pretrained(target)
        except CheckpointError as error:
            assert "No space left on device" in str(error)
            assert {file.name: file.read_bytes() for file in target.iterdir()} == before
        else:
            assert where == "third rename"  # may never come: what matters is that the save is whole then
    loaded = fasfx.SpikingModel.from_pretrained(target)
    assert loaded.timesteps in (2, 4)
    assert torch.equal(output(loaded), output(old_snn if loaded.timesteps == 2 else snn))
    assert (target / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files beyond 50 kB: a real failure inside safetensors' own writer."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_write_that_fails_inside_safetensors(snn: fasfx.SpikingModel, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        snn.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_on_onnx_export(snn: fasfx.SpikingModel, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.exporters import ExportedModel

    monkeypatch.setattr(ExportedModel, "save_pretrained", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        snn.to_onnx(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["/proc/out", "/proc/a/b/out", "file", "file/out"])
@pytest.mark.parametrize("kind", ["save_pretrained", "to_onnx"])
def test_place_that_cannot_be_written(kind: str, target: str, snn: fasfx.SpikingModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write|is a file"):
        getattr(snn, kind)(tmp_path / target)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "mine")]


def test_saving_over_a_hugging_face_model_is_refused(snn: fasfx.SpikingModel, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="would be overwritten"):
        snn.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- reading --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(snn: fasfx.SpikingModel, tmp_path: Path) -> Path:
    snn.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_round_trip_is_bitwise_and_without_pickle(saved: Path, snn: fasfx.SpikingModel) -> None:
    loaded = fasfx.SpikingModel.from_pretrained(saved)
    assert torch.equal(output(loaded), output(snn))
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    assert not any(file.read_bytes().startswith((b"\x80", b"PK")) for file in saved.iterdir())  # pickle, zip
    again = saved.with_name("again")
    loaded.save_pretrained(again)
    assert torch.equal(output(fasfx.SpikingModel.from_pretrained(again)), output(snn))


def test_checkpoint_files_are_as_readable_as_any_new_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in saved.iterdir()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "garbage": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file(name: str, damage: str, saved: Path) -> None:
    content = DAMAGES[damage]((saved / name).read_bytes())
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="saved"):
        fasfx.SpikingModel.from_pretrained(saved)


@pytest.mark.parametrize("place", ["missing", "file", "empty", "model"])
def test_folder_that_is_no_checkpoint(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    tiny("bert").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"is no fasfx checkpoint.*fasfx convert"):
        fasfx.SpikingModel.from_pretrained(tmp_path / place)


def change(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "spike_config.json").read_text())
    (folder / "spike_config.json").write_text(json.dumps(settings | fields))


def test_newer_format(saved: Path) -> None:
    change(saved, format=checkpoint.FORMAT + 1, added="later")
    with pytest.raises(CheckpointError, match=f"format {checkpoint.FORMAT + 1}.*update fasfx"):
        fasfx.SpikingModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "1"},
        {"format": None},
        {"sites": []},
        {"config": {"code": "morse"}},
        {"bytes": 3},
        {"config": {"neu": 1}},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(fields: Batch, saved: Path) -> None:
    change(saved, **fields)
    with pytest.raises(CheckpointError, match="saved"):
        fasfx.SpikingModel.from_pretrained(saved)


@pytest.mark.parametrize("call", ["builtins.exec({!r})", "torch.hub.os.system({!r})"])
def test_a_checkpoint_runs_no_code(call: str, saved: Path, tmp_path: Path) -> None:
    lines = (saved / "graph.txt").read_text().splitlines()
    harm = {"builtins": f"open({str(tmp_path / 'harm')!r}, 'w')", "torch": f"touch {tmp_path / 'harm'}"}
    lines.insert(3, f"x = {call.format(harm[call.partition('.')[0]])}  # NoneType")
    (saved / "graph.txt").write_text("\n".join(lines) + "\n")
    sizes = json.loads((saved / "spike_config.json").read_text())["bytes"]
    change(saved, bytes=sizes | {"graph.txt": (saved / "graph.txt").stat().st_size})
    with pytest.raises(CheckpointError, match="unknown operator"):
        fasfx.SpikingModel.from_pretrained(saved)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["export.json", "model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("damage", ["missing", "empty", "halved"])
def test_damaged_onnx_export(name: str, damage: str, exported: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(exported, tmp_path / "saved"))
    content = DAMAGES[damage]((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="saved"):
        fasfx.runtime.OnnxModel(folder)


@pytest.fixture(scope="module")
def exported(snn: fasfx.SpikingModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    snn.to_onnx(folder)
    return folder


def test_an_error_of_the_model_that_says_nothing_is_a_capture_error() -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != 7:
                raise AssertionError  # what a bare assert does
            return x

    with pytest.raises(fasfx.errors.CaptureError, match="Picky: AssertionError"):
        fasfx.convert(Picky(), [{"x": torch.ones(2, 3)}])
