"""The exported network: any batch and length, and the same graph through Hugging Face's own exporter."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from transformers.exporters import ExportedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import fasfx
from fasfx.capture import dynamic_shapes
from fasfx.difference import Difference, main_output
from fasfx.errors import ConfigError
from fasfx.runtime.rules import for_runtime
from fasfx.tools.bench.models import tiny, tiny_inputs


def graph(folder: Path) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """Operators in order with their attributes; names of values left out."""
    program = for_runtime(onnx_ir.load(folder / "model.onnx"))  # changes nothing in what to_onnx wrote
    model = onnx_ir.to_proto(program)
    assert {"": 18}.items() <= {o.domain: o.version for o in model.opset_import}.items()
    return [(n.op_type, [(a.name, a.SerializeToString()) for a in n.attribute]) for n in model.graph.node]


def relative(reference: torch.Tensor, value: torch.Tensor) -> float:
    found = Difference()
    found.add(reference, value)
    return found.relative_l2


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_spike_quantizer_exports_the_same_graph(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family), tiny_inputs(family)
    extra = {} if family == "bert" else {"use_cache": False}
    calibration = [{**batch, **extra}]
    snn = fasfx.convert(model, calibration)
    snn.to_onnx(tmp_path / "ours")
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dynamic_shapes(batch),
        opset_version=18,
        optimize=False,
        quantizer=fasfx.SpikeQuantizer(fasfx.SpikeConfig(), calibration_dataset=calibration),
    )
    if family == "bert":  # its table of positions ends at a length that torch.export wants to know
        length = torch.export.Dim("length", max=model.config.max_position_embeddings)
        config.dynamic_shapes = {name: {0: dims[0], 1: length} for name, dims in config.dynamic_shapes.items()}
    OnnxExporter().export(model, {**batch, **extra}, config).save_pretrained(tmp_path / "theirs")
    assert graph(tmp_path / "ours") == graph(tmp_path / "theirs")
    ours, theirs = fasfx.runtime.OnnxModel(tmp_path / "ours"), ExportedModel.from_pretrained(tmp_path / "theirs")
    for size, length in ((1, 5), (3, 9)):
        inputs = tiny_inputs(family, batch_size=size, length=length, seed=length)
        with torch.no_grad():
            original = main_output(model(**inputs, **extra))
            in_torch = relative(original, main_output(snn(**inputs)))
        for run in (ours, theirs):
            assert relative(original, main_output(run(**inputs))) == pytest.approx(in_torch, rel=0.05)


def test_onnx_runtime_fuses_the_exported_gelu_and_clips_no_exponential(tmp_path: Path) -> None:
    model, batch = tiny("bert"), tiny_inputs("bert")
    fasfx.convert(model, [batch], fasfx.SpikeConfig(code="radix", timesteps=7, nonlinear="exact")).to_onnx(tmp_path)
    written = Counter(name for name, _ in graph(tmp_path))
    layers = model.config.num_hidden_layers
    assert written["Exp"] == written["Erf"] == layers
    # One Clip a neuron, but for those of exponentials: scores have one below their maximum, and so have maxima.
    assert written["Clip"] == written["Floor"] - layers + 2 * layers
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    assert fused["Erf"] == 0
    assert fused["Gelu"] + fused["BiasGelu"] == layers


def test_spike_quantizer_refuses_a_synchronous_network() -> None:
    with pytest.raises(ConfigError, match="SpikingModel.to_onnx"):
        fasfx.SpikeQuantizer(fasfx.SpikeConfig.low_latency())


def test_an_export_is_tidy(tmp_path: Path) -> None:
    """Constants are stored once each, equal nodes are one, and nothing stands for nothing."""
    model, batch = tiny("bert"), tiny_inputs("bert")
    fasfx.convert(model, [batch]).to_onnx(tmp_path)
    program = onnx_ir.load(tmp_path / "model.onnx")
    names = Counter(node.op_type for node in program.graph)
    assert names["Constant"] == names["Identity"] == names["CastLike"] == 0
    small = [v.const_value for v in program.graph.initializers.values() if v.const_value is not None]
    values = Counter((t.dtype, t.numpy().tobytes()) for t in small if t.size == 1 and t.numpy().ndim == 0)
    assert set(values.values()) == {1}
    equal = Counter(
        (node.op_type, tuple(v.name if v is not None else "" for v in node.inputs), str(dict(node.attributes)))
        for node in program.graph
    )
    assert set(equal.values()) == {1}


def test_a_gelu_with_a_factor_for_every_channel_is_exported(tmp_path: Path) -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.rand(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return y * (self.w * (1 + torch.erf(y / 2**0.5)))

    x = torch.randn(3, 8)
    snn = fasfx.convert(Gated().eval(), [{"x": x}], fasfx.SpikeConfig(nonlinear="exact"))
    snn.to_onnx(tmp_path)
    assert torch.allclose(fasfx.runtime.OnnxModel(tmp_path)(x=x), snn(x=x), atol=1e-5)


NEURON = [("Mul", ["e", "top"], "u"), ("Add", ["u", "half"], "v"), ("Floor", ["v"], "n")]
OTHERS = {"its logarithm": [("Log", ["e"], "l")], "a comparison": [("Greater", ["e", "zero"], "l")]}


def exponentials(kind: type[np.floating], read: list[tuple[str, list[str], str]]) -> tuple[bytes, bytes]:
    """A softmax's exponentials and what reads them, before and after what an export does."""
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    steps = [("ReduceMax", ["s", "axis"], "m"), ("Clip", ["m", "low"], "peak"), ("Sub", ["s", "peak"], "d")]
    steps += [("Exp", ["d"], "e"), *read]
    numbers = {"axis": np.array([-1]), "low": np.finfo(kind).min, "top": kind(127), "half": kind(0.5), "zero": kind(0)}
    results = [made for _, _, made in read if made in ("n", "l")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(name, given, [made]) for name, given, made in steps],
        "softmax",
        [onnx.helper.make_tensor_value_info("s", number, ["rows", 4])],
        [onnx.ValueInfoProto(name=name) for name in results],
        [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()],
    )
    given = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(given)
    return given.SerializeToString(), onnx_ir.to_proto(for_runtime(onnx_ir.from_proto(inferred))).SerializeToString()


