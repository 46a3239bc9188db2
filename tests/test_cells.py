"""Crops on disk: the same bytes however the run went, read back in any order, never all in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from disks import small_disk
from numpy.typing import NDArray

from hematovision import files
from hematovision.data import cells as cells_module
from hematovision.data.cells import CellStore, cut_cells, join_stores
from hematovision.data.manifest import Manifest, check_manifest
from hematovision.errors import DataError, HematoVisionError, ImageError
from hematovision.files import create_array, is_array, sha256_file
from hematovision.vision.crop import crop_main_cell

N, SIZE = 10, 32


def draw_field(seed: int) -> NDArray[np.uint8]:
    """Return a pale field with three red cells and one white cell somewhere in it."""
    rng = np.random.default_rng(seed)
    rgb = np.full((96, 128, 3), (214, 214, 210), np.uint8)
    for x, y in rng.integers(10, 90, (3, 2)).tolist():
        cv2.circle(rgb, (x, y), 9, (206, 158, 152), -1)
    x, y = int(rng.integers(36, 92)), int(rng.integers(36, 60))
    cv2.circle(rgb, (x, y), 22, (190, 160, 198), -1)
    cv2.circle(rgb, (x, y), 16, (110, 80, 180), -1)
    return np.clip(rgb + rng.normal(0, 2, rgb.shape), 0, 255).astype(np.uint8)


def write_fields(root: Path, n: int = N, dataset: str = "drawn") -> Manifest:
    """Write fields as files and return their manifest; the last but one shows no cell."""
    rows = []
    for i in range(n):
        rgb = draw_field(i) if i != n - 2 else np.full((96, 128, 3), 214, np.uint8)
        path = f"{dataset}/{i:02d}.png"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / path), rgb[..., ::-1])
        label = ("monocyte", "neutrophil")[i % 2]
        rows.append(
            (path, dataset, label, f"photo-{i // 2}", "train", sha256_file(root / path), 128, 96, "ok")
        )
    return check_manifest(
        pd.DataFrame(
            rows,
            columns=["path", "dataset", "label", "source", "split", "sha256", "width", "height", "status"],
        )
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return write_fields(root)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "_CHUNK", 3)


def cut(manifest: Manifest, root: Path, cache: Path, **options: object) -> CellStore:
    return cut_cells(manifest, root, cache, **{"size": SIZE, "workers": 1, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(manifest: Manifest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return cut(manifest, root, tmp_path_factory.mktemp("cache"))


def pixels(store: CellStore) -> NDArray[np.uint8]:
    return store.read(np.arange(len(store.table)))


class TestCut:
    def test_the_crops_are_those_of_vision(self, store: CellStore, manifest: Manifest, root: Path) -> None:
        for i, path in enumerate(manifest["path"]):
            field = cv2.imread(str(root / path))[..., ::-1]
            cell = crop_main_cell(np.ascontiguousarray(field), SIZE, 0.15)
            assert np.array_equal(store.read(np.array([i]))[0], cell.rgb)
            row = store.table.iloc[i]
            assert (row.x, row.y, row.width, row.height) == (
                *(cell.box.x, cell.box.y, cell.box.width, cell.box.height),
            )

    def test_one_row_an_image_in_the_manifest_s_order(self, store: CellStore, manifest: Manifest) -> None:
        columns = ["dataset", "path", "label", "source", "split"]
        pd.testing.assert_frame_equal(store.table[columns], manifest[columns])
        assert list(store.table.columns) == [*columns, "found", "x", "y", "width", "height"]
        assert store.size == SIZE

    def test_an_image_without_a_cell_says_so(self, store: CellStore) -> None:
        assert store.table["found"].tolist() == [i != N - 2 for i in range(N)]

    def test_is_mapped_and_cannot_be_written_to(self, store: CellStore) -> None:
        assert isinstance(store.parts[0], np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            store.parts[0][0] = 0

    def test_what_cannot_be_decoded_is_left_out(self, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        status = ["truncated", "unreadable", "duplicate", *["ok"] * (N - 3)]
        table = cut(manifest.assign(status=status), root, tmp_path).table
        assert table["path"].tolist() == manifest["path"].tolist()[2:]
        with pytest.raises(DataError, match="no readable image is left: check the data folder"):
            cut(manifest.assign(status="unreadable"), root, tmp_path)

    def test_an_image_that_went_away_is_named(self, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        gone = manifest.assign(path=[*manifest["path"].iloc[:-1], "drawn/99.png"])
        with pytest.raises(HematoVisionError, match=r"drawn/99\.png"):
            cut(gone, root, tmp_path)

    def test_progress_counts_images(self, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        cut(manifest, root, tmp_path, progress=lambda *counts: seen.append(counts))
        assert seen == [(3, N), (6, N), (9, N), (N, N)]


class TestKey:
    def test_names_pixels_size_margin_and_code(
        self,
        store: CellStore,
        manifest: Manifest,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        keys = {
            store.key,
            cut(manifest, root, tmp_path, size=16).key,
            cut(manifest, root, tmp_path, margin=0.3).key,
            cut(manifest.iloc[1:], root, tmp_path).key,
        }
        monkeypatch.setattr(cells_module, "_code_key", lambda: "another way to locate")
        assert len(keys | {cut(manifest, root, tmp_path).key}) == 5

    def test_corrected_labels_need_no_new_crops(
        self, manifest: Manifest, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = cut(manifest, root, tmp_path)
        monkeypatch.setattr(cells_module, "_cut_chunk", lambda _: pytest.fail("cut again"))
        second = cut(manifest.assign(label="basophil", source="one"), root, tmp_path)
        assert second.key == first.key
        assert set(second.table["label"]) == {"basophil"}
        assert set(second.table["source"]) == {"one"}


KILLED = """
import os, signal, sys
from pathlib import Path
from hematovision.data import cells
from hematovision.data.manifest import read_manifest
when, manifest, root, cache = sys.argv[1:]
cells._CHUNK = 3
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
crop, cuts = cells.crop_main_cell, 0
def crop_and_die(*a, **k):
    global cuts
    cuts += 1
    if cuts == 5:
        die()
    return crop(*a, **k)
