"""What coverage claims is true of the graph: the synapses are all there, and their operands are spike counts."""

import pytest
import torch
from torch.fx import Interpreter

import fasfx
from fasfx.errors import CoverageError
from fasfx.program import constants
from fasfx.synapses import SYNAPSES
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

# linear or convolution layers, and products of two values, of each tiny model (2 layers each)
EXPECTED = {
    "bert": (2 * 6 + 1, 2 * 2),
    "gpt2": (2 * 4 + 1, 2 * 2),
    "llama": (2 * 7 + 1, 2 * 2),
    "opt": (2 * 6 + 1, 2 * 2),
    "vit": (2 * 6 + 2, 2 * 2),
    "t5": (2 * 6 + 2 * 10 + 1, 2 * 2 + 2 * 4),
}


class Operands(Interpreter):
    """Collects the operands that enter synaptic operations, weights left out."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.fixed, self.values = constants(gm), []

    def run_node(self, n: torch.fx.Node) -> object:
        if n.target in SYNAPSES:
            live = [a for a in n.args[:2] if isinstance(a, torch.fx.Node) and a not in self.fixed]
            self.values += [self.env[a] for a in live]
        return super().run_node(n)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("code", ["multi", "radix"])
def test_every_operand_is_a_spike_count(family: str, code: str) -> None:
    config = fasfx.SpikeConfig(code=code, timesteps=4, nonlinear="exact")
    snn = fasfx.convert(tiny(family), [tiny_inputs(family)], config)
    rows = snn.coverage.table
    synapses = rows[rows.kind == "synapse"]
    layers, products = EXPECTED[family]
    is_product = synapses.operator == "matmul"
    assert (int((~is_product).sum()), int(is_product.sum())) == (layers, products)
    assert snn.coverage.spike_driven_macs == 1
    operands = Operands(snn.graph_module)
    with torch.no_grad():
        operands.run(*tiny_inputs(family, batch_size=3, length=7, seed=1).values())
    top = fasfx.ops.CODES[code].capacity(4, config.levels)
    assert len(operands.values) == layers + 2 * products
    for value in operands.values:
        assert torch.equal(value, value.round()) and float(value.abs().max()) <= top


def test_skipped_modules_are_reported_and_strict_raises() -> None:
    model, batch = tiny("bert"), tiny_inputs("bert")
    snn = fasfx.convert(model, [batch], fasfx.SpikeConfig(skip=("intermediate",)))
    rows = snn.coverage.table
    left = rows[(rows.kind == "synapse") & ~rows.spike_driven]
    assert set(left.module) == {f"encoder.layer.{i}.intermediate.dense" for i in range(2)}
    assert set(left.reason) == {"its module is in config.skip"} and snn.coverage.spike_driven_macs < 1
    with pytest.raises(CoverageError, match="intermediate"):
        fasfx.convert(model, [batch], fasfx.SpikeConfig(skip=("intermediate",), strict=True))


def test_float_operators_are_named() -> None:
    snn = fasfx.convert(tiny("llama"), [tiny_inputs("llama")], fasfx.SpikeConfig(nonlinear="exact", strict=True))
    assert {"exp", "div", "rms_norm", "silu", "mul"} <= set(snn.coverage.float_operators)
