"""White cells cut out of every image of a set, kept on disk as one memory-mapped array."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision import vision
from hematovision.data.manifest import Manifest
from hematovision.data.workers import end_with_parent
from hematovision.errors import DataError
from hematovision.files import (
    content_key,
    create_array,
    is_array,
    read_json,
    sha256_file,
    write_json,
    write_text,
)
from hematovision.vision.crop import crop_main_cell, scale_crop
from hematovision.vision.image import read_image

_VERSION = 2
_CHUNK = 256  # images a unit of work: a killed run loses at most one chunk a core
_UNREADABLE = ("unreadable", "truncated")


@dataclass(frozen=True)
class CellStore:
    """Crops of one set, one an image.

    Attributes
    ----------
    parts : tuple of uint8 arrays of shape (n, size, size, 3), memory-mapped, read-only
        One a set; their rows follow one another.
    table : DataFrame
        One row a crop, in the same order: ``dataset, path, label, source, split, found, x, y, width, height``
        (the box in the image's pixels; ``found`` is False where no white cell was located and the
        central square was taken).
    key : str
        Names the content: equal keys, equal crops.
    """

    parts: tuple[NDArray[np.uint8], ...]
    table: pd.DataFrame
    key: str

    @property
    def size(self) -> int:
        """Edge length in pixels."""
        return int(self.parts[0].shape[1])

    def rows_of(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """Return the row numbers of the given paths, in their order.

        Raises
        ------
        DataError
            If a path is not in the store.
        """
        rows = pd.Index(self.table["path"]).get_indexer(pd.Index(paths))
        if (rows < 0).any():
            missing = list(paths)[int(np.argmax(rows < 0))]
            raise DataError(f"{missing} has no crop", "run 02_preprocessing again")
        return rows.astype(np.int64)

    def read(self, rows: NDArray[np.int64], size: int | None = None) -> NDArray[np.uint8]:
        """Return crops in the order of ``rows``, resized to ``size`` if given.

        Returns
        -------
        uint8 array of shape (len(rows), size, size, 3)
        """
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        first = 0
        for part in self.parts:
            here = (rows >= first) & (rows < first + len(part))
            out[here] = part[rows[here] - first]
            first += len(part)
        if size in (None, self.size):
            return out
        return _resize(out, int(size or 0))


def _resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = scale_crop(image, size)
    return out


def join_stores(*stores: CellStore) -> CellStore:
    """Return one store that holds the crops of several, without copying them.

    Raises
    ------
    DataError
        If their sizes differ.
    """
    if len({store.size for store in stores}) != 1:
        raise DataError("crops of different sizes cannot be joined", "cut them with the same cell_size")
    table = pd.concat([store.table for store in stores], ignore_index=True)
    parts = tuple(part for store in stores for part in store.parts)
    return CellStore(parts, table, content_key(*[store.key for store in stores]))


def cut_cells(
    manifest: Manifest,
    root: Path,
    cache: Path,
    *,
    size: int = 224,
    margin: float = 0.15,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CellStore:
    """Locate and crop the white cell of every decodable image; resumes a killed run.

    Parameters
    ----------
    manifest : Manifest
        Rows that are unreadable or truncated are left out.
    root : Path
        The folder that the manifest's paths are relative to.
    cache : Path
        The crops go to ``cache/cells/<key>/``.
    size : int
        Edge length of a crop in pixels.
    margin : float
        Added on each side, as a fraction of the cell's longer side (`vision.crop.crop_cell`).
    workers : int, optional
        Processes; all cores unless given. The result does not depend on it.
    progress : callable, optional
        Called with (done, total) images.
    """
    kept = manifest[~manifest["status"].isin(_UNREADABLE)].reset_index(drop=True)
    if kept.empty:
        raise DataError("no readable image is left", "check the data folder")
    # labels and photographs may be corrected without cutting again: the pixels, and the code that
    # locates and cuts, name the crops
    key = content_key(_VERSION, size, margin, kept[["path", "sha256"]].to_csv(index=False), _code_key())
    folder = cache / "cells" / key
    images_file, boxes_file = folder / "images.npy", folder / "boxes.csv"
    if not (boxes_file.exists() and is_array(images_file, (len(kept), size, size, 3), np.uint8)):
        _cut(kept["path"].tolist(), root, folder, images_file, boxes_file, (size, margin), workers, progress)
    boxes = pd.read_csv(boxes_file).drop(columns="path")
    table = pd.concat([kept[["dataset", "path", "label", "source", "split"]], boxes], axis=1)
    return CellStore((np.load(images_file, mmap_mode="r"),), table, key)


def _code_key() -> str:
    folder = Path(vision.__file__).parent
    return content_key([sha256_file(folder / f"{room}.py") for room in ("image", "locate", "crop")])


def _cut(
    paths: list[str],
    root: Path,
    folder: Path,
    images_file: Path,
    boxes_file: Path,
    crop: tuple[int, float],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    size = crop[0]
    shape = (len(paths), size, size, 3)
    if not is_array(images_file, shape, np.uint8):
        for stale in folder.glob("chunk-*.json"):
            stale.unlink()
        create_array(images_file, shape, np.uint8)
    starts = list(range(0, len(paths), _CHUNK))
    todo = [s for s in starts if not (folder / f"chunk-{s}.json").exists()]
    done = sum(min(_CHUNK, len(paths) - s) for s in starts if s not in set(todo))
    jobs = [(paths[s : s + _CHUNK], str(root), str(images_file), s, *crop) for s in todo]
    for start, boxes in zip(todo, _run(jobs, workers), strict=True):
        write_json(folder / f"chunk-{start}.json", boxes)
        done += len(boxes)
        if progress:
            progress(done, len(paths))
    rows = [box for s in starts for box in read_json(folder / f"chunk-{s}.json")]
    frame = pd.DataFrame(rows, columns=["path", "found", "x", "y", "width", "height"])
    write_text(boxes_file, frame.to_csv(index=False))


def _run(jobs: list[tuple[Any, ...]], workers: int | None) -> Iterator[list[list[Any]]]:
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
    if workers == 1:
        yield from map(_cut_chunk, jobs)
        return
    # spawn: a forked copy of a process that has started TensorFlow's threads can hang
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        yield from pool.map(_cut_chunk, jobs)


def _cut_chunk(job: tuple[list[str], str, str, int, int, float]) -> list[list[Any]]:
    import cv2

    cv2.setNumThreads(1)
    paths, root, images_file, start, size, margin = job
    images = np.load(images_file, mmap_mode="r+")
    boxes = []
    for offset, path in enumerate(paths):
        cell = crop_main_cell(read_image(Path(root) / path, name=path), size=size, margin=margin)
        images[start + offset] = cell.rgb
        box = cell.box
        boxes.append([path, box.score > 0, box.x, box.y, box.width, box.height])
    images.flush()
    return boxes
