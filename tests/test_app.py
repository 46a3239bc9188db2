"""The web demo: what it draws and says, what it offers to programs, and that it needs no network."""

from __future__ import annotations

import re
import sys
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


@pytest.mark.slow
def test_programs_get_the_rows_of_the_table(
    app: Any, classifier: Classifier, field: RGB, tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "field.png").write_bytes(encode_png(field))
    (tmp_path / "broken.png").write_bytes(encode_png(field)[:2000])
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        client = Client(address, verbose=False)
        rows, refused = (
            client.predict(handle_file(tmp_path / name), "find", api_name="/predict")
            for name in ("field.png", "broken.png")
        )
    finally:
        app.close()
    assert rows == [c.to_row(classifier.classes) for c in classifier.predict(field, name="image")]
    (row,) = refused
    assert row["decision"] == "reject"
    assert row["reason"]
