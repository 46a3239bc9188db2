"""Naming cells with a released model: right, reasoned, quiet, and without TensorFlow."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_bundle
from PIL import Image

from hematovision import cli
from hematovision.data.synthetic import draw_field
from hematovision.errors import ConfigError, HematoVisionError, ImageError
from hematovision.release.predict import (
    CellPrediction,
    Classifier,
    calibrate,
    predict_files,
    sharpness,
    write_table,
)
from hematovision.vision.crop import crop_cell
from hematovision.vision.field import RGB, Box
from hematovision.vision.image import encode_png
from hematovision.vision.locate import locate_cells

COLUMNS = "image,cell,x,y,width,height,label,confidence,decision,reason"
P_COLUMNS = ",p_eosinophil,p_lymphocyte,p_monocyte,p_neutrophil"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.load(folder)


@pytest.fixture(scope="module")
def field() -> RGB:
    rgb = draw_field(3, ("eosinophil", "neutrophil", "monocyte")).rgb
    assert len(locate_cells(rgb)) >= 2
    return rgb


def _with(tmp_path: Path, **changes: object) -> Classifier:
    return Classifier.load(tiny_bundle.write_bundle(tmp_path / "other", **changes))


# -- one picture ---------------------------------------------------------------------------------


def test_the_crop_that_training_saw_is_what_the_model_sees(classifier: Classifier, field: RGB) -> None:
    found = classifier.predict(field, name="f")
    boxes = locate_cells(field)
    assert [(c.x, c.y, c.width, c.height) for c in found] == [(b.x, b.y, b.width, b.height) for b in boxes]
    assert [c.cell for c in found] == list(range(1, len(boxes) + 1))
    for cell, box in zip(found, boxes, strict=True):
        said = tiny_bundle.expected(crop_cell(field, box, tiny_bundle.SIZE, 0.15))
        # float32 over a thousand pixels
        np.testing.assert_allclose(list(cell.probabilities.values()), said, atol=1e-4)
        assert list(cell.probabilities) == list(tiny_bundle.CLASSES)
        assert cell.label == tiny_bundle.CLASSES[int(said.argmax())]
        assert cell.confidence == max(cell.probabilities.values())
        assert cell.image == "f"


def test_crops_are_scaled_as_in_training(tmp_path: Path, field: RGB) -> None:
    larger = {"size": tiny_bundle.SIZE, "cell_size": 48, "crop_margin": 0.3}
    found = _with(tmp_path, input=larger).predict(field)
    crop = crop_cell(field, locate_cells(field)[0], 48, 0.3)
    small = cv2.resize(crop, (tiny_bundle.SIZE,) * 2, interpolation=cv2.INTER_AREA)
    said = tiny_bundle.expected(small)
    np.testing.assert_allclose(list(found[0].probabilities.values()), said, atol=1e-4)


def test_path_bytes_and_array_give_the_same(classifier: Classifier, field: RGB, tmp_path: Path) -> None:
    png = encode_png(field)
    file = tmp_path / "f.png"
    file.write_bytes(png)
    rows = [classifier.predict(image, name="f") for image in (field, png, file, str(file))]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert classifier.predict(file)[0].image == str(file)


def test_a_whole_picture_is_one_cell(classifier: Classifier) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    (cell,) = classifier.predict(rgb, "whole")
    assert (cell.cell, cell.x, cell.y, cell.width, cell.height) == (1, 0, 0, 64, 64)
    said = tiny_bundle.expected(cv2.resize(rgb, (32, 32), interpolation=cv2.INTER_AREA))
    np.testing.assert_allclose(list(cell.probabilities.values()), said, atol=1e-4)


def test_several_threads_take_turns(classifier: Classifier, field: RGB) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pictures = [field, np.ascontiguousarray(field[:, ::-1]), np.ascontiguousarray(field[::-1])]
    alone = [classifier.predict(p) for p in pictures]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(classifier.predict, pictures * 6))
    assert together == alone * 6


# -- decisions -----------------------------------------------------------------------------------


def test_sure_whole_and_sharp_cells_are_accepted(tmp_path: Path, field: RGB) -> None:
    sure = _with(tmp_path, thresholds={"confidence": 0.0, "sharpness": 0.0})
    for cell, box in zip(sure.predict(field), locate_cells(field), strict=True):
        assert (cell.decision, cell.reason) == (("review", "cut by the edge") if box.cut else ("accept", ""))


def test_cells_cut_by_the_edge_are_for_review(tmp_path: Path, field: RGB) -> None:
    sure = _with(tmp_path, thresholds={"confidence": 0.0, "sharpness": 0.0})
    box = next(b for b in locate_cells(field) if not b.cut)
    cut = field[:, box.x + box.width // 3 :]
    assert "cut by the edge" in {c.reason for c in sure.predict(cut)}


def test_blurred_cells_are_for_review(tmp_path: Path, field: RGB) -> None:
    blurred = cv2.GaussianBlur(field, (0, 0), 12)
    everything = Box(0, 0, field.shape[1], field.shape[0])
    between = (sharpness(field, everything) + sharpness(blurred, everything)) / 2
    strict = _with(tmp_path, thresholds={"confidence": 0.0, "sharpness": between})
    (sharp,), (soft,) = strict.predict(field, "whole"), strict.predict(blurred, "whole")
    assert (sharp.decision, sharp.reason) == ("accept", "")
    assert (soft.decision, soft.reason) == ("review", "too blurred")


def test_unsure_cells_are_for_review_and_the_rival_is_named(tmp_path: Path, field: RGB) -> None:
    unsure = _with(tmp_path, thresholds={"confidence": 1.0, "sharpness": 0.0})
    for cell in unsure.predict(field):
        second = sorted(cell.probabilities, key=lambda name: -cell.probabilities[name])[1]
        assert cell.decision == "review"
        assert cell.reason.endswith(f"the model is unsure: {second} is close")


def test_reasons_add_up(tmp_path: Path) -> None:
    strict = _with(tmp_path, thresholds={"confidence": 1.0, "sharpness": 1000})
    (cell,) = strict.predict(np.full((40, 40, 3), 90, np.uint8), "whole")
    assert cell.reason.startswith("too blurred; the model is unsure: ")


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_picture_without_cells_is_rejected(classifier: Classifier, value: int) -> None:
    (row,) = classifier.predict(np.full((200, 300, 3), value, np.uint8), name="empty")
    assert (row.image, row.cell, row.decision, row.reason) == ("empty", 0, "reject", "no white cell found")
    assert not row.unreadable
    assert row.to_row(classifier.classes)["p_monocyte"] is None


def test_sharpness_falls_with_blur_and_not_with_stain_or_size(field: RGB) -> None:
    box = locate_cells(field)[0]
    values = [sharpness(cv2.GaussianBlur(field, (0, 0), s) if s else field, box) for s in (0, 2, 6)]
    assert values[0] > 1.5 * values[1] > 1.5**2 * values[2]
    # a drawn cell is so smooth that rounding to whole grey levels counts; this texture is coarser
    grey = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (96, 96)), (0, 0), 1.5)
    strong = cv2.cvtColor(
        cv2.normalize(grey, None, 0, 254, cv2.NORM_MINMAX).astype(np.uint8), cv2.COLOR_GRAY2RGB
    )
    whole = Box(0, 0, 96, 96)
    # rounding adds a twelfth of a squared level to each pixel, against a variance of hundreds
    assert sharpness(255 - (255 - strong) // 2, whole) == pytest.approx(sharpness(strong, whole), rel=0.02)
    larger = cv2.resize(strong, (192, 192), interpolation=cv2.INTER_NEAREST)
    assert sharpness(larger, Box(0, 0, 192, 192)) == pytest.approx(sharpness(strong, whole), rel=1e-3)
    assert sharpness(np.full((50, 50, 3), 7, np.uint8), Box(0, 0, 50, 50)) == 0


def test_temperature_makes_less_sure_and_changes_no_label() -> None:
    said = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(calibrate(said, 1.0), said, atol=1e-11)
    warm = calibrate(said, 2.0)
    np.testing.assert_allclose(warm.sum(axis=1), 1)
    np.testing.assert_allclose(warm[0], np.sqrt(said[0]) / np.sqrt(said[0]).sum())
    assert np.isfinite(warm).all()
    assert (warm.argmax(axis=1) == 0).all()


def test_calibration_is_applied(tmp_path: Path, field: RGB, classifier: Classifier) -> None:
    warm = _with(tmp_path, temperature=3.0).predict(field)
    cold = classifier.predict(field)
    expected = calibrate(np.array(list(cold[0].probabilities.values())), 3.0)
    np.testing.assert_allclose(list(warm[0].probabilities.values()), expected)


# -- hostile input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((4, 900, 3), np.uint8),
    ],
    ids=["grey", "alpha", "float", "nothing", "sliver"],
)
def test_arrays_that_are_no_pictures_are_refused(classifier: Classifier, array: RGB) -> None:
    with pytest.raises(ImageError, match=r"array|pixels"):
        classifier.predict(array)


@pytest.mark.parametrize("cells", ["find", "whole"])
@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 4000, 3), (4000, 16, 3), (301, 299, 3)])
def test_odd_shapes_of_noise_are_answered(
    classifier: Classifier, shape: tuple[int, int, int], cells: str
) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    for cell in classifier.predict(rgb, cells):  # type: ignore[arg-type]
        assert cell.decision in ("accept", "review", "reject")
        assert not cell.probabilities or sum(cell.probabilities.values()) == pytest.approx(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, field: RGB) -> Path:
    """Return a folder with two good fields among hostile files."""
    root = tmp_path_factory.mktemp("hostile") / "images"
    (root / "deep").mkdir(parents=True)
    (root / "a.png").write_bytes(encode_png(field))
    (root / "deep" / 'b, "c".png').write_bytes(encode_png(field))
    (root / "cut.png").write_bytes(encode_png(field)[:2000])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not an image")
    (root / "page.png").write_text("<html><script>alert(1)</script></html>")
    (root / "dangling.png").symlink_to(root / "nowhere")
    (root / "notes.txt").write_text("left out: not called an image")
    Image.new("1", (30_000, 30_000)).save(root / "bomb.png", compress_level=1)
    return root


HOSTILE = {"cut.png", "empty.jpg", "text.jpg", "page.png", "bomb.png"}


def test_hostile_files_are_told_and_the_others_done(classifier: Classifier, images: Path) -> None:
    rows = list(predict_files(classifier, [images, images / "missing.png"]))
    refused = {Path(r.image).name for r in rows if r.unreadable}
    assert refused == HOSTILE | {"missing.png"}
    for row in rows:
        if row.unreadable:
            assert row.decision == "reject"
            assert row.reason
            assert "\n" not in row.reason
    good = [r for r in rows if not r.unreadable]
    assert {Path(r.image).name for r in good} == {"a.png", 'b, "c".png'}
    assert len(good) >= 4


def test_a_folder_without_images_is_a_row(classifier: Classifier, tmp_path: Path) -> None:
    (row,) = predict_files(classifier, [tmp_path])
    assert row.unreadable
    assert "holds no images" in row.reason


def test_files_are_read_one_at_a_time(
    classifier: Classifier, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    known = Classifier.predict

    def watched(self: Classifier, image: Path, *rest: object, **named: object) -> list[CellPrediction]:
        asked.append(image)
        return known(self, image, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Classifier, "predict", watched)
    rows = predict_files(classifier, [images / "a.png", images / "text.jpg"])
    next(rows)
    assert asked == [images / "a.png"]


# -- the table -----------------------------------------------------------------------------------


def test_csv_and_jsonl_hold_the_same(classifier: Classifier, images: Path, tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl"):
        write_table(predict_files(classifier, [images]), classifier.classes, tmp_path / name)
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines()[0] == COLUMNS + P_COLUMNS
    table = list(csv.DictReader(text.splitlines()))
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(table) == len(lines) >= 9
    for row, line in zip(table, lines, strict=True):
        assert list(row) == list(line)
        for key, value in line.items():
            if value is None:
                assert row[key] == ""
            elif isinstance(value, float):
                assert float(row[key]) == pytest.approx(value, abs=1e-9)
            else:
                assert row[key] == str(value)


def test_a_table_appears_whole_or_not_at_all(classifier: Classifier, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("the last good table")

    def broken() -> object:
        yield from predict_files(classifier, [images / "a.png"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(broken(), classifier.classes, file)  # type: ignore[arg-type]
    assert file.read_text() == "the last good table"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["t.txt", "t", "t.json"])
def test_other_endings_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    def never() -> object:
        pytest.fail("something was predicted")
        yield

    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        write_table(never(), ("a",), tmp_path / name)  # type: ignore[arg-type]
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        write_table(never(), ("a",), tmp_path / "folder.csv")  # type: ignore[arg-type]


def test_a_table_that_cannot_be_written_says_so(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HematoVisionError, match="cannot use"):
        write_table(iter(()), classifier.classes, tmp_path / "file" / "t.csv")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_are_no_text_do_not_end_a_table(
    classifier: Classifier, field: RGB, tmp_path: Path
) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    for name, content in ((b"\xff.png", encode_png(field)), (b"\xfe.png", b"junk"), (b"n\nl.png", b"junk")):
        with open(os.path.join(os.fsencode(root), name), "wb") as handle:
            handle.write(content)
    for name in ("t.csv", "t.jsonl"):
        write_table(predict_files(classifier, [root]), classifier.classes, tmp_path / name)
        assert "�.png" in (tmp_path / name).read_text(encoding="utf-8")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert {len(row) for row in rows} == {14}


# -- the command line ----------------------------------------------------------------------------


def test_the_command_writes_csv_and_tells_unreadable_files_by_its_status(
    folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(images / "a.png"), "--model", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(COLUMNS)
    assert "not for clinical use" in said.err
    assert "mobilenetv2, profile tiny" in said.err
    assert cli.main(["predict", str(images), "--model", str(folder)]) == 1
    said = capsys.readouterr()
    assert "5 unreadable" in said.err
    assert "a.png,1," in said.out


def test_the_command_without_a_model_says_what_to_do(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(tmp_path))
    assert cli.main(["predict", str(images)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "run `make report` first, or name one with --model DIR" in said.err


def test_neither_tensorflow_nor_learn_is_imported_and_nothing_is_printed(folder: Path, images: Path) -> None:
    code = (
        "import sys; import hematovision; "
        "assert not [m for m in sys.modules if m.startswith('hematovision.')], 'eager import'; "
        "from hematovision import Classifier; import hematovision.release.bundle; "
        f"found = Classifier.load({str(folder)!r}).predict({str(images / 'a.png')!r}); "
        "assert found[0].label; "
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras') "
        "or m.startswith('hematovision.learn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_the_package_exports_the_classifier_and_its_version() -> None:
    import hematovision

    assert hematovision.Classifier is Classifier
    assert hematovision.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = hematovision.nothing_such
