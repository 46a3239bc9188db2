"""The pages of a report: whole, quiet, readable, and with no need of a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from study import DOT, PROFILE, ROOT

from hematovision.config import build_profile
from hematovision.errors import HematoVisionError
from hematovision.files import write_json
from hematovision.report import page
from hematovision.report.records import executed_path
from hematovision.report.steps import STEPS, plan_jobs

PROFILE_VALUES = build_profile(PROFILE | {"name": "quick"})


def _metric(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": min(value + 0.04, 1.0)}


METRICS = {
    "profile": "quick",
    "dataset": "synthetic",
    "models": [
        {
            "backbone": backbone,
            "weights": weights,
            "split": split,
            "test_set": "TEST",
            "n_images": 2487,
            "n_photographs": 71,
            "metrics": {
                name: _metric(value)
                for name in ("accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro")
            },
            "per_class": {},
        }
        for backbone, weights in (("vgg16", "none"), ("mobilenetv2", "imagenet"))
        for split, value in (("official", 0.871), ("random", 0.964))
    ],
    "final": {"backbone": "mobilenetv2", "rule": "the best balanced accuracy on validation"},
    "published": [{"backbone": "vgg16", "accuracy": 90.3}],
    "figures": [{"file": "dot.png", "caption": "A dot of one pixel", "alt": "One dot"}],
}


def _manifest() -> dict[str, object]:
    return {
        "profile": PROFILE_VALUES.to_dict(),
        "overrides": {"head_epochs": "2"},
        "data": {"dataset": "synthetic", "key": "0123456789abcdef"},
        "code": {"version": "0.1.0", "commit": "a" * 40, "dirty": True, "library": "fedcba9876543210"},
        "python": "3.11.9",
        "packages": {"keras": "3.15.1"},
        "seed": 7,
        "hardware": {"cpu": "A processor", "cores": 2, "memory_mb": 8000, "system": "Linux x86_64"},
        "times": {
            "published": "2026-01-02T03:04:05+00:00",
            "steps": {"01_eda": {"seconds": 100.0, "peak_memory_mb": 800, "finished": ""}},
        },
    }


def _executed(name: str) -> nbformat.NotebookNode:
    long_line = "a_rather_long_name = another_rather_long_function(" + ", ".join("abcdefgh") * 4 + ")"
    table = "<table class='dataframe'><tr>" + "<td>12,345.678</td>" * 14 + "</tr></table>"
    cells = [
        new_markdown_cell(f"# {name}\n\nWhat is *asked*? See [the next](02_preprocessing.ipynb#cells)."),
        new_code_cell("seed = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("# Parameters\nseed = 7\n", metadata={"tags": ["injected-parameters"]}),
        new_code_cell(
            long_line,
            outputs=[
                new_output("stream", name="stderr", text="WARNING: a log line nobody wants"),
                new_output("stream", name="stdout", text=f"read {ROOT}/docs/x.png <b>"),
                new_output(
                    "display_data", data={"image/png": DOT, "text/plain": "<Figure>"}, metadata={"alt": "Dot"}
                ),
                new_output("execute_result", data={"text/html": table, "text/plain": "no"}),
            ],
        ),
        new_markdown_cell("> **Caution.** Mind this.\n\n## What we learned\n\n- one thing"),
    ]
    return new_notebook(cells=cells)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for job in plan_jobs(PROFILE_VALUES):
        path = executed_path(folder, job.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(_executed(job.name), path)
    write_json(folder / "metrics.json", METRICS)
    (folder / "figures").mkdir()
    (folder / "figures" / "dot.png").write_bytes(base64.b64decode(DOT))
    return folder


@pytest.fixture(scope="module")
def report(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "quick"
    page.build_report(folder, plan_jobs(PROFILE_VALUES), artifacts, _manifest())
    return folder


def _pages(report: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(report.glob("*.html"))}


def test_a_report_is_complete(report: Path, artifacts: Path) -> None:
    assert set(_pages(report)) == {
        "index.html",
        *(f"{job.name}.html" for job in plan_jobs(PROFILE_VALUES)),
    }
    assert (report / "metrics.json").read_bytes() == (artifacts / "metrics.json").read_bytes()
    assert json.loads((report / "manifest.json").read_text())["seed"] == 7
    assert (report / "figures" / "dot.png").is_file()


def test_nothing_is_loaded_from_outside(report: Path) -> None:
    for name, html in _pages(report).items():
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']([^\"']*)", html)
        loaded += re.findall(r"url\(([^)]*)\)|@import\s+([^;]+)", html)
        assert not [where for where in map(str, loaded) if "//" in where], name
        assert "require.js" not in html
        assert "MathJax" not in html


def test_the_index_tells_what_a_reader_needs(report: Path) -> None:
    html = _pages(report)["index.html"]
    for words in (
        "not for clinical use",
        "A tiny study",
        "demonstrate a leak",
        "drawn, not photographed",
        "VGG16 started from no learned weights",
        "87.1",
        "82.1 to 91.1",
        "2,487 images",
        "71 photographs",
        "the best balanced accuracy on validation",
        "90.3",
        'alt="One dot"',
        "A dot of one pixel",
        "0123456789abcdef",
        "commit aaaaaaaaaaaa with local changes",
        "head_epochs=2",
        "What is in the images, and can they be trusted?",
    ):
        assert words in html, words
    assert html.count('class="leaky"') == 2


def test_a_page_shows_the_notebook_without_its_noise(report: Path) -> None:
    html = _pages(report)["01_eda.html"]
    assert "a log line nobody wants" not in html
    assert str(ROOT) not in html
    assert "read ./docs/x.png &lt;b&gt;" in html
    assert "The values of this run" in html
    # the value of the run, not the default that it replaced
    text = re.sub(r"<[^>]+>", "", html)
    assert "seed = 7" in text
    assert "seed = 1" not in text
    assert "# Parameters" not in text
    assert 'alt="Dot"' in html
    assert '<details class="code" open' in html
    assert 'href="02_preprocessing.html#cells"' in html
    assert '<a href="02_preprocessing.html" class="next">' in html


def test_a_figure_that_is_not_there_is_named(artifacts: Path, tmp_path: Path) -> None:
    changed = tmp_path / "artifacts"
    shutil.copytree(artifacts, changed)
    write_json(changed / "metrics.json", METRICS | {"figures": [{"file": "gone.png", "caption": "x"}]})
    with pytest.raises(HematoVisionError, match=r"gone\.png"):
        page.build_report(tmp_path / "report", plan_jobs(PROFILE_VALUES), changed, _manifest())


def test_what_notebooks_and_profiles_say_is_escaped(artifacts: Path, tmp_path: Path) -> None:
    changed = tmp_path / "artifacts"
    shutil.copytree(artifacts, changed)
    hostile = "<script>alert(1)</script>"
    figure = {"file": "dot.png", "caption": hostile, "alt": f'"{hostile}'}
    write_json(
        changed / "metrics.json",
        METRICS | {"figures": [figure], "final": METRICS["final"] | {"rule": hostile}},
    )
    manifest = _manifest() | {"overrides": {"title": hostile}}
    manifest["profile"] = PROFILE_VALUES.to_dict() | {"title": hostile}
    page.build_report(tmp_path / "report", plan_jobs(PROFILE_VALUES), changed, manifest)
    index = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert hostile not in index
    assert index.count("&lt;script&gt;alert(1)") >= 4


def test_missing_metrics_are_named(artifacts: Path, tmp_path: Path) -> None:
    changed = tmp_path / "artifacts"
    shutil.copytree(artifacts, changed)
    (changed / "metrics.json").unlink()
    with pytest.raises(HematoVisionError, match=r"metrics\.json"):
        page.build_report(tmp_path / "report", plan_jobs(PROFILE_VALUES), changed, _manifest())


@pytest.mark.parametrize(
    ("value", "shown"), [(0.9031, "90.3"), (1.0, "100.0"), (90.3, "90.3"), ({"value": 0.5}, "50.0")]
)
def test_shares_are_shown_in_percent(value: object, shown: str) -> None:
    assert page._value(value)["value"] == shown


def test_the_readme_is_in_step_with_the_published_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.fill_readme(text, page.readme_sections()) == text, "run `make readme`"
    for step in STEPS:
        assert f"(notebooks/{step.notebook})" in text


def test_the_readme_takes_its_numbers_from_the_report(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "report_folder", lambda _name: report)
    sections = page.readme_sections()
    assert "| 87.1 % (82.1 to 91.1) |" in sections["results"]
    assert "random (shows the leak)" in sections["results"]
    assert "| 2 |" in sections["notebooks"].splitlines()[2]
    with pytest.raises(HematoVisionError, match="no markers for 'results'"):
        page.fill_readme("nothing here", sections)


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, or skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.html", "03_transfer_learning-mobilenetv2.html"])
def test_a_browser_without_a_network_shows_it_on_a_phone(report: Path, browser, name: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    tab = context.new_page()
    asked, troubles = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("requestfailed", lambda request: troubles.append(request.url))
    tab.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.goto((report / name).as_uri())
    assert not troubles
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    if name != "index.html":
        assert tab.locator("details.code[open]").count() == 2
        tab.get_by_role("button", name="Hide the code").click()
        assert tab.locator("details.code[open]").count() == 0
    context.close()
