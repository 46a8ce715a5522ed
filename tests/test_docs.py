"""The written documentation: links lead somewhere, the README starts as promised."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fasfx
from fasfx.levels import LEVELS
from fasfx.passes import PIPELINE
from fasfx.tools import docs
from fasfx.tools.bench.models import tiny, tiny_inputs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_pass_level_operator_and_public_name_has_its_place() -> None:
    pages = docs.pages()
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fasfx::")}
    assert {f"operators/{name.removeprefix('fasfx::')}.md" for name in operators} <= pages.keys()
    assert all(f"passes/{number}-{one.name}.md" in pages for number, one in enumerate(PIPELINE, 1))
    assert all(f"levels/{number}-{name.lower()}.md" in pages for number, name in enumerate(LEVELS))
    for module in (fasfx.runtime, fasfx.tools):
        assert all(f"## {name}\n" in pages[f"api/{module.__name__}.md"] for name in module.__all__)
    assert "Source: Bu et al., ICLR 2022" in pages["operators/qcfs.md"]
    assert "[qcfs](../operators/qcfs.md)" in pages["levels/3-clipped.md"]


def test_generated_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().out


def code(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.DOTALL)


def test_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(code("docs/tutorial.md")), names)
    tuning = names["tuned"].tuning
    assert names["snn"].coverage.spike_driven_macs == 1.0
    assert tuning["neuron"].mean() <= tuning["layer"].mean() <= tuning["before"].mean()
    assert names["tuned"].timesteps == 2
    assert (names["spiking"] == names["labels"]).float().mean() > 0.5  # of eight topics
    assert (names["spiking"] == names["deployed"]).all()


@pytest.mark.usefixtures("functions_of_its_own")
def test_answers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny("bert"), "batches": [tiny_inputs("bert", seed=seed) for seed in (1, 2)]}
    for block in code("docs/faq.md"):
        exec(block, names)
    assert names["snn"].coverage.spike_driven_macs == 1.0
    assert len(names["answers"]) == names["fast"].timesteps
    assert names["measured"].table["relative_l2"].is_monotonic_decreasing


def test_notebook_runs_and_shows_its_objects(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/tour.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "outputs are not committed"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {
        cell.source.splitlines()[-1]: output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    }
    expected = {
        "snn": "driven by spikes",
        "snn.coverage": "spike-driven",
        "measured": "relative_l2",
        "snn.ledger": "assume",
        "spent": "headline",
    }
    assert all(word in shown[name] for name, word in expected.items())
    assert (tmp_path / "report.html").stat().st_size > 500_000


def test_readme_starts_with_two_self_contained_lines() -> None:
    block = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    demo, tests = block[1].splitlines()
    setup = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt "
    assert demo.startswith(setup) and demo.endswith("fasfx demo")
    assert tests.startswith(setup) and tests.endswith("pytest")
