"""The wheel holds what the folders hold, and each module has one name only."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("passes", "runtime", "tools")
IMPORT_ALL = (
    "import fasfx, fasfx.data, fasfx.ops, fasfx.passes, fasfx.runtime, fasfx.tools, fasfx.tools.bench;"
    "import fasfx.tools.report;"
    "print(fasfx.__file__, *fasfx.passes.__path__, sep='\\n')"
)


def run_python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def source_files() -> dict[str, bytes]:
    """The package's files, named as in the wheel: passes/ is fasfx/passes/ there."""
    files = {}
    for top in ("fasfx", *MAPPED):
        for folder, _, names in os.walk(ROOT / top):  # does not follow fasfx's three symlinks
            inside = Path(folder).relative_to(ROOT).as_posix()
            for name in names:
                if name.endswith((".csv", ".py", ".txt", "py.typed", "page.html", "page.css", "page.js")):
                    key = f"{inside}/{name}" if top == "fasfx" else f"fasfx/{inside}/{name}"
                    files[key] = (Path(folder) / name).read_bytes()
    return files


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked wheel, built from a copy so that no stale build folder gets into it."""
    work = tmp_path_factory.mktemp("wheel")
    copy = work / "source"
    for name in ("fasfx", *MAPPED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(work)]
    build = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = work.glob("fasfx-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "unpacked")
    return work / "unpacked"


def test_wheel_holds_exactly_the_folders(wheel_folder: Path) -> None:
    in_wheel = {
        path.relative_to(wheel_folder).as_posix(): path.read_bytes()
        for path in (wheel_folder / "fasfx").rglob("*")
        if path.is_file()
    }
    expected = source_files()
    assert sorted(in_wheel) == sorted(expected)
    assert [name for name in expected if in_wheel[name] != expected[name]] == []


def test_wheel_imports(wheel_folder: Path, tmp_path: Path) -> None:
    result = run_python(IMPORT_ALL, cwd=tmp_path, path=wheel_folder)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(wheel_folder)) for line in result.stdout.splitlines())


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_installed_package_imports(place: str, tmp_path: Path) -> None:
    result = run_python(IMPORT_ALL, cwd=ROOT if place == "root" else tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_bare_import_is_refused(name: str) -> None:
    result = run_python(f"import {name}", cwd=ROOT)
    assert result.returncode != 0
    assert f"ImportError: import fasfx.{name}, not {name}" in result.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_symlink_is_relative(name: str) -> None:
    assert os.readlink(ROOT / "fasfx" / name) == f"../{name}"
