"""What an audit must find, and must not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from public_set import load_recovered

from hematovision.config import cache_folder
from hematovision.data import audit as au
from hematovision.data import splits, synthetic
from hematovision.data.catalog import ImageSet, load_set
from hematovision.data.manifest import Manifest, check_manifest
from hematovision.errors import DataError
from hematovision.files import sha256_file
from hematovision.vision.field import RGB
from hematovision.vision.image import encode_jpeg


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    manifest, root = synthetic.read(tmp_path_factory.mktemp("drawn"), 12, 3, seed=21)
    return ImageSet("synthetic", manifest, root)


@pytest.fixture(scope="module")
def field() -> RGB:
    """Return a large field out of which overlapping photographs can be cut."""
    return synthetic.draw_field(5, ("neutrophil",), size=(700, 900)).rgb


def write_rows(
    folder: Path, pictures: dict[str, RGB], labels: dict[str, str] | None = None, split: str = ""
) -> Manifest:
    """Save pictures as JPEG and return their rows."""
    rows = []
    for name, rgb in pictures.items():
        (folder / f"{name}.jpg").write_bytes(encode_jpeg(rgb, 92))
        label = (labels or {}).get(name, "neutrophil")
        sha256 = sha256_file(folder / f"{name}.jpg")
        size = {"width": rgb.shape[1], "height": rgb.shape[0]}
        rows.append(
            {"path": f"{name}.jpg", "dataset": "made", "label": label, "source": name, "split": split}
        )
        rows[-1] |= {"sha256": sha256, "status": "ok", **size}
    return check_manifest(pd.DataFrame(rows))


def names_of(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(pairs["source_a"], pairs["source_b"], strict=True))


def test_drawn_photographs_are_no_near_duplicates(drawn: ImageSet) -> None:
    assert au.near_duplicates(drawn.manifest, drawn.root).empty


def test_overlapping_photographs_are_found_with_their_overlap(field: RGB, tmp_path: Path) -> None:
    pictures = {"a": field[:480, :640], "b": field[160:640, :640], "z": synthetic.draw_field(6).rgb}
    pairs = au.near_duplicates(write_rows(tmp_path, pictures), tmp_path)
    assert names_of(pairs) == [("a", "b")]
    assert pairs["overlap"].iloc[0] == pytest.approx(2 / 3, abs=0.02)  # 320 of 480 rows; a row is 0.002
    assert pairs["similarity"].iloc[0] > 0.95


def test_the_same_cell_is_told_from_the_next_field(tmp_path: Path) -> None:
    # seed 3 puts the cell at x = 684, so that all three windows fit
    wide = synthetic.draw_field(3, ("neutrophil",), size=(480, 1600))
    left = round(wide.boxes[0].centre[0]) - 200
    starts = {"a": left, "b": left + 30, "next": left + 400}  # the cell is in the first two
    pictures = {name: wide.rgb[:, start : start + 640] for name, start in starts.items()}
    pairs = au.near_duplicates(write_rows(tmp_path, pictures), tmp_path)
    same = dict(zip(names_of(pairs), pairs["same_cell"], strict=True))
    assert same == {("a", "b"): True, ("a", "next"): False, ("b", "next"): False}


def test_flipped_and_brightened_pictures_are_near_duplicates(field: RGB, tmp_path: Path) -> None:
    picture = np.ascontiguousarray(field[:480, :640])
    brighter = np.asarray(cv2.convertScaleAbs(picture, alpha=0.9, beta=10), np.uint8)
    pictures = {"a": picture, "b": np.ascontiguousarray(picture[:, ::-1]), "c": brighter}
    pairs = au.near_duplicates(write_rows(tmp_path, pictures), tmp_path)
    assert names_of(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (pairs["overlap"] > 0.97).all()


def test_large_sets_are_compared_by_thumbnails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(au, "KEYPOINT_LIMIT", 2)
    monkeypatch.setattr(au, "_BLOCK", 4)  # pairs must be found across blocks
    cells = {f"c{i:02d}": synthetic.draw_cell(i, "neutrophil") for i in range(10)}
    cells["d00"] = cv2.convertScaleAbs(cells["c00"], alpha=0.92, beta=5)
    cells["d09"] = cv2.resize(cells["c09"], (300, 300), interpolation=cv2.INTER_AREA)
    pairs = au.near_duplicates(write_rows(tmp_path, cells), tmp_path)
    assert names_of(pairs) == [("c00", "d00"), ("c09", "d09")]


def test_near_duplicates_are_kept_and_do_not_depend_on_workers(
    field: RGB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path, {"a": field[:480, :640], "b": field[100:580, 100:740]})
    first = au.near_duplicates(rows, tmp_path, tmp_path / "cache", workers=1)
    assert len(first) == 1
    pd.testing.assert_frame_equal(au.near_duplicates(rows, tmp_path, workers=3), first)
    monkeypatch.setattr(au, "view_picture", lambda *_: pytest.fail("nothing is left to look at"))
    pd.testing.assert_frame_equal(au.near_duplicates(rows, tmp_path, tmp_path / "cache"), first)
    file = next((tmp_path / "cache").rglob("*.csv"))
    file.write_text("nonsense\n")
    with pytest.raises(DataError, match="is damaged"):
        au.near_duplicates(rows, tmp_path, tmp_path / "cache")


def test_groups_follow_chains_of_links() -> None:
    rows = [(f"{s}{i}.jpg", s if s != "?" else "") for s in "abcde?" for i in range(2)]
    manifest = check_manifest(
        pd.DataFrame(rows, columns=["path", "source"])
        .assign(dataset="made", label="monocyte", split="train", width=1, height=1, status="ok")
        .assign(sha256=lambda m: "h" + m["path"])
    )
    manifest.loc[manifest["path"].isin(["d0.jpg", "e0.jpg"]), "sha256"] = "the same bytes"
    pairs = pd.DataFrame({"source_a": ["b", "a"], "source_b": ["c", "c"]})
    groups = au.linked_groups(manifest, pairs)
    assert groups.to_dict() == {
        **{f"{s}{i}.jpg": "a" for s in "abc" for i in range(2)},
        **{f"{s}{i}.jpg": "d" for s in "de" for i in range(2)},
        "?0.jpg": "?0.jpg",
        "?1.jpg": "?1.jpg",
    }
    assert au.linked_groups(manifest)["b0.jpg"] == "b"


def test_an_audit_counts_what_is_there(drawn: ImageSet) -> None:
    audit = au.audit_set(drawn)
    findings = audit.findings().set_index("finding")["count"]
    assert findings["images that decode"] == len(drawn.manifest)
    assert findings["photographs"] == 12
    assert findings["groups of photographs that share nothing"] == 12
    assert (
        findings.drop(["images that decode", "photographs", "groups of photographs that share nothing"]).sum()
        == 0
    )
    assert audit.counts["images"].sum() == len(drawn.manifest)
    assert audit.balance["photographs"].tolist() == [3, 3, 3, 3]
    assert audit.balance["share"].sum() == pytest.approx(1)
    train = audit.photographs[audit.photographs["split"] == "train"]
    assert (train[["copies_least", "copies_median", "copies_most"]] == 3).all(axis=None)


def test_an_audit_lists_what_is_wrong(drawn: ImageSet, field: RGB, tmp_path: Path) -> None:
    pictures = {"a": field[:480, :640], "b": field[10:490, :640], "other": synthetic.draw_field(9).rgb}
    rows = write_rows(tmp_path, pictures, {"b": "monocyte"}, split="photograph")
    for name, status in (("broken", "unreadable"), ("cut", "truncated")):
        lost = rows.iloc[:1].assign(
            path=f"{name}.jpg", status=status, sha256=name, width=0, height=0, source=""
        )
        rows = pd.concat([rows, lost])
    twice = rows.iloc[:1].assign(path="twice.jpg", label="lymphocyte", status="conflict")
    shutil.copy(tmp_path / "a.jpg", tmp_path / "twice.jpg")
    copies = [
        rows.iloc[[i]].assign(path=f"{side}/{i}.jpg", split=side, status=status, sha256=f"{side}{i}")
        for i, side, status in ((0, "train", "ok"), (1, "test", "unsure"))
    ]
    manifest = check_manifest(pd.concat([rows, twice, *copies]))
    audit = au.audit_set(dataclasses.replace(drawn, manifest=manifest, root=tmp_path))
    assert audit.undecodable["path"].tolist() == ["broken.jpg", "cut.jpg"]
    assert audit.duplicates["path"].tolist() == ["a.jpg", "twice.jpg"]
    assert names_of(audit.near_duplicates) == [("a", "b")]
    assert audit.conflicts[["path_a", "path_b"]].to_numpy().tolist() == [
        ["a.jpg", "twice.jpg"],
        ["a.jpg", "b.jpg"],
    ]
    assert audit.unsure["path"].tolist() == ["test/1.jpg"]
    assert audit.crossing[["train_source", "test_source"]].to_numpy().tolist() == [["a", "b"]]
    findings = audit.findings().set_index("finding")["count"]
    assert findings["files that cannot be read"] == findings["files that are cut short"] == 1
    assert findings["groups of photographs that share nothing"] == 1


def test_what_is_wrong_in_a_folder_is_found_from_the_files_alone(field: RGB, tmp_path: Path) -> None:
    picture = field[:480, :640]
    whole = encode_jpeg(picture, 92)
    files = {
        "monocyte/a.jpg": whole,
        "monocyte/again.jpg": whole,
        "monocyte/shifted.jpg": encode_jpeg(field[8:488, 6:646], 75),
        "monocyte/other.jpg": encode_jpeg(synthetic.draw_field(9).rgb, 92),
        "monocyte/cut.jpg": whole[: len(whole) // 2],
        "monocyte/text.jpg": b"not an image",
        "lymphocyte/a.jpg": whole,
    }
    for name, content in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    audit = au.audit_set(load_set("folder", tmp_path / "set", cache=tmp_path / "cache"))
    listed = audit.undecodable.set_index("path")["status"].to_dict()
    assert listed == {"monocyte/cut.jpg": "truncated", "monocyte/text.jpg": "unreadable"}
    identical = ["lymphocyte/a.jpg", "monocyte/a.jpg", "monocyte/again.jpg"]
    assert audit.duplicates["path"].tolist() == identical
    labels = audit.conflicts[["path_a", "path_b"]].to_numpy().tolist()
    assert ["lymphocyte/a.jpg", "monocyte/a.jpg"] in labels
    assert ["lymphocyte/a.jpg", "monocyte/again.jpg"] in labels
    assert ["monocyte/a.jpg", "monocyte/again.jpg"] not in labels
    assert len(set(audit.groups[[*identical, "monocyte/shifted.jpg"]])) == 1
    assert audit.groups["monocyte/other.jpg"] != audit.groups["monocyte/a.jpg"]


def test_a_random_split_is_answered_by_twins_and_a_grouped_one_is_not(drawn: ImageSet) -> None:
    manifest = drawn.manifest
    random = splits.random_split(manifest, 1)
    found = au.nearest_twins(drawn, random.train, random.test)
    assert list(found.columns) == list(au.TWIN_COLUMNS)
    assert found["test_path"].tolist() == sorted(random.test)
    assert found["same_photograph"].mean() >= 0.9  # a few test images have no copy left in training
    train, test = (tuple(manifest.loc[manifest["split"] == side, "path"]) for side in ("train", "test"))
    apart = au.nearest_twins(drawn, train, test)
    assert not apart["same_photograph"].any()
    assert apart["distance"].median() > 2 * found["distance"].median()


def test_twins_are_sampled_by_seed_and_kept(
    drawn: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = splits.random_split(drawn.manifest, 1)
    paths = (split.train, split.test)
    monkeypatch.setattr(au, "_CHUNK", 10)
    first = au.nearest_twins(drawn, *paths, sample=4, seed=1, cache=tmp_path)
    assert len(first) == 4
    monkeypatch.setattr(au, "colour_shares", lambda _: pytest.fail("all images are described already"))
    again = au.nearest_twins(
        drawn, *(side[::-1] for side in paths), sample=4, seed=1, cache=tmp_path, workers=1
    )
    pd.testing.assert_frame_equal(again, first)
    other = au.nearest_twins(drawn, *paths, sample=4, seed=2, cache=tmp_path)
    assert other["test_path"].tolist() != first["test_path"].tolist()
    with pytest.raises(DataError, match="both sides"):
        au.nearest_twins(drawn, split.train, [])


def test_colour_shares_are_blind_to_turning_flipping_and_brightness(field: RGB) -> None:
    picture = np.ascontiguousarray(field[:480, :640])
    shares = au.colour_shares(picture)
    assert np.linalg.norm(shares) == pytest.approx(1, abs=1e-5)

    def distance(other: RGB) -> float:
        return float(np.sqrt(max(0.0, 1 - float(shares @ au.colour_shares(np.ascontiguousarray(other))))))

    assert distance(picture[:, ::-1]) < 1e-3
    assert distance(np.rot90(picture)) < 1e-3
    brightened = distance(cv2.convertScaleAbs(picture, alpha=0.92))
    copied = distance(synthetic.copy_of(picture, 4))
    strange = distance(synthetic.draw_field(9, laboratory=3).rgb)
    assert max(brightened, copied) < strange / 2
    assert not au.colour_shares(np.zeros((40, 40, 3), np.uint8)).any()


@pytest.mark.data
def test_the_known_near_duplicates_of_the_public_set(real_data: Path) -> None:
    manifest = load_set("blood-cells", real_data, sources=False).manifest
    found = manifest[manifest["split"] == "photograph"]
    # taken one after the other, the second time in reverse order: pairs far apart in number
    numbers = [37, 38, 206, 278, 204, 277, 160, 161, *range(1, 36)]
    part = check_manifest(found[found["source"].isin([f"BloodImage_{n:05d}" for n in numbers])])
    pairs = {(a[-3:], b[-3:]) for a, b in names_of(au.near_duplicates(part, real_data))}
    assert pairs == {("037", "038"), ("206", "278"), ("204", "277"), ("160", "161"), ("019", "020")}


@pytest.mark.data
def test_the_audit_of_the_public_set(real_data: Path) -> None:
    image_set, whole = load_recovered(real_data)
    audit = au.audit_set(image_set, cache_folder())
    assert audit.undecodable.empty
    assert len(audit.unsure) <= 0.02 * audit.copies["copies"].sum()
    # two photographs stand in TEST_SIMPLE twice each, byte for byte
    assert audit.duplicates["split"].tolist() == ["test_simple"] * 4
    assert audit.duplicates.groupby("sha256").size().tolist() == [2, 2]
    assert not (audit.crossing["train_source"] == audit.crossing["test_source"]).any()
    if whole:
        table = audit.photographs.pivot_table(index="split", columns="label", values="photographs")
        assert table.loc["train"].tolist() == [75, 27, 16, 159]
        assert table.loc["test"].tolist() == [13, 6, 4, 48]
