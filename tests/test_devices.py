"""Networks on a GPU: moved there, or made there. Without one, shapes and devices are checked by fake tensors."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.utils import _pytree

import fasfx
from fasfx.calibration import without_cache
from fasfx.devices import moved, retarget
from fasfx.difference import main_output
from fasfx.program import facts
from fasfx.tools.bench.models import TINY, tiny, tiny_inputs

FAMILIES = [name for name in TINY if name != "t5"]
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "synchronous": {"schedule": "synchronous"},
    "rate": {"code": "rate", "timesteps": 8, "schedule": "synchronous"},
    "rows": {"code": "radix", "granularity": "token"},
}
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def converted(
    family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, fasfx.SpikingModel, dict[str, torch.Tensor]]:
    """In float64 no count flips because sums are taken in another order."""
    model = tiny(family).to(dtype)
    batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tiny_inputs(family).items()}
    return model, fasfx.convert(model, [batch | without_cache(model)], fasfx.SpikeConfig(**changes)), batch


class OnGpu(Interpreter):
    """Runs a program whose weights are fake tensors of a CUDA device. Fake tensors of two devices do not mix."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return torch.empty(value.shape, dtype=value.dtype, device="cuda:0")


@pytest.mark.parametrize(
    ("family", "setting"),
    [("bert", "rows"), ("gpt2", "synchronous"), ("opt", "rate")],
)
def test_every_value_follows_the_weights_to_another_device(family: str, setting: str) -> None:
    _, snn, batch = converted(family, **SETTINGS[setting])
    given = [*batch.values()]
    if snn.schedule == "synchronous":
        given += [torch.tensor(1), *snn.state(**batch).sent.values()]
    retarget(snn.graph_module, torch.device("cuda", 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(value.shape, dtype=value.dtype, device="cuda:0") for value in given]
        output = OnGpu(snn.graph_module).run(*inputs)
    devices = {value.device.type for value in _pytree.tree_leaves(output) if isinstance(value, torch.Tensor)}
    assert devices == {"cuda"}


def test_a_device_that_the_model_names_follows_too() -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.to("cpu"), torch.ones(4, 4, device="cpu"))

    snn = fasfx.convert(Named(), [{"x": torch.rand(2, 4)}]).to("meta")
    retarget(snn.graph_module, torch.device("meta"))  # a network without weights has no device to follow
    assert snn.graph_module(torch.rand(3, 4, device="meta")).device.type == "meta"


def test_moving_a_network_takes_its_sites_along() -> None:
    _, snn, _ = converted("llama")
    snn.to("meta")
    for program in (snn.ranged, snn.graph_module):
        assert {str(node.kwargs["device"]) for node in program.graph.nodes if "device" in node.kwargs} == {"meta"}
    assert {site.peak.device.type for site in facts(snn.ranged).sites.values() if site.peak is not None} == {"meta"}


