"""Which nodes have no CUDA kernel: none of any export at opset 18, and every planted one is found."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

import fasfx
from fasfx.calibration import without_cache
from fasfx.errors import CheckpointError, ConfigError
from fasfx.runtime import missing_kernels, providers
from fasfx.tools.bench import cases, cost, kernels
from fasfx.tools.bench.models import tiny, tiny_inputs
from fasfx.tools.kernel_table import kernels as rows_of

EXPORTS = [  # the benchmark `kernels` makes all of them
    ("bert", "functions exact"),
    ("gpt2", "synchronous, Loop"),
    ("llama", "functions spiking"),
    ("opt", "integer"),
    ("t5", "integer"),
    ("vit", "functions exact"),
]


@pytest.mark.parametrize(("family", "form"), EXPORTS)
def test_every_node_of_an_export_has_a_cuda_kernel(family: str, form: str, tmp_path: Path) -> None:
    model, (config, name) = tiny(family), kernels.FORMS[form]
    with cases.undisturbed():
        fasfx.convert(model, [tiny_inputs(family) | without_cache(model)], config).to_onnx(tmp_path, form=name)
    missing = missing_kernels(tmp_path)
    assert missing.empty, missing.to_string()


@pytest.mark.parametrize(("opset", "operators"), [(18, set()), (23, {"Cos", "Sin"})])
def test_a_llama_itself_has_kernels_at_opset_18_only(opset: int, operators: set[str], tmp_path: Path) -> None:
    model = tiny("llama")
    with cases.undisturbed():
        cost.export_original(model, tiny_inputs("llama") | without_cache(model), tmp_path, opset)
    assert {*missing_kernels(tmp_path)["operator"]} == operators


def test_a_spiking_network_at_opset_23_has_not_every_kernel(tmp_path: Path) -> None:
    config = fasfx.SpikeConfig(nonlinear="exact")
    with cases.undisturbed():
        fasfx.convert(tiny("bert"), [tiny_inputs("bert")], config).to_onnx(tmp_path, opset_version=23)
    found = missing_kernels(tmp_path)
    assert {*found["operator"]} == {"ReduceMax"}
    assert {*found["version"]} == {20} and {*found["reason"]} == {"no kernel for version 20"}


PLANTED = {  # body of a graph, inputs and outputs around it: operator, words of the reason; None: it has a kernel
    "operator": ("(uint8[N] x) => (uint8[N] y) { y = BitShift<direction='LEFT'>(x, x) }", "BitShift", "version 11"),
    "type": ("(int32[N] x) => (int32[N] y) { y = Clip(x) }", "Clip", "T=int32 (double, float"),
    "two types": (
        "(uint8[N,3] x, int8[3,2] w) => (int32[N,2] y) { y = MatMulInteger(x, w) }",
        "MatMulInteger",
        "no kernel for T1=uint8 (int8)",
    ),
    "open range": ("(float[N] x) => (float[N] y) { y = ReduceMax(x) }", "ReduceMax", "no kernel for version 20"),
    "type of an output": ("(float[N] x) => (float8e4m3fnuz[N] y) { y = Cast<to=18>(x) }", "Cast", "T2=float8e4m3fnuz"),
    "of a constant and an input": (
        "(float[1] s) => (float[1] y) <int32[1] n = {3}> { y = DequantizeLinear(n, s) }",
        "DequantizeLinear",
        "no kernel for T1=int32",
    ),
    "a default that may be replaced": (
        "(float[N] x, int32[1] n = {3}) => (float[N] y) <float[1] s = {2}> {"
        " d = DequantizeLinear(n, s) y = Add(x, d) }",
        "DequantizeLinear",
        "no kernel for T1=int32",
    ),
    "body of a Loop": (
        "(int64 n, bool go, uint8[N] x) => (uint8[N] y) { y = Loop(n, go, x) <body = tick (int64 i, bool c, uint8[N] a)"
        " => (bool d, uint8[N] b) { d = Identity(c) b = BitShift<direction='LEFT'>(a, x) }> }",
        "BitShift",
        "version 11",
    ),
    "other domain": ("(float[N] x) => (float[N] y) { y = com.microsoft.Gelu(x) }", "Gelu", "com.microsoft is not"),
    "type not known": (
        "(float[N] x) => (y) { z = com.microsoft.Gelu(x) y = Relu(z) }",
        "Relu",
        "the type of z, y is not known",
    ),
}


def graph(body: str, opset: int, folder: Path) -> Path:
    header = f"<ir_version: 9, opset_import: ['' : {opset}, 'com.microsoft' : 1]> planted "
    onnx.save(onnx.parser.parse_model((header + body).replace("'", '"')), folder / "model.onnx")
    return folder


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_node_is_found(case: str, tmp_path: Path) -> None:
    body, operator, words = PLANTED[case]
    found = missing_kernels(graph(body, 20, tmp_path)).set_index("operator")
    assert words in found.loc[operator, "reason"]
    assert len(found) == (2 if case == "type not known" else 1)


def test_what_has_a_kernel_is_not_found(tmp_path: Path) -> None:
    """Optional inputs left out, repeated ones, sequences, constants, a shape rule's fixed types."""
    body = """(float[N,3] x, int64[2] s) => (float[M,K] y) {
        one = Constant<value_float = 1.0>() zero = Constant<value_int = 0>()
        c = Clip(x, , one) both = Concat<axis = 0>(c, x, c)
        parts = SequenceConstruct(both, x) part = SequenceAt(parts, zero) y = Reshape(part, s)
    }"""
    assert missing_kernels(graph(body, 18, tmp_path)).empty


