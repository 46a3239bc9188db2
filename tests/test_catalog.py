"""Loading a set: what is kept, what is said, and what the real sets hold."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hematovision.classes import EIGHT
from hematovision.config import load_profile
from hematovision.data import catalog
from hematovision.data.catalog import CATALOG, ImageSet, load_set
from hematovision.data.manifest import COLUMNS, check_manifest, read_manifest
from hematovision.errors import DataError, HematoVisionError


def put_picture(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with two monocytes and a neutrophil."""
    for seed, name in enumerate(("monocyte/1.png", "monocyte/2.png", "neutrophil/1.png")):
        put_picture(tmp_path / "own" / name, seed)
    return tmp_path / "own"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of files each time files are opened."""
    calls: list[int] = []
    inspect = catalog.inspect_images

    def counting(images, *rest):
        calls.append(len(images))
        return inspect(images, *rest)

    monkeypatch.setattr(catalog, "inspect_images", counting)
    return calls


def same(a: ImageSet, b: ImageSet) -> bool:
    return a.manifest.equals(b.manifest) and (a.boxes, a.notes, a.root) == (b.boxes, b.notes, b.root)


def test_every_row_is_whole():
    for name, row in CATALOG.items():
        assert row.name == name
        assert row.title
        assert row.description
        assert row.classes == EIGHT[: len(row.classes)], "the order of every probability matrix"
        if row.kaggle:
            assert row.licence
            assert row.citation
            assert row.known is not None
            assert row.known.is_file()
            assert sum(row.counts.values()) == row.images


def test_the_drawn_default_is_that_of_the_quick_profile():
    profile = load_profile("quick")
    defaults = catalog.SYNTHETIC_DEFAULTS
    assert defaults["photographs"] == profile.synthetic_photographs
    assert defaults["copies"] == profile.synthetic_copies
    assert defaults["seed"] == profile.seed
    assert defaults["classes"] == profile.classes


def test_paths_are_relative_to_the_root(own: Path, cache: Path):
    image_set = load_set("folder", own, cache=cache)
    assert image_set.root == own
    assert list(image_set.manifest.columns) == list(COLUMNS)
    assert all(image_set.path_of(path).is_file() for path in image_set.manifest["path"])
    assert not image_set.manifest["path"].str.startswith("/").any()


def test_files_are_opened_once(own: Path, cache: Path, inspected: list[int]):
    first = load_set("folder", own, cache=cache)
    again = load_set("folder", own, cache=cache)
    assert inspected == [3]
    assert same(first, again)


def test_a_changed_folder_is_read_again(own: Path, cache: Path, inspected: list[int]):
    load_set("folder", own, cache=cache)
    put_picture(own / "neutrophil" / "2.png", 9)
    assert len(load_set("folder", own, cache=cache).manifest) == 4
    (own / "sources.csv").write_text("path,source\nneutrophil/2.png,slide 1\n")
    assert "slide 1" in set(load_set("folder", own, cache=cache).manifest["source"])
    assert inspected == [3, 4, 4]


@pytest.mark.parametrize("damage", ["set.json", "manifest.csv"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_a_damaged_cache_is_built_again(
    own: Path, cache: Path, inspected: list[int], damage: str, content: bytes
):
    first = load_set("folder", own, cache=cache)
    (kept,) = (cache / "manifests").iterdir()
    (kept / damage).write_bytes(content)
    assert same(load_set("folder", own, cache=cache), first)
    assert inspected == [3, 3]
    assert same(load_set("folder", own, cache=cache), first)
    assert inspected == [3, 3], "it is whole again"


def test_damaged_files_are_said(own: Path, cache: Path):
    (own / "monocyte" / "3.png").write_bytes(b"")
    (own / "neutrophil" / "4.png").write_bytes((own / "monocyte" / "1.png").read_bytes())
    image_set = load_set("folder", own, cache=cache)
    assert image_set.notes == (
        "folder: 1 files cannot be read as images",
        "folder: 2 files have the same bytes as a file of another class",
    )
    statuses = image_set.manifest.set_index("path")["status"].to_dict()
    assert statuses == {
        "monocyte/1.png": "conflict",
        "monocyte/2.png": "ok",
        "monocyte/3.png": "unreadable",
        "neutrophil/1.png": "ok",
        "neutrophil/4.png": "conflict",
    }


@pytest.mark.parametrize("name", ["blood-cells", "pbc"])
def test_a_missing_set_says_where_and_what_to_do(name: str, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_set(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert f"hematovision fetch {name}" in message
    assert "--data DIR" in message
    assert "\n" not in message


def test_a_missing_folder_offers_no_download(tmp_path: Path):
    with pytest.raises(DataError, match="is not at") as caught:
        load_set("folder", tmp_path / "nowhere")
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("root", ["PBC_dataset_normal_DIB", "bloodcells_dataset", "."])
def test_pbc_under_each_of_its_names(tmp_path: Path, cache: Path, root: str):
    put_picture(tmp_path / "pbc" / root / "ig" / "IG_1.png", 1)
    put_picture(tmp_path / "pbc" / root / "platelet" / "P_1.png", 1)
    image_set = load_set("pbc", tmp_path, cache=cache)
    assert len(image_set.manifest) == 2
    assert set(image_set.manifest["source"]) == {"IG_1"}, "identical pictures share one source"


def test_an_unknown_set_and_an_unknown_option(own: Path, cache: Path):
    with pytest.raises(DataError, match="choose one of blood-cells, pbc, folder, photographs, synthetic"):
        load_set("malaria")
    with pytest.raises(DataError, match="'folder' has no option 'seed'"):
        load_set("folder", own, cache=cache, seed=1)
    with pytest.raises(DataError, match="'synthetic' has no option 'colour'"):
        load_set("synthetic", cache=cache, colour="blue")


def test_an_unwritable_cache(own: Path, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HematoVisionError, match="choose another path"):
        load_set("folder", own, cache=tmp_path / "file" / "cache")


def test_the_drawn_set(cache: Path):
    image_set = load_set("synthetic", cache=cache, photographs=16, copies=1, seed=3)
    check_manifest(image_set.manifest)
    assert (image_set.manifest["source"] != "").all()
    assert all(image_set.path_of(path).is_file() for path in image_set.manifest["path"])
    assert set(image_set.boxes) <= set(image_set.manifest["path"])
    labels = {box.label for boxes in image_set.boxes.values() for box in boxes}
    assert labels >= set(image_set.manifest["label"]), "white cells carry their class"


def test_the_manifest_is_written(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))
    image_set = catalog.write_set_manifest("folder", tmp_path / "out.csv", own)
    assert read_manifest(tmp_path / "out.csv").equals(image_set.manifest)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that the tests on the real sets share: filling it takes most of their time."""
    return tmp_path_factory.mktemp("cache")


