"""The benchmark of the WebGPU provider, without one: what the other process says is told and held."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from fasfx.errors import RuntimeUnavailableError
from fasfx.tools.bench import sites, webgpu


def answer(monkeypatch: pytest.MonkeyPatch, code: int, said: str, complained: str = "") -> None:
    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, code, said, complained)

    monkeypatch.setattr(webgpu.subprocess, "run", run)


@pytest.mark.parametrize(
    ("alone", "met"), [((0.0, 0.0, 0.0), True), ((2e-4, 0.0, 0.0), False), ((1e-5, 0.0, 1e-5), False)]
)
def test_equal_inputs_are_held_to_equal_counts(monkeypatch: pytest.MonkeyPatch, alone: Any, met: bool) -> None:
    found = {sites.ALONE: alone, sites.WITHIN: (0.0, 0.0, 0.0), sites.BETWEEN: (0.5, 0.5, 0.5)}
    answer(monkeypatch, 0, f"a warning\n{json.dumps(found)}")
    (table,) = webgpu.webgpu(quick=False)
    assert [line.met for line in table.lines] == [met, True, None] * len(webgpu.CODES)


def test_without_a_device_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 1, "", "Traceback\nRuntimeUnavailableError: finds no GPU")
    with pytest.raises(RuntimeUnavailableError, match="finds no GPU"):
        next(webgpu.webgpu(quick=False))
