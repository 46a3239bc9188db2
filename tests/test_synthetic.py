"""Drawn smears: same bytes, true boxes, the morphology of the textbooks, and writing that survives."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from hematovision.classes import EIGHT, FOUR
from hematovision.data import synthetic
from hematovision.data.smear import optics
from hematovision.data.smear.cells import RADII, Drawing, draw_white
from hematovision.data.smear.stains import AZURE, BLUE, EOSIN, HAEMOGLOBIN, STAINS, laboratory
from hematovision.errors import DataError, HematoVisionError
from hematovision.vision.field import Field


def hashes(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a drawn set."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def drawings(label: str, count: int = 24) -> list[Drawing]:
    return [draw_white(np.random.default_rng([i, 5]), label, RADII[label]) for i in range(count)]


def nucleus_share(drawing: Drawing) -> float:
    return float(drawing.nucleus.sum() / drawing.cell.sum())


@pytest.fixture(scope="module")
def fields() -> list[Field]:
    """One field of each class, each from another laboratory."""
    return [synthetic.draw_field(i, (label,), laboratory=i) for i, label in enumerate(EIGHT)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small data set, drawn by one process."""
    folder = tmp_path_factory.mktemp("drawn") / "set"
    synthetic.write_dataset(folder, 13, 2, 7, FOUR, workers=1)
    return folder


def test_same_seed_gives_same_pixels_and_others_differ() -> None:
    a = synthetic.draw_field(3, ("monocyte",), 5)
    b = synthetic.draw_field(3, ("monocyte",), 5)
    assert np.array_equal(a.rgb, b.rgb)
    assert a.boxes == b.boxes
    assert not np.array_equal(a.rgb, synthetic.draw_field(4, ("monocyte",), 5).rgb)
    assert not np.array_equal(a.rgb, synthetic.draw_field(3, ("monocyte",), 6).rgb)


