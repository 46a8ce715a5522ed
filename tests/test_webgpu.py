"""Exports on ONNX Runtime's WebGPU provider; .ci/run brings a software Vulkan device for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pandas
import pytest
import torch
from strategies import exact_net, stages
from torch import Tensor
from torch.utils import _pytree

import fasfx
from fasfx.calibration import without_cache
from fasfx.difference import Difference, main_output
from fasfx.errors import RuntimeUnavailableError
from fasfx.passes import clip
from fasfx.runtime import OnnxModel
from fasfx.runtime.providers import CPU, WEBGPU
from fasfx.tools.bench import sites
from fasfx.tools.bench.models import tiny, tiny_inputs

SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # with it the tests fail without an adapter, they do not skip
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.skipif(
        SOFTWARE not in os.environ,
        reason=f"needs a Vulkan device that {SOFTWARE}=1 admits, and the package onnxruntime-ep-webgpu",
    ),
]
# Integer arithmetic of shapes and positions: what ONNX Runtime itself keeps on the CPU.
ON_CPU = {"Shape", "Slice", "Squeeze", "Unsqueeze", "Gather", "GatherND", "GatherElements", "Concat", "Range", "Cast"}


def run(*folders: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("on_webgpu.py")), *map(str, folders)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert not found.returncode, found.stderr[-2000:]


def relative(reference: Tensor, value: Tensor) -> float:
    found = Difference()
    found.add(reference, value)
    return found.relative_l2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"nonlinear": "spiking"}),
        ("llama", {"nonlinear": "exact"}),
        ("vit", {"nonlinear": "exact", "code": "radix"}),
        ("bert", {"code": "radix", "timesteps": 7, "nonlinear": "exact", "weights": "int8"}),
        ("gpt2", {"schedule": "synchronous", "nonlinear": "exact"}),
    ],
)
def test_matrix_products_softmax_and_neurons_run_on_the_provider(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, batch = tiny(family), tiny_inputs(family, 4, 24)
    form = "closed" if "weights" in changes else None
    fasfx.convert(model, [batch | without_cache(model)], fasfx.SpikeConfig(**changes)).to_onnx(tmp_path, form=form)
    torch.save(batch, tmp_path / "inputs.pt")
    run(tmp_path)
    found = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        original = main_output(model(**batch))
    on_cpu = relative(original, main_output(OnnxModel(tmp_path)(**batch)))
    assert relative(original, found[0]) == pytest.approx(on_cpu, rel=0.05)
    table = pandas.read_csv(tmp_path / "profile.csv")
    there = set(table.operator[table.provider == WEBGPU])
    assert {"MatMul", "Floor", "Clip", "Mul", "Add", "ReduceMax", "ReduceSum"} <= there
    assert set(table.operator[table.provider == CPU]) <= ON_CPU | (
        {"Loop", "Identity"} if "schedule" in changes else set()
    )


NETS = ("mlp", "two_readers", "views", "matmul", "conv2d_groups")


def exported(name: str, code: str, seed: int, folder: Path) -> list[Tensor]:
    """Export a network whose sums are exact; what it gives in torch."""
    made = exact_net(name, seed)
    made.module.float()
    made.batch = {n: value.float() for n, value in made.batch.items()}
    config = fasfx.SpikeConfig(code=code, timesteps=4, margin=1.0, granularity="tensor", nonlinear="exact")
    with mock.patch.object(clip, "CHANNEL_FLOOR", 0.0):
        snn = fasfx.SpikingModel(stages(made, config, exact=True)["RANGED"])
    snn.to_onnx(folder)
    torch.save(made.batch, folder / "inputs.pt")
    return _pytree.tree_leaves(snn(**made.batch))


def test_counts_are_the_same_integers_in_torch_and_on_both_providers(tmp_path: Path) -> None:
    cases = [(name, code, seed) for seed, name in enumerate(NETS) for code in ("multi", "radix", "rate")]
    folders = [tmp_path / "_".join(map(str, case)) for case in cases]
    expected = [exported(*case, folder) for case, folder in zip(cases, folders, strict=True)]
    run(*folders)
    for folder, wanted in zip(folders, expected, strict=True):
        inputs = torch.load(folder / "inputs.pt")
        for found in (torch.load(folder / "outputs.pt"), _pytree.tree_leaves(OnnxModel(folder)(**inputs))):
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), folder.name


def test_counts_of_a_tiny_model_agree_site_by_site(tmp_path: Path) -> None:
    batch = tiny_inputs("bert")
    snn = fasfx.convert(tiny("bert"), [batch], fasfx.SpikeConfig(nonlinear="exact"))
    snn.to_onnx(tmp_path)
    found = sites.tallies(snn, tmp_path, [batch], "webgpu")
    for what in (sites.ALONE, sites.WITHIN):
        assert all(tally.compared and not tally.differing for tally in found[what].values())


def test_without_an_adapter_nothing_runs_elsewhere(tmp_path: Path) -> None:
    exported("linear", "multi", 0, tmp_path)
    code = f"from fasfx.runtime import OnnxModel; OnnxModel({str(tmp_path)!r}, device='webgpu')"
    environment = os.environ | {"VK_DRIVER_FILES": str(tmp_path / "none.json")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert RuntimeUnavailableError.__name__ in found.stderr and "does not start" in found.stderr