def test_moving_a_network_leaves_the_callers_model_alone() -> None:
    model, snn, _ = converted("bert")
    before = {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    snn.to("meta")
    assert {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before


def test_what_both_programs_share_is_moved_once() -> None:
    _, snn, batch = converted("opt")
    shared = {p.data_ptr() for p in snn.ranged.parameters()} & {p.data_ptr() for p in snn.graph_module.parameters()}
    expected = snn(**batch).logits
    snn._apply(lambda value: value.clone())
    moved_ = {p.data_ptr() for p in snn.ranged.parameters()} & {p.data_ptr() for p in snn.graph_module.parameters()}
    assert shared and len(moved_) == len(shared) and not moved_ & shared
    assert torch.equal(snn(**batch).logits, expected)


def test_moving_a_network_in_training_takes_its_teacher_along() -> None:
    model, batch = tiny("bert"), tiny_inputs("bert")
    qann = fasfx.prepare(model, [batch], fasfx.SpikeConfig(), fasfx.Objective(teacher=model)).to("meta")
    assert {t.device.type for t in (*qann._teacher.parameters(), *qann.ranged().parameters())} == {"meta"}
    assert qann(**{name: value.to("meta") for name, value in batch.items()})[0].device.type == "meta"
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# --- on a real one -----------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_gives_on_a_gpu_what_it_gives_on_the_cpu(family: str, setting: str) -> None:
    _, snn, batch = converted(family, torch.float64, **SETTINGS[setting])
    expected, sent = main_output(snn(**batch)), snn.count_spikes(**batch)
    snn.cuda()
    there = moved(batch, torch.device("cuda"))
    assert torch.allclose(main_output(snn(**there)).cpu(), expected, rtol=1e-6, atol=1e-8)
    assert numpy.allclose(snn.count_spikes(**there), sent)
    snn.timesteps = snn.timesteps - 1
    fewer = main_output(snn(**there))
    assert fewer.is_cuda and not torch.allclose(fewer.cpu(), expected)


@gpu
@needs_gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_gpu_is_converted_there(family: str, setting: str) -> None:
    model, snn, batch = converted(family, torch.float64, **SETTINGS[setting])
    there = moved(batch, torch.device("cuda"))
    found = fasfx.convert(model.cuda(), [there | without_cache(model)], fasfx.SpikeConfig(**SETTINGS[setting]))
    expected = main_output(snn(**batch))
    assert torch.allclose(main_output(found(**there)).cpu(), expected, rtol=1e-6, atol=1e-8)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    model, batch = tiny(family).to("cuda", dtype), moved(tiny_inputs(family), torch.device("cuda"))
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    snn = fasfx.convert(model, [batch | without_cache(model)], fasfx.SpikeConfig(timesteps=6, nonlinear="exact"))
    with torch.no_grad():
        expected, found = (main_output(net(**batch)).float() for net in (model, snn))
    assert float((found - expected).norm() / expected.norm()) < 0.1


@gpu
@needs_gpu
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_int8_weights_on_a_gpu(family: str) -> None:
    model, batch = tiny(family), tiny_inputs(family)
    snn = fasfx.convert(model, [batch | without_cache(model)], fasfx.SpikeConfig.integer())
    expected = main_output(snn(**batch))
    found = main_output(snn.cuda()(**moved(batch, torch.device("cuda")))).cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@gpu
@needs_gpu
def test_both_stages_on_a_gpu() -> None:
    device = torch.device("cuda")
    model, batch = tiny("bert").to(device), moved(tiny_inputs("bert", 4, 9), device)
    config = fasfx.SpikeConfig(timesteps=2, schedule="synchronous", nonlinear="exact")
    qann = fasfx.prepare(model, [batch], config, fasfx.Objective(teacher=model)).train()
    adam = torch.optim.Adam(qann.parameter_groups(1e-3, 1e-2))
    losses = []
    for _ in range(20):
        loss = qann(**batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    snn = fasfx.tune(fasfx.convert(qann.eval()), [batch, batch, batch], epochs=1)
    assert next(snn.parameters()).is_cuda and snn.tuning is not None
    assert float(snn.tuning["neuron"].mean()) <= float(snn.tuning["before"].mean())


@gpu
@needs_gpu
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_spiking_graph_compiles_on_a_gpu(family: str) -> None:
    _, snn, batch = converted(family, torch.float64)
    snn.cuda()
    there = moved(batch, torch.device("cuda"))
    expected = main_output(snn(**there))
    compiled = torch.compile(snn.graph_module, fullgraph=True)
    assert torch.allclose(main_output(compiled(**there)), expected, rtol=1e-6, atol=1e-8)


@gpu
@needs_gpu
def test_check_on_a_gpu() -> None:
    model, batch = tiny("bert").cuda(), moved(tiny_inputs("bert"), torch.device("cuda"))
    snn = fasfx.convert(model, [batch])
    found = fasfx.check(model, snn, [batch], timesteps=(1, 4))
    assert found.table.relative_l2.is_monotonic_decreasing and found.predicted > 0
