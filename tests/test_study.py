"""What notebooks hand to each other comes back from disk as it was, each part alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from hematovision.data.catalog import ImageSet
from hematovision.data.cells import CellStore
from hematovision.data.manifest import Manifest, check_manifest, read_manifest
from hematovision.data.splits import Split
from hematovision.data.study import Study, open_study, training_rows
from hematovision.errors import DataError, HematoVisionError
from hematovision.vision.field import Box


def manifest_of(dataset: str, rows: list[tuple[str, str, str, str, str]]) -> Manifest:
    """Return a manifest of (path, label, source, split, status)."""
    frame = pd.DataFrame(rows, columns=["path", "label", "source", "split", "status"])
    return check_manifest(frame.assign(dataset=dataset, sha256=frame["path"], width=48, height=48))


ROWS = [
    ("p/1.png", "monocyte", "1", "photograph", "ok"),
    ("p/2.png", "neutrophil", "2", "photograph", "ok"),
    ("train/1a.png", "monocyte", "1", "train", "ok"),
    ("train/1b.png", "monocyte", "1", "train", "unsure"),
    ("train/bad.png", "monocyte", "1", "train", "truncated"),
    ("train/none.png", "", "9", "train", "unlabelled"),
    ("test/2a.png", "neutrophil", "2", "test", "ok"),
]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))
    for path, *_ in ROWS:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / path), np.full((48, 48, 3), 200, np.uint8))
    manifest = manifest_of("drawn", ROWS)
    groups = pd.Series({path: f"group-{source}" for path, _, source, *_ in ROWS}, name="group")
    pairs = pd.DataFrame({"source_a": ["1"], "source_b": ["2"], "similarity": [0.987654321012345]})
    boxes = {
        "p/1.png": (Box(1, 2, 30, 40), Box(5, 6, 7, 8, "RBC", 0.5, True)),
        "p/2.png": (Box(3, 4, 20, 20, "WBC", 0.25), Box(0, 0, 3, 3, "Platelets")),
    }
    return Study(tmp_path / "run", "drawn", tmp_path / "images", manifest, groups, pairs, boxes)


class TestRoundTrip:
    def test_everything_comes_back(self, study: Study) -> None:
        study.write()
        again = open_study(study.folder)
        assert (again.folder, again.name, again.root) == (study.folder, study.name, study.root)
        assert again.boxes == study.boxes
        pd.testing.assert_frame_equal(again.manifest, study.manifest)
        assert again.groups.to_dict() == study.groups.to_dict()
        assert again.near_duplicates["similarity"].tolist() == [0.987654321012345]

    def test_names_that_look_like_numbers_or_nothing_stay_text(self, study: Study) -> None:
        odd = dataclasses.replace(
            study,
            groups=pd.Series({"a": "007", "b": "NA", "c": ""}),
            near_duplicates=pd.DataFrame({"source_a": ["007"], "source_b": ["NA"], "label_a": [""]}),
        )
        odd.write()
        again = open_study(study.folder)
        assert again.groups.to_dict() == {"a": "007", "b": "NA", "c": ""}
        assert again.near_duplicates.iloc[0].tolist() == ["007", "NA", ""]

    def test_no_near_duplicates_and_no_boxes(self, study: Study) -> None:
        bare = dataclasses.replace(study, near_duplicates=study.near_duplicates.iloc[:0], boxes={})
        bare.write()
        again = open_study(study.folder)
        assert list(again.near_duplicates.columns) == ["source_a", "source_b", "similarity"]
        assert again.near_duplicates.empty
        assert again.boxes == {}

    def test_writing_twice_gives_equal_bytes(self, study: Study) -> None:
        study.write()
        first = {p.name: p.read_bytes() for p in study.folder.iterdir()}
        open_study(study.folder).write()
        assert {p.name: p.read_bytes() for p in study.folder.iterdir()} == first
        assert len(first) == 5

    def test_without_its_last_file_it_is_no_study(self, study: Study) -> None:
        with pytest.raises(DataError, match="run holds no study: run 01_eda first"):
            open_study(study.folder)
        study.write()
        (study.folder / "study.json").unlink()  # what a kill before the end would leave
        with pytest.raises(DataError, match="run 01_eda first"):
            open_study(study.folder)


class TestImages:
    def test_only_usable_ones(self, study: Study) -> None:
        assert "train/bad.png" not in set(study.images()["path"])
        assert "train/none.png" not in set(study.images()["path"])
        assert len(study.images()) == 5

    def test_of_some_sides(self, study: Study) -> None:
        assert study.images("test")["path"].tolist() == ["test/2a.png"]
        assert set(study.images("train", "test")["split"]) == {"train", "test"}

    def test_groups_in_the_order_asked_for(self, study: Study) -> None:
        paths = ["test/2a.png", "elsewhere.png", "p/1.png", "train/1a.png"]
        assert study.groups_of(paths).tolist() == ["group-2", "elsewhere.png", "group-1", "group-1"]
        assert study.groups_of(pd.Series(paths, index=[5, 6, 7, 8])).tolist()[0] == "group-2"

    def test_annotated_white_cells_of_photographs(self, study: Study) -> None:
        assert study.annotated() == {
            "p/1.png": study.boxes["p/1.png"][:1],
            "p/2.png": study.boxes["p/2.png"][:1],
        }


class TestSplits:
    def test_round_trip(self, study: Study) -> None:
        split = Split("official", ("train/1a.png",), ("p/1.png",), ("test/2a.png",), note="all, of it")
        study.write_split(split)
        assert study.split("official") == split

    def test_missing(self, study: Study) -> None:
        with pytest.raises(DataError, match="there is no split 'random': run 02_preprocessing first"):
            study.split("random")


class TestCells:
    def test_copies_without_their_photographs_then_the_extra_sets(self, study: Study, tmp_path: Path) -> None:
        extra = manifest_of("pbc", [("x.png", "basophil", "x", "", "ok")])
        (tmp_path / "extra").mkdir()
        cv2.imwrite(str(tmp_path / "extra" / "x.png"), np.full((60, 60, 3), 90, np.uint8))
        study.add_extra(ImageSet("pbc", extra, tmp_path / "extra"), ["basophil"])
        store = study.cells(16, 0.15)
        assert store.table["path"].tolist() == ["test/2a.png", "train/1a.png", "train/1b.png", "x.png"]
        assert store.size == 16
        assert len(store.parts) == 2
        pd.testing.assert_frame_equal(read_manifest(study.folder / "extra" / "pbc.csv"), extra)

    def test_photographs_where_there_are_no_copies(self, study: Study) -> None:
        alone = dataclasses.replace(study, manifest=study.manifest[study.manifest["split"] == "photograph"])
        assert alone.cells(16, 0.15).table["path"].tolist() == ["p/1.png", "p/2.png"]

    def test_are_cut_once(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        first = study.cells(16, 0.15)
        monkeypatch.setattr("hematovision.data.cells._cut_chunk", lambda _: pytest.fail("cut again"))
        assert study.cells(16, 0.15).key == first.key

    def test_the_root_is_followed_after_a_move(self, study: Study) -> None:
        study.write()
        with pytest.raises(HematoVisionError, match=r"test/2a\.png"):
            dataclasses.replace(open_study(study.folder), root=study.folder).cells(16, 0.15)


def test_extra_sets_are_trained_on_and_never_judged_by() -> None:
    table = pd.DataFrame({"path": ["a", "b", "c", "x", "y"], "dataset": ["drawn"] * 3 + ["pbc"] * 2})
    store = CellStore((np.zeros((5, 4, 4, 3), np.uint8),), table, "key")
    study = Study(Path(), "drawn", Path(), table, pd.Series(dtype=str), pd.DataFrame(), {})
    train, validation = training_rows(study, store, Split("official", ("c", "a"), ("b",), ()))
    assert train.tolist() == [2, 0, 3, 4]
    assert validation.tolist() == [1]
    assert train.dtype == validation.dtype == np.int64
