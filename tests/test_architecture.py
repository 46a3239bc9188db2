"""The direction of imports, and what must not be loaded."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from study import ROOT

PACKAGE = ROOT / "hematovision"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
HEAVY = ("tensorflow", "keras", "matplotlib", "papermill", "nbconvert", "gradio", "sklearn")


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(program), "--no-cache"], cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip


def test_the_rooms_import_in_one_direction() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("vision/field.py", "import hematovision.learn.backbones"),
        ("data/manifest.py", "import tensorflow"),
        ("report/run.py", "import matplotlib"),
    ],
)
def test_the_check_can_fail(tmp_path: Path, file: str, line: str) -> None:
    import shutil

    shutil.copytree(PACKAGE, tmp_path / "hematovision", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "hematovision" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert _lint(tmp_path).returncode == 1


def test_every_room_has_its_place() -> None:
    layers = {layer.strip("()").rpartition(".")[2] for layer in CONFIG["contracts"][0]["layers"]}
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    rooms = {r for r in rooms if (PACKAGE / r / "__init__.py").exists() or (PACKAGE / f"{r}.py").exists()}
    assert rooms - {"__init__"} <= layers


@pytest.mark.parametrize("module", ["hematovision", "hematovision.cli", "hematovision.report.run"])
def test_what_must_start_fast_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["predict", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys; from hematovision.cli import main\n"
        f"try: main({words!r})\n"
        f"finally: print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: hematovision")
    assert done.stderr.strip() == ""


def test_no_file_names_a_machine() -> None:
    """Paths of a machine, in the library or in what is committed beside it, would not be here elsewhere."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    pattern = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work)/\w")
    suffixes = (".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".html", ".cff")
    for name in listed:
        if name.endswith(suffixes) and (ROOT / name).is_file():
            found = pattern.search((ROOT / name).read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found[0] if found else ''}"
