"""The embedded data set: drawn smears, the same bytes from the same seed, nothing to download.

It mirrors the layout of the public four-class set: photographs of 640x480 pixels with boxes, and
augmented copies of 320x240 in class folders whose names do not tell the photograph, so that every
notebook runs on it unchanged; here the truth is known and stands in the manifest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.classes import EIGHT, FOUR
from hematovision.data.manifest import Manifest, check_manifest, read_manifest, write_manifest
from hematovision.data.smear import optics
from hematovision.data.smear.field import Slide, bounds, compose
from hematovision.data.smear.stains import laboratory as laboratory_of
from hematovision.data.workers import end_with_parent
from hematovision.errors import DataError
from hematovision.files import atomic_path, content_key, explain_os_error, read_json, sha256_file, write_json
from hematovision.vision.field import RGB, Box, Field

DRAWING_VERSION = 2
"""Part of the cache's key: a change of the drawing asks for a new number."""

TEST_FRACTION = 0.25
_FIELD, _CELL, _COPY, _PLAN = 1, 2, 3, 4  # separate streams of random numbers
COPY_SIZE = (240, 320)
_COPY_QUALITY = 75  # as the public set's copies were saved (read from their quantisation tables)


def draw_field(
    seed: int,
    labels: Sequence[str] = ("neutrophil",),
    laboratory: int = 0,
    size: tuple[int, int] = (480, 640),
) -> Field:
    """Draw a field of a May-Grunwald-Giemsa smear as one laboratory photographs it.

    Parameters
    ----------
    seed : int
        Non-negative; the same arguments give the same pixels.
    labels : sequence of str
        One white cell (or large platelet) for each; names of `hematovision.classes`.
    laboratory : int
        Number of the laboratory: stain, exposure, white balance and optics.
    size : (height, width)
        In pixels; red cells measure about 100 across whatever the size.

    Returns
    -------
    Field
        ``boxes`` holds the asked-for cells in order (``cut`` where the edge cuts one), then red
        cells (``"RBC"``) and small platelets; ``masks`` holds ``"cell"`` and ``"nucleus"`` (bool)
        and ``"instance"`` (int32: the number from 1 of the white cell at each pixel).

    Raises
    ------
    DataError
        If a label is no class.
    """
    data, slide = _photograph(seed, tuple(labels), laboratory, tuple(size))
    masks: dict[str, NDArray[np.generic]] = {
        "cell": slide.instance > 0,
        "nucleus": slide.nucleus,
        "instance": slide.instance,
    }
    name = f"drawn field {seed} of laboratory {laboratory}"
    return Field(optics.decode_jpeg(data), tuple(slide.boxes), name, masks)


def draw_cell(seed: int, label: str, laboratory: int = 0, size: int = 360) -> RGB:
    """Draw one cell in the middle of a square picture, as the Barcelona set shows it.

    Parameters
    ----------
    seed, label, laboratory
        As for `draw_field`.
    size : int
        Side in pixels. At 360 a red cell measures about 70 pixels, as there; others are scaled.

    Returns
    -------
    uint8 array of shape (size, size, 3)
    """
    _check_labels([label])
    lab = laboratory_of(laboratory)
    rng = np.random.default_rng([seed, _CELL])
    rgb, _ = compose(rng, [label], lab, (size, size), scale=0.72 * size / 360, centred=True)
    return optics.decode_jpeg(optics.encode_jpeg(rgb, lab.quality))


