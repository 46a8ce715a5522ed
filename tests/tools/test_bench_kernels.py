"""The benchmark of kernels: every form is exported and held to no node without one; the original is counted beside."""

import pytest

import fasfx
from fasfx.tools.bench import kernels


def test_every_form_is_held_to_no_node_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"functions exact": (fasfx.SpikeConfig(nonlinear="exact"), "closed")}
    monkeypatch.setattr(kernels, "FORMS", form)
    (table,) = kernels.PARTS["llama"](quick=True)
    found = {line.label: (line.figures, line.met) for line in table.lines}
    original = {"original, opset 18": ((0,), None), "original, opset 23": ((8,), None)}
    assert found == {"functions exact": ((0,), True), **original}
