"""`fasfx passes ...`, and every command and file of the guides, with the example package installed by pip."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fasfx.cli import app
from fasfx.tools.bench.models import tiny

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "example_pass"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text("utf-8"), re.M | re.DOTALL)


def run(command: str) -> Result:
    """One line of a guide; FASFX_LOGS before it is for the process, which has its own test."""
    words = [word for word in shlex.split(command) if not word.startswith("FASFX_LOGS=")]
    assert words[:2] == ["fasfx", "passes"], command
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, words[1:])


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (a tiny BERT) and site/, into which pip installed the example package."""
    folder = tmp_path_factory.mktemp("guide")
    tiny("bert").save_pretrained(folder / "model")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(folder / "site")]
    copy = folder / "example_pass"  # the build leaves files beside the source
    copy.mkdir()
    for file in ("pyproject.toml", "late_scale.py"):
        (copy / file).write_text((EXAMPLE / file).read_text("utf-8"))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(copy)], check=True)
    return folder


@pytest.fixture
def guide(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example package can be imported, as it is in docs/; model/ is in the working directory."""
    (place / "site" / "late_scale.py").write_text((EXAMPLE / "late_scale.py").read_text("utf-8"))
    monkeypatch.syspath_prepend(str(place / "site"))
    monkeypatch.chdir(place)
    sys.modules.pop("late_scale", None)
    return place


def test_the_guide_shows_the_example_package() -> None:
    code = (EXAMPLE / "late_scale.py").read_text("utf-8")
    assert blocks("writing-a-pass.md", "python") == [code]
    assert len(code.splitlines()) < 40
    (entry,) = blocks("writing-a-pass.md", "toml")
    assert entry in (EXAMPLE / "pyproject.toml").read_text("utf-8")


def test_every_command_of_the_guide_runs(guide: Path) -> None:
    results = {command: run(command) for command in commands("writing-a-pass.md")}
    for command, result in results.items():
        assert result.exit_code == 0, (command, result.output)
    told = "\n".join(result.output for result in results.values())
    assert re.search(r"late-scale +│ NORMAL -> NORMAL +│ exact", told)
    assert "--- before late-scale\n+++ after late-scale" in told
    assert "tried by late-scale: scale_to_scores: applied" in told
    assert told.count("nothing found") == 2  # bisect and reduce
    assert re.search(r"LOWERED: \d+ nodes, relative L2 error 0\.\d+%", told)


def test_the_case_of_the_debugging_guide(guide: Path) -> None:
    """From bisect to fixed: the fault of the guide, its commands, the test that reduce writes, the fix."""
    (change,) = blocks("debugging.md", "diff")
    good, bad = (line[1:] for line in change.splitlines())
    file = guide / "site" / "late_scale.py"
    right = file.read_text()
    assert good in right
    file.write_text(right.replace(good, bad))
    first, *rest = commands("debugging.md")[:4]
    far = run(first)
    assert float(re.findall(r"error (\d+\.\d+)%", far.output)[0]) > 1
    bisect, shown, reduce = (run(command) for command in rest)
    expected, line = (block.strip() for block in blocks("debugging.md", "text"))
    assert (bisect.exit_code, shown.exit_code, reduce.exit_code) == (1, 0, 1)
    assert bisect.output.endswith(expected + "\n"), bisect.output
    assert "--- before late-scale" in shown.output
    assert line in (guide / "case" / "late_scale" / "graph.txt").read_text()
    assert commands("debugging.md")[4] == "pytest case"
    assert not passes(guide)
    file.write_text(right)
    assert passes(guide)
    sys.modules.pop("late_scale")
    importlib.invalidate_caches()
    assert run(rest[0]).output.endswith("nothing found\n")


def passes(guide: Path) -> bool:
    """Whether `pytest case` passes in a process of its own, with the package that the guide installed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(guide / "site"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "case"]
    result = subprocess.run(command, cwd=guide, env=env, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout  # 2 and more: it did not run
    return result.returncode == 0


def test_the_other_commands_of_the_debugging_guide(guide: Path) -> None:
    for command in commands("debugging.md")[5:]:
        result = run(command)
        assert result.exit_code == 0, (command, result.output)


def test_the_commands_of_the_answers(guide: Path) -> None:
    for command in commands("faq.md"):
        result = run(command)
        assert result.exit_code == 0, (command, result.output)


def test_logs_are_shown_as_asked(guide: Path) -> None:
    """In a process of its own: FASFX_LOGS is read once."""
    code = "from fasfx.cli import main; main()"
    words = ["passes", "run", "model", "-p", "normalise"]

    def logged(settings: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"FASFX_LOGS": settings}
        return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)

    some = logged("passes,+rules,levels").stderr
    assert re.search(r"^\[fasfx\.passes\] normalise -> NORMAL in \d+\.\d\d s, \d+ nodes$", some, re.M)
    assert re.search(r"^\[fasfx\.rules\] normalise: attention_to_products at scaled_dot_product_attention$", some, re.M)
    assert "modeling_bert.py" in some  # + shows the line
    assert "[fasfx.levels] after normalise: NORMAL, broken at 0 nodes" in some
    assert "_no_mutation" not in some and "[fasfx.declined]" not in some
    unknown = logged("glitter")
    assert unknown.returncode == 2
    assert unknown.stderr == (
        "error: FASFX_LOGS='glitter': there is no log 'glitter': choose among passes, rules, declined, levels and all; "
        "+name shows more, -name only errors\n"
    )
