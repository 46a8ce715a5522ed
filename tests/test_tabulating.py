"""Exponentials and the neurons that send them become one table of bytes in an export: the same bytes."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

import fasfx
from fasfx import ops
from fasfx.calibration import without_cache
from fasfx.program import attribute, copy_program
from fasfx.runtime import OnnxModel
from fasfx.runtime.tabulating import tabulate
from fasfx.tools.bench.models import tiny, tiny_inputs

SPIKING = fasfx.SpikeConfig.integer(nonlinear="spiking")


def converted(family: str) -> fasfx.SpikingModel:
    model = tiny(family)
    return fasfx.convert(model, [tiny_inputs(family) | without_cache(model)], SPIKING)


def nodes(gm: GraphModule, target: object) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_program_with_tables_of_bytes_gives_the_same_bits(family: str) -> None:
    """Masks of padding and of what is to come among the scores."""
    snn = converted(family)
    program = tabulate(copy_program(snn.graph_module))
    assert len(nodes(program, ops.byte_lookup.op)) == 2
    assert not [node for node in nodes(program, ops.lookup.op) if node.args[3] == "exp"]
    inputs = tiny_inputs(family)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1:, -3:] = 0
    given = [inputs[name] for name in snn.input_names]
    pairs = zip(tree_leaves(program(*given)), tree_leaves(snn.graph_module(*given)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_any_score_has_the_byte_of_group_and_neuron() -> None:
    """Within the table, at both its ends, and as far as floats go."""
    snn = converted("bert")
    before, after = snn.graph_module, tabulate(copy_program(snn.graph_module))
    x = torch.cat(
        [torch.linspace(-30, 5, 100_001), torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, torch.inf, -torch.inf])]
    )
    groups = [node for node in nodes(before, ops.lookup.op) if node.args[3] == "exp"]
    for group, found in zip(groups, nodes(after, ops.byte_lookup.op), strict=True):
        table, spikes = (attribute(before, str(group.args[at].target)) for at in (1, 2))
        value, (reader,) = ops.lookup.op(x, table, spikes, *group.args[3:]), group.users
        if reader.target is torch.ops.aten.add.Tensor:
            value, (reader,) = value + attribute(before, str(reader.args[1].target)).flatten(), reader.users
        expected = ops.byte_count.op(value, *reader.args[1:])
        given = ops.byte_lookup.op(x, attribute(after, str(found.args[1].target)), *found.args[2:])
        assert int(expected.max()) == 127 and int(expected.min()) == 0
        assert torch.equal(given, expected)


@pytest.mark.parametrize("read", [False, True])
def test_what_others_read_stays(read: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.layer(x).chunk(3, -1)
            return torch.softmax(q @ k.transpose(1, 2), -1) @ v

    torch.manual_seed(0)
    snn = fasfx.convert(Attention().eval(), [{"x": torch.randn(4, 5, 8)}], SPIKING)
    program = copy_program(snn.graph_module)
    (group,) = (node for node in nodes(program, ops.lookup.op) if node.args[3] == "exp")
    if read:
        with program.graph.inserting_after(group):
            program.graph.call_function(torch.ops.aten.neg.default, (group,))
    assert len(nodes(tabulate(program), ops.byte_lookup.op)) == (0 if read else 1)


def test_the_file_looks_bytes_up(tmp_path: Path) -> None:
    snn = converted("bert")
    snn.to_onnx(tmp_path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    looked_up = [kinds[node.output[0]] for node in graph.node if node.op_type == "GatherElements"]
    assert looked_up.count(onnx.TensorProto.UINT8) == 2
    inputs = tiny_inputs("bert")
    here, there = snn(**inputs).last_hidden_state, OnnxModel(tmp_path, threads=1)(**inputs).last_hidden_state
    assert float((here - there).norm() / here.norm()) < 0.01  # ties of float sums apart