@pytest.mark.parametrize("folded", [False, True])
def test_what_is_made_of_constants_only_is_computed_when_the_file_is_loaded(folded: bool, tmp_path: Path) -> None:
    body = (
        "(float[N] x) => (float[N] y) <float[1] s = {2}, int32[1] n = {3}> { d = DequantizeLinear(n, s) y = Add(x, d) }"
    )
    assert missing_kernels(graph(body, 18, tmp_path)).empty
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(providers.FOLDED, str(int(folded)))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    left = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert left == (["Add"] if folded else ["DequantizeLinear", "Add"])


def test_on_cuda_constants_are_folded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without CUDA: what the session would be opened with."""
    opened: list[Any] = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [providers.CUDA, providers.CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _, options, providers: opened.append(options))
    providers.DEVICES["cuda"][1](tmp_path / "model.onnx", providers.session_options(None))
    assert opened[0].get_session_config_entry(providers.FOLDED) == "1"


def test_a_row_tells_node_types_and_version(tmp_path: Path) -> None:
    body = "(uint8[N,3] x, int8[3,2] w) => (int32[N,2] y) { [product] y = MatMulInteger(x, w) }"
    row = missing_kernels(graph(body, 18, tmp_path)).iloc[0]
    assert (row["node"], row["version"], row["types"]) == ("product", 10, "uint8 int8 int32")


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        missing_kernels(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        missing_kernels(tmp_path)
    with pytest.raises(ConfigError, match="'tpu': choose cuda"):
        missing_kernels(tmp_path, "tpu")


def test_the_table_is_read_from_the_cuda_section_of_standard_operators() -> None:
    row = "|{}|*in* X:**T**<br> *out* Y:**T**|{}|{}|"
    text = "\n".join(
        [
            "## Operators implemented by CPUExecutionProvider",
            "|**Operator Domain:** *ai.onnx*||||",
            row.format("Sin", "7+", "**T** = tensor(float)"),
            "## Operators implemented by CUDAExecutionProvider",
            "| Op Name | Parameters | OpSet Version | Types Supported |",
            "|**Operator Domain:** *ai.onnx*||||",
            row.format("Abs", "13+", "**T** = tensor(float), seq(tensor(int8))<br/> **T1** = tensor(int64)"),
            "|||[6, 12]|**T** = tensor(float)|",
            "|||5|**T** = tensor(float)|",
            "|**Operator Domain:** *com.microsoft*||||",
            row.format("Gelu", "1+", "**T** = tensor(float)"),
        ]
    )
    assert [*rows_of(text)] == [
        ("Abs", "13", "", "T", "float seq(int8)"),
        ("Abs", "13", "", "T1", "int64"),
        ("Abs", "6", "12", "T", "float"),
        ("Abs", "5", "5", "T", "float"),
    ]