def test_field_is_rgb_of_the_asked_size(fields: list[Field]) -> None:
    assert all(f.rgb.shape == (480, 640, 3) and f.rgb.dtype == np.uint8 for f in fields)
    assert synthetic.draw_field(1, (), 0, (100, 120)).rgb.shape == (100, 120, 3)
    assert synthetic.draw_cell(1, "basophil").shape == (360, 360, 3)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_bound_the_masks_exactly(seed: int) -> None:
    labels = ("neutrophil", "lymphocyte", "eosinophil")[: 1 + seed % 3]
    field = synthetic.draw_field(seed, labels, seed)
    instance = field.masks["instance"]
    for number, (label, box) in enumerate(zip(labels, field.boxes, strict=False), start=1):
        rows, columns = np.nonzero(instance == number)
        assert box.label == label
        assert (box.x, box.y) == (columns.min(), rows.min())
        assert (box.width, box.height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        at_edge = box.x == 0 or box.y == 0 or box.x + box.width == 640 or box.y + box.height == 480
        assert box.cut == at_edge
    assert np.array_equal(field.masks["cell"], instance > 0)
    assert {b.label for b in field.boxes[len(labels) :]} <= {"RBC", "platelet"}
    assert all(0 <= b.x < b.x + b.width <= 640 and 0 <= b.y < b.y + b.height <= 480 for b in field.boxes)


def test_nucleus_lies_inside_the_cell(fields: list[Field]) -> None:
    for field, label in zip(fields, EIGHT, strict=True):
        assert not (field.masks["nucleus"] & ~field.masks["cell"]).any()
        assert field.masks["nucleus"].any() == (label != "platelet")


def test_some_cells_are_cut_and_some_touch() -> None:
    singles = [synthetic.draw_field(i, ("neutrophil",), 0, (300, 400)).boxes[0].cut for i in range(24)]
    assert 0 < sum(singles) < 24
    touching = 0
    for i in range(10):
        instance = synthetic.draw_field(i, ("lymphocyte", "lymphocyte"), 0).masks["instance"]
        grown = cv2.dilate((instance == 1).astype(np.uint8), np.ones((9, 9), np.uint8))
        touching += bool((grown[instance == 2]).any())
    assert 0 < touching < 10


def test_lymphocytes_have_the_largest_share_of_nucleus() -> None:
    share = {label: np.mean([nucleus_share(d) for d in drawings(label)]) for label in FOUR}
    assert share["lymphocyte"] == max(share.values())
    assert share["lymphocyte"] > 0.65


def test_lymphocytes_are_small_and_monocytes_large() -> None:
    area = {label: np.mean([d.cell.sum() for d in drawings(label)]) for label in FOUR}
    assert min(area, key=lambda c: area[c]) == "lymphocyte"
    assert max(area, key=lambda c: area[c]) == "monocyte"


def lobes(drawing: Drawing, radius: float) -> int:
    """Count the parts into which a nucleus falls when its bridges are worn away."""
    depth = cv2.distanceTransform(drawing.nucleus.astype(np.uint8), cv2.DIST_L2, 5)
    best = 0
    for worn in (0.08, 0.12, 0.16, 0.2):
        count, _, stats, _ = cv2.connectedComponentsWithStats((depth > worn * radius).astype(np.uint8))
        best = max(best, int((stats[1:count, cv2.CC_STAT_AREA] > 30).sum()))
    return best


def test_lobes_tell_neutrophils_from_eosinophils_from_lymphocytes() -> None:
    mean = {label: np.mean([lobes(d, RADII[label]) for d in drawings(label)]) for label in FOUR}
    assert mean["neutrophil"] > mean["eosinophil"] > mean["lymphocyte"]
    assert mean["lymphocyte"] == 1
    assert mean["neutrophil"] > 1.8  # three or four lobes, some of which lie on each other


def test_cytoplasm_of_eosinophils_is_the_reddest() -> None:
    """Red against blue light that passes the cytoplasm, in ten laboratories."""
    redness = {}
    for label in FOUR:
        ratios = []
        for i in range(10):
            field = synthetic.draw_field(i, (label,), i)
            plasma = field.masks["cell"] & ~field.masks["nucleus"]
            inner = cv2.erode(plasma.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
            plasma = inner if inner.sum() > 50 else plasma
            glass = laboratory(i).background
            r, g, b = (field.rgb[plasma].mean(axis=0) / glass).tolist()
            ratios.append(r - (g + b) / 2)
        redness[label] = np.mean(ratios)
    assert max(redness, key=lambda c: redness[c]) == "eosinophil"
    assert min(redness, key=lambda c: redness[c]) == "lymphocyte"  # a clear blue rim


def test_only_eosinophils_are_full_of_eosin_and_basophils_of_azure() -> None:
    def plasma(label: str, stain: int) -> float:
        parts = [d.plasma[stain][d.cell & ~d.nucleus].mean() for d in drawings(label, 12)]
        return float(np.mean(parts))

    assert plasma("eosinophil", EOSIN) > 2 * max(plasma(c, EOSIN) for c in EIGHT if c != "eosinophil")
    assert plasma("lymphocyte", BLUE) > plasma("monocyte", BLUE) > plasma("neutrophil", BLUE)
    granules = [d.nuclear[AZURE][d.cell & ~d.nucleus].mean() for d in drawings("basophil", 12)]
    assert np.mean(granules) > 0.1


def test_light_obeys_beer_and_lambert() -> None:
    lab = laboratory(1)
    one = np.zeros((STAINS, 2, 2), np.float32)
    one[HAEMOGLOBIN] = lab.red
    single, double = optics.transmit(one, lab), optics.transmit(2 * one, lab)
    # float32 exponentials agree to about seven digits
    assert np.allclose(double, single**2, rtol=1e-5)
    assert (double < single).all()
    assert np.array_equal(optics.transmit(0 * one, lab), np.ones((2, 2, 3), np.float32))


def test_overlapping_red_cells_are_darker_in_the_picture() -> None:
    darker, seen = 0, 0
    for i in range(12):
        field = synthetic.draw_field(i, (), laboratory=2)
        cover = np.zeros((480, 640), int)
        for box in field.boxes:
            if box.label == "RBC":
                cover[box.y : box.y + box.height, box.x : box.x + box.width] += 1
        green = field.rgb[..., 1].astype(float)
        if (cover >= 3).sum() > 500 and (cover == 1).sum() > 500:
            seen += 1
            darker += green[cover >= 3].mean() < green[cover == 1].mean() < green[cover == 0].mean()
    assert seen >= 6
    # boxes hold corners of bare glass, so a rare field may go the other way
    assert darker >= seen - 1


def test_laboratories_differ_more_than_the_fields_of_one() -> None:
    def colour(seed: int, lab: int) -> np.ndarray:
        rgb = synthetic.draw_field(seed, (), lab, (160, 200)).rgb
        return np.percentile(rgb.reshape(-1, 3), 90, axis=0)

    within = np.std([[colour(s, lab) for s in range(5)] for lab in range(6)], axis=1).mean()
    between = np.std([np.mean([colour(s, lab) for s in range(5)], axis=0) for lab in range(6)], axis=0).mean()
    assert between > 1.5 * within


def test_unknown_label_is_one_line() -> None:
    with pytest.raises(DataError, match="'blast' is not a class"):
        synthetic.draw_field(0, ("blast",))


def test_copies_are_turned_pictures_on_black() -> None:
    photograph = np.full((480, 640, 3), 200, np.uint8)
    black, turns = [], set()
    for seed in range(30):
        copy = synthetic.copy_of(photograph, seed)
        assert copy.shape == (240, 320, 3)
        # nothing is interpolated: a pixel is the picture's or black
        assert set(np.unique(copy)) <= {0, 200}
        black.append((copy == 0).all(axis=-1).mean())
        turns.add(copy.tobytes())
    assert len(turns) == 30
    assert 0.03 < np.mean(black) < 0.3  # the copies of the public training side: an eighth on average
    assert np.array_equal(synthetic.copy_of(photograph, 3), synthetic.copy_of(photograph, 3))


def test_dataset_mirrors_the_public_layout(drawn: Path) -> None:
    manifest = synthetic.write_dataset(drawn, 13, 2, 7)
    assert (manifest["split"] == "photograph").sum() == 13
    assert set(manifest["split"]) == {"photograph", "train", "test", "test_simple"}
    for row in manifest.itertuples():
        picture = cv2.imread(str(drawn / row.path))
        assert picture.shape == (row.height, row.width, 3)
        assert hashlib.sha256((drawn / row.path).read_bytes()).hexdigest() == row.sha256
        folder = {"photograph": "photographs"}.get(row.split, f"{row.split.upper()}/{row.label.upper()}")
        assert row.path.rsplit("/", 1)[0] == folder
        assert row.split == "photograph" or row.source not in row.path
    boxes = synthetic.read_json(drawn / "boxes.json")
    assert set(boxes) == set(manifest["path"])
    for row in manifest[manifest["split"] == "photograph"].itertuples():
        assert boxes[row.path][0]["label"] == row.label
    assert not list(drawn.rglob("records"))


def test_sides_share_no_photograph_and_classes_are_balanced(drawn: Path) -> None:
    manifest = synthetic.write_dataset(drawn, 13, 2, 7)
    sources = manifest.groupby("split")["source"].agg(set)
    assert not sources["train"] & sources["test"]
    assert sources["test"] == sources["test_simple"]
    assert sources["train"] | sources["test"] == sources["photograph"]
    photographs = manifest[manifest["split"] == "photograph"].groupby("label").size()
    assert photographs.max() - photographs.min() <= 1
    tested = manifest[manifest["split"] == "test_simple"].groupby("label").size()
    assert (tested >= 2).all()
    assert (manifest[manifest["split"].isin(["train", "test"])].groupby("source").size() == 2).all()


def test_every_class_sees_several_laboratories() -> None:
    jobs = synthetic._plan(48, 1, 0, FOUR)
    for label in FOUR:
        assert len({j.laboratory for j in jobs if j.label == label}) >= 4


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 3 photographs a class"):
        synthetic.write_dataset(tmp_path / "x", 8, 1, 0)
    assert not (tmp_path / "x").exists()


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HematoVisionError, match="another path"):
        synthetic.write_dataset(tmp_path / "file" / "set", 12, 1, 0, workers=1)


def test_second_call_draws_nothing(drawn: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in drawn.rglob("*")}
    calls: list[tuple[int, int]] = []
    synthetic.write_dataset(drawn, 13, 2, 7, progress=lambda done, total: calls.append((done, total)))
    assert calls == []
    assert before == {p: p.stat().st_mtime_ns for p in drawn.rglob("*")}


def test_read_keys_the_folder_by_the_arguments(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first, folder = synthetic.read(
        tmp_path, 6, 0, 1, ("neutrophil", "lymphocyte"), lambda d, t: calls.append((d, t))
    )
    again, same = synthetic.read(tmp_path, 6, 0, 1, ("neutrophil", "lymphocyte"))
    _, other = synthetic.read(tmp_path, 6, 0, 2, ("neutrophil", "lymphocyte"))
    assert folder == same != other
    assert folder.parent == tmp_path / "synthetic"
    assert first.equals(again)
    assert calls[-1] == (6, 6)


def test_bytes_do_not_depend_on_the_number_of_processes(drawn: Path, tmp_path: Path) -> None:
    synthetic.write_dataset(tmp_path / "set", 13, 2, 7, FOUR, workers=2)
    assert hashes(tmp_path / "set") == hashes(drawn)


def test_killed_write_goes_on_to_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    script = tmp_path / "draw.py"
    script.write_text(
        "from pathlib import Path\n"
        "from hematovision.data.synthetic import write_dataset\n"
        "if __name__ == '__main__':\n"
        f"    write_dataset(Path({str(folder)!r}), 13, 2, 7, workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 120
    while not list(folder.glob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(folder.glob("records/*.json"))) > 0
    assert not (folder / "manifest.csv").exists(), "it ended before it could be killed"
    synthetic.write_dataset(folder, 13, 2, 7, workers=1)
    assert hashes(folder) == hashes(drawn)
    # the lock beside the folder is all that may be left
    assert {p.name for p in tmp_path.iterdir()} <= {"set", "draw.py", ".set.lock"}
