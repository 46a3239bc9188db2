"""The web demo: what it draws and says, what it offers to programs, and that it needs no network."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle

pytest.importorskip("gradio")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import app_gradio
from hematovision.classes import COLOURS
from hematovision.data.synthetic import draw_field
from hematovision.release.predict import CellPrediction, Classifier
from hematovision.vision.field import RGB
from hematovision.vision.image import encode_png


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return Classifier.load(tiny_bundle.write_bundle(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def app(classifier: Classifier) -> Any:
    return app_gradio.build_app(classifier)


@pytest.fixture(scope="module")
def field() -> RGB:
    return draw_field(3, ("eosinophil", "neutrophil", "monocyte")).rgb


def _cell(**changes: Any) -> CellPrediction:
    values: dict[str, Any] = {
        "image": "f",
        "cell": 1,
        "x": 40,
        "y": 60,
        "width": 50,
        "height": 40,
        "label": "monocyte",
        "confidence": 0.9,
        "decision": "accept",
        "reason": "",
        "probabilities": {"monocyte": 0.9, "lymphocyte": 0.1},
    }
    return CellPrediction(**(values | changes))


@pytest.mark.parametrize("side", [200, 4000])
def test_cells_are_outlined_in_the_colour_of_their_class(side: int) -> None:
    grow = side // 200
    cell = _cell(x=40 * grow, y=60 * grow, width=100 * grow, height=80 * grow)
    picture, scale = app_gradio.draw_outlines(np.full((side, side, 3), 200, np.uint8), [cell])
    assert scale == min(1.0, app_gradio.SHOWN_SIDE / side)
    assert picture.size == (round(side * scale),) * 2
    shown = np.asarray(picture)
    colour = [int(COLOURS["monocyte"][i : i + 2], 16) for i in (1, 3, 5)]
    middle = round((cell.y + cell.height / 2) * scale)  # type: ignore[operator]
    assert shown[middle, round(cell.x * scale)].tolist() == colour  # type: ignore[operator]
    assert (shown[middle, picture.width // 2] == 200).all(), "the cell itself stays as it is"


def test_a_picture_without_cells_is_left_as_it_is() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    rejected = [CellPrediction.rejected("f", "no white cell found")]
    picture, _ = app_gradio.draw_outlines(rgb, rejected)
    assert (np.asarray(picture) == rgb).all()
    assert app_gradio.make_table(rejected) == []
    assert app_gradio.summarise(rejected) == "**✕ rejected:** no white cell found."


def test_table_and_summary_say_the_decision_in_words() -> None:
    cells = [_cell(), _cell(cell=2, decision="review", reason="cut by the edge", confidence=0.51234)]
    assert app_gradio.make_table(cells) == [
        [1, "monocyte", "90.0 %", "✓ accept", ""],
        [2, "monocyte", "51.2 %", "? review", "cut by the edge"],
    ]
    assert app_gradio.summarise(cells) == "**2 cells**, 1 accepted, 1 for review."


def test_what_a_card_says_is_escaped() -> None:
    rgb = np.zeros((200, 200, 3), np.uint8)
    card = app_gradio.make_card(rgb, _cell(decision="review", reason="<script>alert(1)</script>"))
    assert "<script>" not in card
    assert "&lt;script&gt;" in card
    assert card.index("monocyte</span>") < card.index("lymphocyte</span>"), "the most probable comes first"


def test_the_page_says_which_model_answers_and_warns_of_drawn_cells(
    classifier: Classifier, tmp_path: Path
) -> None:
    said = app_gradio.describe(classifier)
    assert classifier.bundle.sha256[:16] in said
    assert "mobilenetv2" in said
    assert "drawn cells alone" in said
    real = Classifier.load(tiny_bundle.write_bundle(tmp_path / "b", provenance={"dataset": "blood-cells"}))
    assert "drawn cells alone" not in app_gradio.describe(real)


def test_examples_show_only_classes_that_the_model_knows(tmp_path: Path) -> None:
    paths = app_gradio.draw_examples(tiny_bundle.CLASSES, tmp_path)
    assert len(paths) >= 2
    assert not [p for p in paths if "basophil" in p]
    assert app_gradio.draw_examples(("basophil",), tmp_path) == []


def test_the_page_keeps_nothing_and_tells_nobody(app: Any) -> None:
    assert app.analytics_enabled is False
    assert app.delete_cache == (app_gradio.KEPT_SECONDS, app_gradio.KEPT_SECONDS)
    assert list(app.get_api_info()["named_endpoints"]) == ["/predict"]
    assert "not for clinical use" in str(app.get_config_file()["components"])


def test_the_page_works_without_a_network() -> None:
    assert app_gradio.THEME._stylesheets == []
    loaded = re.compile(r"@import|url\(\s*[\"']?(?:https?:)?//")  # other addresses name kinds of XML
    assert not loaded.search(app_gradio.THEME._get_theme_css() + app_gradio.CSS)


def test_without_a_model_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(tmp_path))
    assert app_gradio.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "run `make report` first" in said.err


def test_the_command_line_can_load_the_page(classifier: Classifier) -> None:
    # `hematovision demo` runs the file under a made-up name, which gradio does not take for every component
    loaded = runpy.run_path(app_gradio.__file__)
    assert list(loaded["build_app"](classifier).get_api_info()["named_endpoints"]) == ["/predict"]
    assert not Path(app_gradio.__file__).with_suffix(".pyi").exists(), "gradio wrote beside the source"


@pytest.fixture(scope="module")
def address(app: Any) -> Iterator[str]:
    """Serve the page, and return its address without a slash at the end."""
    _, url, _ = app.launch(
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        theme=app_gradio.THEME,
        css=app_gradio.CSS,
        _frontend=False,  # a busy machine may not answer gradio's own sign of life in three seconds
    )
    yield url.rstrip("/")
    app.close()


@pytest.mark.slow
def test_programs_get_the_rows_of_the_table(
    address: str, classifier: Classifier, field: RGB, tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "field.png").write_bytes(encode_png(field))
    (tmp_path / "broken.png").write_bytes(encode_png(field)[:2000])
    (tmp_path / "page.png").write_text("<html></html>")
    client = Client(address, verbose=False)
    rows, *refused = (
        client.predict(handle_file(tmp_path / name), "find", api_name="/predict")
        for name in ("field.png", "broken.png", "page.png")
    )
    assert rows == [c.to_row(classifier.classes) for c in classifier.predict(field, name="image")]
    for (row,) in refused:
        assert row["decision"] == "reject"
        assert row["reason"].startswith("image is ")
        assert str(tmp_path) not in row["reason"]


@pytest.mark.slow
def test_files_of_the_server_cannot_be_asked_for(address: str, field: RGB, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_png(field))
    data = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [data, "find"]}).encode()
    service = f"{address}/gradio_api/call/predict"
    asked = urllib.request.Request(service, body, {"content-type": "application/json"})
    event = json.load(urllib.request.urlopen(asked, timeout=60))["event_id"]
    answer = urllib.request.urlopen(f"{service}/{event}", timeout=60).read().decode()
    assert answer.startswith("event: error")
    assert "monocyte" not in answer


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_a_person_can_use_the_page(address: str, tmp_path: Path, width: int, theme: str) -> None:
    browser_path = shutil.which("chromium")
    if browser_path is None:
        pytest.skip("there is no chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "broken.png").write_text("not an image")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(f"{address}/?__theme={theme}")
        heading = page.locator(".card h3")
        heading.wait_for()  # the first example is named without being asked for
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is too wide"

        before = page.locator(".card").inner_text()
        page.locator(".gallery-item").last.click()
        page.wait_for_function(
            "text => document.querySelector('.card') && document.querySelector('.card').innerText !== text",
            arg=before,
        )
        rows = page.locator("#cells [role=gridcell]")
        rows.nth(app_gradio.HEADERS.index("class") + len(app_gradio.HEADERS)).click()
        playwright.expect(heading).to_contain_text("Cell 2")

        page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
        page.get_by_text("is not an image of a known format").wait_for()
        playwright.expect(heading).to_have_count(0)
        page.locator(".gallery-item").first.click()  # the next good image is named again
        heading.wait_for()
        browser.close()
    away = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert away == []
    assert errors == []
