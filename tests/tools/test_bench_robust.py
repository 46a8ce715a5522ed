"""The benchmark of the deployed network under use: its large file, made small."""

from __future__ import annotations

import pytest

from fasfx.tools.bench import robust


def test_a_file_that_is_not_large_misses_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "WIDE", 64)
    (table,) = robust.large(quick=False)
    size, apart = table.lines
    assert not size.met and size.figures[0] == 2 * 64 * 64 * 4 / 1e9
    assert apart.met