if when == "between chunks":
    progress = die
elif when == "inside a chunk":
    progress, cells.crop_main_cell = None, crop_and_die
elif when == "before the table":
    progress, cells.write_text = None, die
elif when == "while the array is made":
    progress = None
    import hematovision.files as files
    files._take_space = lambda handle, start, size: (handle.truncate(start + size), die())
cells.cut_cells(read_manifest(manifest), Path(root), Path(cache), size=32, workers=1, progress=progress)
"""


class TestResume:
    @pytest.mark.parametrize(
        ("when", "left"),
        [
            ("while the array is made", N),
            ("between chunks", N - 3),
            ("inside a chunk", N - 3),
            ("before the table", 0),
        ],
    )
    def test_a_killed_run_goes_on_with_the_same_bytes(
        self,
        store: CellStore,
        manifest: Manifest,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        when: str,
        left: int,
    ) -> None:
        manifest.to_csv(tmp_path / "m.csv", index=False)
        command = [sys.executable, "-c", KILLED, when, tmp_path / "m.csv", root, tmp_path / "cache"]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        cuts: list[str] = []

        def counted(*args: object, **options: object) -> object:
            cuts.append("cut")
            return crop_main_cell(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(cells_module, "crop_main_cell", counted)
        resumed = cut(manifest, root, tmp_path / "cache")
        assert len(cuts) == left
        assert np.array_equal(pixels(resumed), pixels(store))
        pd.testing.assert_frame_equal(resumed.table, store.table)

    def test_a_damaged_array_is_cut_again(
        self, store: CellStore, manifest: Manifest, root: Path, tmp_path: Path
    ) -> None:
        cut(manifest, root, tmp_path)
        file = tmp_path / "cells" / store.key / "images.npy"
        os.truncate(file, file.stat().st_size // 2)
        assert np.array_equal(pixels(cut(manifest, root, tmp_path)), pixels(store))

    def test_a_finished_store_is_only_opened(
        self, manifest: Manifest, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut(manifest, root, tmp_path)
        monkeypatch.setattr(cells_module, "_cut", lambda *_: pytest.fail("cut again"))
        cut(manifest, root, tmp_path)


class TestWorkers:
    def test_the_bytes_do_not_depend_on_how_many(
        self, store: CellStore, manifest: Manifest, root: Path, tmp_path: Path
    ) -> None:
        two = cut(manifest, root, tmp_path, workers=2)
        assert two.key == store.key
        assert np.array_equal(pixels(two), pixels(store))
        pd.testing.assert_frame_equal(two.table, store.table)

    def test_a_bad_image_is_named_from_a_worker(self, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        (root / "drawn" / "bad.png").write_bytes(b"no image")
        bad = manifest.assign(path=["drawn/bad.png", *manifest["path"].iloc[1:]])
        said = []
        for workers in (1, 2):
            with pytest.raises(ImageError, match=r"^drawn/bad\.png") as caught:
                cut(bad, root, tmp_path, workers=workers)
            said.append((str(caught.value), caught.value.what, caught.value.remedy))
        assert said[0] == said[1]

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
    def test_none_is_left_when_the_run_is_killed(
        self, manifest: Manifest, root: Path, tmp_path: Path
    ) -> None:
        manifest.to_csv(tmp_path / "m.csv", index=False)
        script = tmp_path / "script.py"
        body = KILLED.replace("workers=1", "workers=2").replace("\ncells.cut_cells", "\n    cells.cut_cells")
        head, tail = body.split("\n    cells.cut_cells")
        script.write_text(f"{head}\nif __name__ == '__main__':\n    cells.cut_cells{tail}")
        command = [sys.executable, script, "between chunks", tmp_path / "m.csv", root, tmp_path / "cache"]
        mark = {**os.environ, "HEMATOVISION_TEST_MARK": str(tmp_path)}
        assert subprocess.run(command, env=mark, check=False).returncode == -signal.SIGKILL
        until = time.monotonic() + 20
        while (left := marked(str(tmp_path))) and time.monotonic() < until:
            time.sleep(0.1)
        for process in left:
            os.kill(process, signal.SIGKILL)
        assert not left


def marked(mark: str) -> list[int]:
    """Return the processes, zombies apart, whose environment holds the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"HEMATOVISION_TEST_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