class TestRealSets:
    """Counts as published by the sets' authors, or counted by hand in the files of Kaggle."""

    pytestmark = pytest.mark.data

    def test_blood_cells(self, real_data: Path, kept: Path):
        image_set = load_set("blood-cells", real_data, cache=kept, sources=False)
        manifest = image_set.manifest
        assert manifest["split"].value_counts().to_dict() == CATALOG["blood-cells"].counts
        per_class = manifest.groupby(["split", "label"]).size().unstack(fill_value=0).to_dict("index")
        order = ("eosinophil", "lymphocyte", "monocyte", "neutrophil", "basophil", "")
        assert [per_class["photograph"][label] for label in order] == [88, 33, 20, 207, 3, 16]
        assert [per_class["test_simple"][label] for label in order] == [13, 6, 4, 48, 0, 0]
        assert [per_class["train"][label] for label in order[:4]] == [2497, 2483, 2478, 2499]
        assert [per_class["test"][label] for label in order[:4]] == [623, 620, 620, 624]
        statuses = manifest["status"].value_counts().to_dict()
        assert statuses == {"ok": 12_864, "unlabelled": 16, "duplicate": 2}
        duplicates = manifest.loc[manifest["status"] == "duplicate", "path"].map(lambda p: Path(p).name)
        assert set(duplicates) == {"_4_8814.jpeg", "_6_7701.jpeg"}

    def test_boxes(self, real_data: Path, kept: Path):
        boxes = load_set("blood-cells", real_data, cache=kept, sources=False).boxes
        labels = [box.label for found in boxes.values() for box in found]
        assert len(boxes) == 364
        assert (labels.count("WBC"), labels.count("RBC"), labels.count("Platelets")) == (372, 4155, 361)
        assert all(b.x >= 0 and b.x + b.width <= 640 for found in boxes.values() for b in found)

    def test_loading_again_is_fast(self, real_data: Path, kept: Path):
        load_set("blood-cells", real_data, cache=kept, sources=False)
        started = time.perf_counter()
        load_set("blood-cells", real_data, cache=kept, sources=False)
        # 0.3 s on two idle cores; a loaded machine may take some times that, reading all files 10 s
        assert time.perf_counter() - started < 2

    def test_pbc(self, real_data: Path, kept: Path):
        image_set = load_set("pbc", real_data, cache=kept)
        manifest = image_set.manifest
        assert set(manifest["label"]) == set(EIGHT)
        assert (manifest["width"] > 300).all()
        if len(manifest) < 17_092:
            assert image_set.notes[0] == f"pbc: {len(manifest):,} of the 17,092 images are here"
