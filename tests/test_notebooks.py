"""The notebooks: how they are written, and one headless run of them all."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from study import ROOT, seconds_of_children

from hematovision.config import load_profile
from hematovision.report.notebook import bind_parameters, read_parameters
from hematovision.report.steps import STEPS, plan_jobs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> nbformat.NotebookNode:
    read = nbformat.read(path, as_version=4)
    nbformat.validate(read)
    return read


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def test_every_notebook_is_a_step_and_every_step_a_notebook() -> None:
    assert {path.name for path in NOTEBOOKS} == {step.notebook for step in STEPS}


def test_parameters_default_to_the_quick_profile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(ROOT))
    defaults = read_parameters(path)
    assert defaults == bind_parameters(path, load_profile("quick"), defaults.get("backbone", ""))


def test_no_value_comes_by_another_way(notebook: nbformat.NotebookNode) -> None:
    # what is due is decided by the parameters: a notebook that read its profile itself would go unseen
    assert not [cell.source for cell in _code(notebook) if "load_profile" in cell.source]


def test_it_is_short_and_defines_nothing(notebook: nbformat.NotebookNode) -> None:
    code = _code(notebook)
    assert len(code) <= 20
    for cell in code:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    lines = [
        len([x for x in c.source.splitlines() if x.strip()]) for c in code if "parameters" not in _tags(c)
    ]
    assert statistics.median(lines) <= 5


def test_a_sentence_stands_before_every_cell(notebook: nbformat.NotebookNode) -> None:
    for before, cell in itertools.pairwise(notebook.cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source


def test_it_opens_with_a_question_and_closes_with_what_was_learned(notebook: nbformat.NotebookNode) -> None:
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.cells[0].cell_type == "markdown"
    assert text[0].startswith("# ")
    assert "**Question.**" in text[0]
    assert "?" in text[0]
    assert text[-1].startswith("## What we learned")


def test_only_checked_outputs_are_kept(notebook: nbformat.NotebookNode) -> None:
    checked = [cell for cell in _code(notebook) if CHECKED in _tags(cell)]
    assert checked
    for cell in _code(notebook):
        if cell in checked:
            assert "keep_output" in _tags(cell)
            assert cell.outputs
            assert cell.execution_count  # nbval takes a cell without one for never run
            assert not [o for o in cell.outputs if o.get("name") == "stderr"]
        else:
            assert not cell.outputs


def test_it_names_a_kernel_that_everyone_has(notebook: nbformat.NotebookNode) -> None:
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python"


# -- one run of all ------------------------------------------------------------------------------


def _environment(home: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HEMATOVISION_")}
    return clean | {
        "HEMATOVISION_HOME": str(home),
        "HEMATOVISION_CACHE": str(home / "cache"),
        "PYTHONPATH": str(home / "library"),
    }


def _report(home: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from hematovision.cli import main; sys.exit(main(['report']))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=_environment(home),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a run reads, with the quick profile run in it."""
    home = tmp_path_factory.mktemp("home")
    for name in ("profiles", "notebooks"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hematovision", home / "library" / "hematovision", ignore=ignored)
    done = _report(home)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    return home


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_quick_run_ends_in_a_report(home: Path) -> None:
    report = home / "reports" / "quick"
    pages = {p.name for p in report.glob("*.html")}
    assert pages == {"index.html", *(f"{job.name}.html" for job in plan_jobs(load_profile("quick")))}
    for page in report.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" not in html, page.name
        assert "output_stderr" not in html, page.name
        assert str(home) not in html, page.name
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']([^\"']*)", html)
        loaded += re.findall(r"url\(([^)]*)\)", html)
        assert not [where for where in loaded if where.strip("\"' ").startswith(("http", "//"))], page.name
    assert (home / "models" / "quick").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_second_run_does_nothing_in_seconds(home: Path) -> None:
    metrics = home / "reports" / "quick" / "metrics.json"
    before, stamp = metrics.read_bytes(), metrics.stat().st_mtime_ns
    began = seconds_of_children()
    again = _report(home)
    assert seconds_of_children() - began < 15  # the bar of the project
    assert again.returncode == 0
    assert "done in" not in again.stdout
    assert metrics.read_bytes() == before
    assert metrics.stat().st_mtime_ns == stamp


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_checked_outputs_hold(home: Path) -> None:
    # those that the quick profile leaves out need real images
    names = sorted({job.step.notebook for job in plan_jobs(load_profile("quick"))})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q"),
            *("--nbval-cell-timeout=900", "-p", "no:cacheprovider"),
            *(str(home / "notebooks" / name) for name in names),
        ],
        cwd=home,
        env=_environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    cells = sum(len(_code(nbformat.read(p, as_version=4))) for p in NOTEBOOKS if p.name in names)
    assert f"{cells} passed" in done.stdout