class TestFullDisk:
    def test_one_line_before_any_work(self, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        # the ten crops take 30 KiB
        with small_disk(tmp_path / "disk", 24) as disk:
            with pytest.raises(HematoVisionError, match=r"images\.npy: the disk is full; free some space"):
                cut(manifest, root, disk)
            assert not list(disk.rglob("*.npy"))

    def test_the_space_of_an_array_is_taken_at_once(self, tmp_path: Path) -> None:
        create_array(tmp_path / "a.npy", (1 << 20,), np.uint8)
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 1 << 20

    def test_without_the_system_s_help_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "posix_fallocate")
        shape = (3, 700_001)  # two blocks and a rest
        create_array(tmp_path / "a.npy", shape, np.uint8)
        assert is_array(tmp_path / "a.npy", shape, np.uint8)
        assert not np.load(tmp_path / "a.npy").any()
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 3 * 700_001

    def test_is_array_refuses_others(self, tmp_path: Path) -> None:
        create_array(tmp_path / "a.npy", (2, 3), np.float32)
        assert is_array(tmp_path / "a.npy", (2, 3), np.float32)
        assert not is_array(tmp_path / "a.npy", (3, 2), np.float32)
        assert not is_array(tmp_path / "a.npy", (2, 3), np.float64)
        assert not is_array(tmp_path / "b.npy", (2, 3), np.float32)
        (tmp_path / "c.npy").write_bytes(b"\0" * 500)
        assert not is_array(tmp_path / "c.npy", (2, 3), np.float32)

    def test_an_unwritable_place_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(HematoVisionError, match="a file stands where a folder should be"):
            files.create_array(tmp_path / "file" / "a.npy", (1,), np.uint8)


class TestRead:
    def test_in_the_order_asked_for(self, store: CellStore) -> None:
        rows = np.array([7, 0, 7, 3])
        assert np.array_equal(store.read(rows), pixels(store)[rows])
        assert store.read(np.array([], int)).shape == (0, SIZE, SIZE, 3)

    def test_resizes(self, store: CellStore) -> None:
        rows = np.array([2, 1])
        small, large = store.read(rows, 16), store.read(rows, 48)
        assert small.shape == (2, 16, 16, 3)
        assert large.shape == (2, 48, 48, 3)
        assert small.dtype == large.dtype == np.uint8
        # halving by areas is the mean of each 2x2 square, rounded
        means = store.read(rows).reshape(2, 16, 2, 16, 2, 3).mean(axis=(2, 4))
        assert np.abs(small - means).max() <= 0.5
        assert np.array_equal(store.read(rows, SIZE), store.read(rows))

    def test_a_caller_may_change_what_it_got(self, store: CellStore) -> None:
        before = pixels(store)
        store.read(np.array([0]))[:] = 0
        assert np.array_equal(pixels(store), before)

    def test_rows_of_paths(self, store: CellStore) -> None:
        paths = store.table["path"].tolist()
        assert store.rows_of([paths[5], paths[1]]).tolist() == [5, 1]
        assert store.rows_of([]).tolist() == []
        with pytest.raises(DataError, match=r"drawn/77\.png has no crop: run 02_preprocessing again"):
            store.rows_of([paths[0], "drawn/77.png"])


class TestJoin:
    @pytest.fixture
    def other(self, tmp_path: Path) -> CellStore:
        manifest = write_fields(tmp_path / "images", 4, "elsewhere")
        return cut(manifest, tmp_path / "images", tmp_path / "cache", margin=0.4)

    def test_rows_follow_one_another(self, store: CellStore, other: CellStore) -> None:
        both = join_stores(store, other)
        assert both.parts[0] is store.parts[0]  # nothing is copied
        assert both.table["dataset"].tolist() == ["drawn"] * N + ["elsewhere"] * 4
        rows = np.array([N + 3, 2, N, N - 1])
        expected = np.concatenate(
            [
                *(other.read(np.array([3])), store.read(np.array([2]))),
                *(other.read(np.array([0])), store.read(np.array([N - 1]))),
            ]
        )
        assert np.array_equal(both.read(rows), expected)
        assert both.rows_of(["elsewhere/01.png"]).tolist() == [N + 1]

    def test_the_key_names_the_parts_in_order(self, store: CellStore, other: CellStore) -> None:
        keys = {join_stores(*s).key for s in ([store, other], [other, store], [store])}
        assert len(keys | {store.key}) == 4

    def test_sizes_must_agree(self, store: CellStore, manifest: Manifest, root: Path, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match="different sizes cannot be joined: cut them with the same cell_size"
        ):
            join_stores(store, cut(manifest, root, tmp_path, size=16))
