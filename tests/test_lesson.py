"""The photographs alone, with copies of our own making."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hematovision.classes import FOUR
from hematovision.data.catalog import load_set
from hematovision.errors import DataError


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A data folder with eight photographs of each class, one of two cells, and one of a basophil."""
    root = tmp_path / "data" / "blood-cells" / "dataset-master" / "dataset-master"
    (root / "JPEGImages").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["Image,Category"]
    for i in range(34):
        picture = cv2.resize(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8), (160, 120))
        cv2.imwrite(str(root / "JPEGImages" / f"BloodImage_{i:05d}.jpg"), picture)
        label = FOUR[i % 4].upper() if i < 32 else ("NEUTROPHIL, EOSINOPHIL" if i == 32 else "BASOPHIL")
        lines.append(f'{i},"{label}"')
    (root / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_photographs_get_copies_on_one_side_alone(photographs: Path) -> None:
    made = load_set("photographs", photographs / "data", cache=photographs / "cache", copies=3, seed=1)
    manifest = made.manifest
    counts = manifest["split"].value_counts()
    # two of eight a class are tested
    assert counts.to_dict() == {"train": 72, "photograph": 32, "test": 24, "test_simple": 8}
    sides = manifest[manifest["split"].isin(["train", "test"])].groupby("source")["split"].nunique()
    assert (sides == 1).all()
    assert set(manifest["label"]) == set(FOUR)
    assert all(made.path_of(path).is_file() for path in manifest["path"])
    # a name tells nothing of its photograph
    assert not any(row.source in row.path for row in manifest[manifest["split"] == "train"].itertuples())


def test_equal_arguments_give_equal_files_and_others_another_set(photographs: Path) -> None:
    data, cache = photographs / "data", photographs / "cache"
    first = load_set("photographs", data, cache=cache, copies=2, seed=1)
    again = load_set("photographs", data, cache=photographs / "elsewhere", copies=2, seed=1)
    assert first.manifest.equals(again.manifest)
    assert load_set("photographs", data, cache=cache, copies=2, seed=2).root != first.root


def test_missing_photographs_are_told_in_one_line(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_set("photographs", tmp_path / "nowhere", cache=tmp_path)
    folder = photographs / "data/blood-cells/dataset-master/dataset-master"
    for file in sorted((folder / "JPEGImages").iterdir())[:24]:
        file.unlink()
    with pytest.raises(DataError, match="too few photographs of a"):
        load_set("photographs", photographs / "data", cache=tmp_path)
    with pytest.raises(DataError, match="no option 'photographs'"):
        load_set("photographs", photographs / "data", cache=tmp_path, photographs=3)


@pytest.mark.data
def test_the_real_photographs(real_data: Path, tmp_path: Path) -> None:
    made = load_set("photographs", real_data, cache=tmp_path, copies=1)
    photographs = made.manifest[made.manifest["split"] == "photograph"]
    # the photographs behind the public set's 12,444 copies
    assert len(photographs) == 348
    assert photographs["label"].value_counts().to_dict() == {
        "neutrophil": 207,
        "eosinophil": 88,
        "lymphocyte": 33,
        "monocyte": 20,
    }