def results(program: bytes, s: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(program).run(None, {"s": s})


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_exponentials_of_what_is_masked_are_normal_numbers(kind: type[np.floating]) -> None:
    """ONNX Runtime takes many times as long to make a subnormal number, or 0, of a masked score."""
    before, after = exponentials(kind, NEURON)
    s = np.array([[1, 3, -5, -np.inf], [0, -1, np.finfo(kind).min, -30000], [-np.inf] * 4], kind)
    assert np.array_equal(*(results(program, s)[0] for program in (before, after)))
    watched = onnx.load_from_string(after)
    (name,) = (node.output[0] for node in watched.graph.node if node.op_type == "Exp")
    watched.graph.output.append(onnx.ValueInfoProto(name=name))
    least, tiny = results(watched.SerializeToString(), s)[1].min(), np.finfo(kind).tiny
    assert least == 0 if kind is np.float16 else tiny <= least < 2 * tiny


@pytest.mark.parametrize("read", OTHERS)
def test_exponentials_that_more_than_a_neuron_reads_stay(read: str) -> None:
    before, after = exponentials(np.float32, [*NEURON, *OTHERS[read]])
    s = np.array([[1, 3, -5, -np.inf], [0, -1, -100, -200]], np.float32)
    for a, b in zip(results(before, s), results(after, s), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "config",
    [
        fasfx.SpikeConfig(nonlinear="exact"),
        fasfx.SpikeConfig(code="radix", timesteps=7, nonlinear="exact"),
        fasfx.SpikeConfig.integer(),
    ],
    ids=["multi", "radix", "integer"],
)
def test_every_exponential_of_a_closed_form_is_normal(config: fasfx.SpikeConfig, tmp_path: Path) -> None:
    fasfx.convert(tiny("bert"), [tiny_inputs("bert")], config).to_onnx(tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    assert [makers[node.input[0]] for node in nodes if node.op_type == "Exp"] == ["Clip"] * 2