def reduce_photograph(photograph: RGB, size: tuple[int, int] = COPY_SIZE) -> RGB:
    """Return a photograph in the size (height, width) of the public set's copies."""
    return np.asarray(cv2.resize(photograph, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def copy_of(photograph: RGB, seed: int, size: tuple[int, int] = COPY_SIZE) -> RGB:
    """Make an augmented copy as the authors of the public set made theirs.

    Rotation up to 20 degrees, shifts up to 10 %, shear up to 0.2 radians and flips, of the
    photograph reduced to ``size``; what comes from outside is black, and pixels are taken, not
    interpolated, as `ImageDataGenerator` did then.

    Parameters
    ----------
    photograph : uint8 array of shape (height, width, 3)
    seed : int
    size : (height, width)

    Returns
    -------
    uint8 array of shape (\\*size, 3)
    """
    return np.asarray(_warp(reduce_photograph(photograph, size), _copy_matrix(seed, size)), np.uint8)


def _photograph(
    seed: int, labels: tuple[str, ...], laboratory: int, size: tuple[int, ...]
) -> tuple[bytes, Slide]:
    """Return a field as the bytes of a JPEG file, and what is on it."""
    _check_labels(labels)
    lab = laboratory_of(laboratory)
    rgb, slide = compose(np.random.default_rng([seed, _FIELD]), labels, lab, (size[0], size[1]))
    return optics.encode_jpeg(rgb, lab.quality), slide


def _check_labels(labels: Sequence[str]) -> None:
    for label in labels:
        if label not in EIGHT:
            raise DataError(f"'{label}' is not a class that can be drawn", f"use one of {', '.join(EIGHT)}")


def _copy_matrix(seed: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the 2x3 matrix that takes a pixel of the copy to a pixel of the picture."""
    rng = np.random.default_rng([seed, _COPY])
    height, width = size
    turn, shear = np.deg2rad(rng.uniform(-20, 20)), rng.uniform(-0.2, 0.2)
    shift_x, shift_y = rng.uniform(-0.1, 0.1) * width, rng.uniform(-0.1, 0.1) * height
    flip_x, flip_y = rng.choice([-1.0, 1.0]), rng.choice([-1.0, 1.0])
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    sheared = np.array([[np.cos(shear), 0, 0], [-np.sin(shear), 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, shift_x], [0, 1, shift_y], [0, 0, 1]])
    flip = np.diag([flip_x, flip_y, 1.0])
    whole = centre @ rotation @ shift @ sheared @ flip @ np.linalg.inv(centre)
    return np.asarray(whole[:2], np.float64)


def _warp(picture: NDArray[Any], matrix: NDArray[np.float64]) -> NDArray[Any]:
    return cv2.warpAffine(
        picture,
        matrix,
        (picture.shape[1], picture.shape[0]),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )


@dataclass(frozen=True)
class _Job:
    """One photograph and all files that come from it."""

    source: str
    label: str
    labels: tuple[str, ...]
    seed: int
    laboratory: int
    test: bool
    copies: tuple[tuple[str, int], ...]  # path and seed of each copy
    simple: str  # path of the reduced photograph, "" unless on the test side

    @property
    def photograph(self) -> str:
        return f"photographs/{self.source}.jpg"


def _plan(photographs: int, copies: int, seed: int, classes: Sequence[str]) -> list[_Job]:
    """Return what is to be drawn; a pure function of its arguments."""
    _check_labels(classes)
    counts = [photographs // len(classes) + (i < photographs % len(classes)) for i in range(len(classes))]
    if len(set(classes)) != len(classes) or min(counts) < 3:
        raise DataError(
            f"{photographs} drawn photographs do not suffice for the classes {', '.join(classes)}",
            "ask for at least 3 photographs a class, each class named once",
        )
    rng = np.random.default_rng([seed, _PLAN])
    laboratories = rng.integers(0, 2**31 - 1, max(4, photographs // 10))
    # a photograph's number must not tell its class, nor its class the laboratory
    numbers = iter(rng.permutation(photographs))
    drafts: list[tuple[int, str, bool, int]] = []
    for label, count in zip(classes, counts, strict=True):
        test = max(2, round(TEST_FRACTION * count))
        offset = int(rng.integers(len(laboratories)))
        for k in range(count):
            lab = int(laboratories[(offset + k) % len(laboratories)])
            drafts.append((int(next(numbers)), label, k < test, lab))
    names = _copy_names(rng, drafts, copies)
    jobs = []
    for number, label, test, lab in sorted(drafts):
        twice = rng.uniform() < 0.04
        simple = f"TEST_SIMPLE/{label.upper()}/{names[number][0]}.jpg" if test else ""
        side = "TEST" if test else "TRAIN"
        job = _Job(
            source=f"field_{number:04d}",
            label=label,
            labels=(label, label) if twice else (label,),
            seed=int(rng.integers(2**31)),
            laboratory=lab,
            test=test,
            copies=tuple(
                (f"{side}/{label.upper()}/{name}.jpg", int(rng.integers(2**31))) for name in names[number][1:]
            ),
            simple=simple,
        )
        jobs.append(job)
    return jobs


def _copy_names(
    rng: np.random.Generator, drafts: list[tuple[int, str, bool, int]], copies: int
) -> dict[int, list[str]]:
    """Return ``copies + 1`` names for each photograph, unique in a folder, that tell nothing of it."""
    names: dict[int, list[str]] = {number: [] for number, *_ in drafts}
    folders = sorted({(label, test) for _, label, test, _ in drafts})
    for label, test in folders:
        members = [n for n, kind, side, _ in drafts if (kind, side) == (label, test)]
        order = rng.permutation(np.repeat(members, copies + 1))
        for position, number in enumerate(order):
            names[int(number)].append(f"_{position}_{int(rng.integers(10_000)):04d}")
    return names


def _draw_job(job: _Job, folder: str) -> None:
    """Write one photograph, its copies and, last, the record that stands for them all."""
    cv2.setNumThreads(1)
    root = Path(folder)
    data, slide = _photograph(job.seed, job.labels, job.laboratory, (480, 640))
    rgb = optics.decode_jpeg(data)
    small = reduce_photograph(rgb)
    instance = cv2.resize(slide.instance, COPY_SIZE[::-1], interpolation=cv2.INTER_NEAREST)
    files = [(job.photograph, "photograph", data, slide.boxes, rgb.shape)]
    if job.simple:
        files.append(
            (job.simple, "test_simple", encode_copy(small), _boxes(instance, job.labels), small.shape)
        )
    for path, seed in job.copies:
        matrix = _copy_matrix(seed, COPY_SIZE)
        boxes = _boxes(_warp(instance.astype(np.float32), matrix), job.labels)
        copied = encode_copy(_warp(small, matrix))
        files.append((path, "test" if job.test else "train", copied, boxes, small.shape))
    rows, all_boxes = [], {}
    for path, split, content, boxes, shape in files:
        with atomic_path(root / path) as temporary:
            temporary.write_bytes(content)
        all_boxes[path] = [asdict(box) for box in boxes]
        rows.append(
            {
                "path": path,
                "dataset": "synthetic",
                "label": job.label,
                "source": job.source,
                "split": split,
                "sha256": sha256_file(root / path),
                "width": shape[1],
                "height": shape[0],
                "status": "ok",
            }
        )
    write_json(_record(root, job), {"rows": rows, "boxes": all_boxes})


def encode_copy(rgb: NDArray[Any]) -> bytes:
    """Return a picture as the bytes of a JPEG file, of the quality of the public set's copies."""
    return optics.encode_jpeg(np.asarray(rgb, np.uint8), _COPY_QUALITY)


def _boxes(instance: NDArray[Any], labels: Sequence[str]) -> list[Box]:
    found = [bounds(np.asarray(instance == n, bool), label) for n, label in enumerate(labels, start=1)]
    return [box for box in found if box is not None]


def _record(root: Path, job: _Job) -> Path:
    return root / "records" / f"{job.source}.json"


def write_dataset(
    folder: Path,
    photographs: int,
    copies: int,
    seed: int,
    classes: Sequence[str] = FOUR,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Manifest:
    """Draw a whole data set into a folder, or finish one that was begun.

    The folder gets ``photographs/``, ``TRAIN/<CLASS>/``, ``TEST/<CLASS>/``,
    ``TEST_SIMPLE/<CLASS>/``, ``boxes.json`` (path to list of boxes; red cells and platelets on the
    photographs alone) and, last of all, ``manifest.csv``. A quarter of the photographs of each
    class, and at least two, are on the test side with all their copies.

    Parameters
    ----------
    folder : Path
        Used for one set of arguments alone.
    photographs : int
        In total, at least 3 a class.
    copies : int
        Augmented copies a photograph.
    seed : int
    classes : sequence of str
    progress : callable, optional
        Called with the number of photographs done and the total.
    workers : int, optional
        Processes; all cores if not given. The files do not depend on it.

    Returns
    -------
    Manifest
        Paths relative to ``folder``; ``source`` is the photograph of each file.

    Raises
    ------
    DataError
        If there are too few photographs or a class is unknown.
    HematoVisionError
        If the folder can't be written.
    """
    folder = Path(folder)
    jobs = _plan(photographs, copies, seed, classes)
    if (folder / "manifest.csv").is_file():
        return read_manifest(folder / "manifest.csv")
    with _alone(folder):
        if (folder / "manifest.csv").is_file():  # another process has just finished it
            return read_manifest(folder / "manifest.csv")
        _sweep(folder)
        _draw_all(jobs, folder, progress, workers)
        records = [read_json(_record(folder, job)) for job in jobs]
        write_json(folder / "boxes.json", {p: b for record in records for p, b in record["boxes"].items()})
        manifest = check_manifest(pd.DataFrame([row for record in records for row in record["rows"]]))
        write_manifest(manifest, folder / "manifest.csv")
        shutil.rmtree(folder / "records", ignore_errors=True)
    return manifest


def read(
    cache: Path,
    photographs: int,
    copies: int,
    seed: int,
    classes: Sequence[str] = FOUR,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, Path]:
    """Return the drawn set of these arguments and its folder, drawing it if it is not there.

    Parameters
    ----------
    cache : Path
        The set lies in ``cache/synthetic/<key>/``; the key covers the arguments and
        `DRAWING_VERSION`.
    photographs, copies, seed, classes, progress
        As for `write_dataset`.

    Returns
    -------
    manifest : Manifest
        Paths relative to the folder.
    folder : Path
    """
    key = content_key("synthetic", DRAWING_VERSION, photographs, copies, seed, list(classes))
    folder = Path(cache) / "synthetic" / key
    return write_dataset(folder, photographs, copies, seed, classes, progress), folder


def _draw_all(
    jobs: list[_Job], folder: Path, progress: Callable[[int, int], None] | None, workers: int | None
) -> None:
    """Draw what has no record yet."""
    left = [job for job in jobs if not _record(folder, job).is_file()]
    done = len(jobs) - len(left)
    for _ in _drawn(left, str(folder), min(workers or os.cpu_count() or 1, len(left))):
        done += 1
        if progress is not None:
            progress(done, len(jobs))


def _drawn(jobs: list[_Job], folder: str, workers: int) -> Iterator[None]:
    """Yield once for each photograph drawn, by a pool of processes where one can be had."""
    left = list(jobs)
    if workers > 1 and not multiprocessing.current_process().daemon:
        context = multiprocessing.get_context("spawn")
        # a script without a main guard can't be spawned from: then what is left is drawn here
        with (
            contextlib.suppress(BrokenProcessPool),
            ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool,
        ):
            futures = {pool.submit(_draw_job, job, folder): job for job in jobs}
            try:
                for future in as_completed(futures):
                    future.result()
                    left.remove(futures[future])
                    yield
            finally:  # after an error (a full disk) or an interrupt, begin nothing more
                pool.shutdown(wait=True, cancel_futures=True)
    for job in left:
        _draw_job(job, folder)
        yield


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for leftover in (*folder.glob(".*.*"), *folder.glob("*/.*.*"), *folder.glob("*/*/.*.*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that draw the same set; a killed holder lets go."""
    try:
        import fcntl
    except ImportError:  # Windows: a second drawer then does the same work with the same result
        yield
        return
    lock = folder.parent / f".{folder.name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "w")  # noqa: SIM115 - closed below, after the work
    except OSError as error:
        raise explain_os_error(error, folder) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
