"""nonlinear="spiking": nothing but spikes meets anything, in the final graph itself; and the network is still right."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import fasfx
from fasfx import ops
from fasfx.capture import capture
from fasfx.coverage import FREE
from fasfx.difference import Difference, main_output
from fasfx.errors import CoverageError
from fasfx.passes import Normalise
from fasfx.program import constants
from fasfx.runner import Runner
from fasfx.runtime import OnnxModel
from fasfx.synapses import SYNAPSES, carried_values
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

aten = torch.ops.aten
SPIKING = fasfx.SpikeConfig(nonlinear="spiking", strict=True)
FREE_OPERATORS = frozenset[Any]().union(*FREE.values())


class Products(Interpreter):
    """Every operand of every product on values, with the constant it is a multiple of."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.fixed, self.values_ = constants(gm), carried_values(gm)
        self.checked = 0
        self.unknown: list[Node] = []
        self.top = 0

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n in self.values_ and n not in self.fixed:
            operands = [a for a in n.args[:2] if isinstance(a, Node) and a not in self.fixed]
            if n.target in SYNAPSES or (n.target is aten.mul.Tensor and len(operands) == 2):
                for value in operands:
                    if value in self.values_:
                        self._check(self.env[value])
            elif n.target not in FREE_OPERATORS | ops.GROUPS | {aten.mul.Tensor, aten.div.Tensor, operator.getitem}:
                self.unknown.append(n)
            elif n.target is aten.div.Tensor and operands != [n.args[0]]:
                self.unknown.append(n)
        return super().run_node(n)

    def _check(self, value: Tensor) -> None:
        assert torch.equal(value, value.round()) and float(value.abs().max()) <= self.top
        self.checked += 1


def converted(family: str, **changes: Any) -> tuple[nn.Module, fasfx.SpikingModel]:
    model = tiny(family)
    return model, fasfx.convert(model, [tiny_inputs(family, seed=9)], SPIKING.replace(**changes))


def error(model: nn.Module, snn: Callable[..., Any], family: str) -> float:
    difference, batch = Difference(), tiny_inputs(family, seed=1)
    with torch.no_grad():
        difference.add(main_output(model(**batch)), main_output(snn(**batch)))
    return difference.relative_l2


@pytest.mark.parametrize("family", TINY)
def test_the_final_graph_multiplies_spike_counts_only(family: str) -> None:
    model, snn = converted(family)
    found = Products(snn.graph_module)
    found.top = ops.CODES["multi"].capacity(4, SPIKING.levels)
    with torch.no_grad():
        found.run(*tiny_inputs(family, batch_size=3, length=7, seed=1).values())
    assert found.checked > 20 and found.unknown == []
    assert snn.coverage.spike_driven_macs == snn.coverage.spike_driven_operators == 1
    assert snn.coverage.float_operators == []
    rules = snn.ledger.table.rule
    assert (rules.str.startswith("group_")).sum() == (snn.coverage.table.kind == "function").sum() > 0


@pytest.mark.parametrize("family", TINY)
def test_error_falls_with_every_step(family: str) -> None:
    model, snn = converted(family)
    found = []
    for steps in range(1, 7):
        snn.timesteps = steps
        found.append(error(model, snn, family))
    assert found == sorted(found, reverse=True) and found[-1] < 2e-3


@pytest.mark.parametrize(("family", "code"), [("bert", "multi"), ("llama", "multi"), ("bert", "rate")])
def test_synchronous_error_falls(family: str, code: str) -> None:
    steps = {"multi": 7, "rate": 128}[code]
    model, snn = converted(family, code=code, schedule="synchronous", timesteps=steps)
    errors = [
        error(model, lambda output=output, **_: output, family) for output in snn.ticks(**tiny_inputs(family, seed=1))
    ]
    assert errors[-1] < {"multi": 2e-3, "rate": 3e-2}[code] and errors[-1] < errors[len(errors) // 2] / 1.5
    assert torch.equal(main_output(snn(**tiny_inputs(family))), main_output(list(snn.ticks(**tiny_inputs(family)))[-1]))


def test_spikes_of_groups_are_counted() -> None:
    _, snn = converted("bert")
    found = snn.group_spikes(**tiny_inputs("bert"))
    functions = snn.coverage.table[snn.coverage.table.kind == "function"]
    assert set(found) == set(functions.node) and all(0 < spikes < 600 for spikes in found.values())
    snn.schedule = "synchronous"
    with pytest.raises(fasfx.errors.ConfigError, match="sequential"):
        snn.group_spikes(**tiny_inputs("bert"))


def test_radix_and_checkpoint(tmp_path: Path) -> None:
    model, snn = converted("llama", code="radix", timesteps=10)
    assert error(model, snn, "llama") < 0.1  # with exact functions .045
    snn.save_pretrained(tmp_path / "net")
    again = fasfx.SpikingModel.from_pretrained(tmp_path / "net")
    batch = tiny_inputs("llama", seed=2)
    assert torch.equal(main_output(snn(**batch)), main_output(again(**batch)))


class Functions(nn.Module):
    """Every kind of reduction and tail behind one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.layer(x)
        y = x.abs() + 0.01
        curves = [x.exp(), x.tanh(), torch.nn.functional.gelu(x), torch.nn.functional.elu(x), x.atan(), y.log()]
        return [*curves, y.sqrt(), y.rsqrt(), 1 / x, x.sin(), torch.nn.functional.silu(x), x**3]


def test_onnx_gives_the_same_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Functions(), torch.randn(64, 8)
    snn = fasfx.convert(model, [{"x": x}], SPIKING.replace(strict=False))
    assert snn.coverage.float_operators == ["elu"]
    snn.to_onnx(tmp_path)
    for here, there in zip(snn(x), OnnxModel(tmp_path)(x=x), strict=True):
        close = torch.isclose(here, there, rtol=1e-5, atol=1e-5)
        assert float(close.float().mean()) > 0.995  # the others lie on a rounding tie
        assert float((here - there).abs().max()) < 0.02 * float(here.abs().max())


def test_what_has_no_group_is_named_and_strict_raises() -> None:
    model, x = Functions(), torch.randn(64, 8)
    with pytest.raises(CoverageError, match="elu"):
        fasfx.convert(model, [{"x": x}], SPIKING)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.nn.functional.layer_norm(x, (4, 8), torch.ones(4, 8) * 2, torch.ones(4, 8)),
        lambda x: torch.nn.functional.rms_norm(x, (8,), torch.arange(8.0)),
        lambda x: torch.nn.functional.group_norm(x, 2, torch.arange(4.0), torch.ones(4)),
        lambda x: torch.nn.functional.batch_norm(x, torch.arange(4.0), torch.ones(4) * 2, torch.arange(4.0)),
        lambda x: torch.softmax(x, 1),
        lambda x: torch.log_softmax(x, -1),
        lambda x: x**5 + x.square(),
        lambda x: torch.nn.functional.glu(x),
        lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        lambda x: x / (x.abs().sum(-1, keepdim=True) + 1),
    ],
)
def test_compositions_are_exact(call: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 4, 8)
    normal = Runner([Normalise()]).run(capture(model, {"x": x}, SPIKING))
    assert torch.allclose(normal(x), model(x), rtol=1e-5, atol=1e-6)
    kept = {str(n.target).split(".")[-2] for n in normal.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert not kept & {
        "layer_norm",
        "rms_norm",
        "group_norm",
        "batch_norm",
        "softmax",
        "log_softmax",
        "pow",
        "glu",
        "div",
    }
