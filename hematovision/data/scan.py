"""What every reader shares: listing files, hashing and decoding them, marking duplicates."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pandas as pd

from hematovision.classes import parse_label
from hematovision.errors import DataError, HematoVisionError
from hematovision.files import content_key, explain_os_error, sha256_file
from hematovision.vision.field import Box
from hematovision.vision.image import probe_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
"""Lower-case extensions of the files that are taken for images; what is inside is looked at later."""

Progress = Callable[[int, int], None]
"""Called with the number of files done and the total."""

_CHUNK = 64  # files in flight: bounds memory, keeps the threads busy
_IN_MEMORY = 1 << 25  # bytes (32 MiB): a file up to this size is read once for both hash and pixels


@dataclass(frozen=True)
class Listed:
    """One image as a reader lists it, before it is opened.

    Attributes
    ----------
    path : str
        Relative to the data folder, with forward slashes.
    label, source, split : str
        As in the manifest.
    """

    path: str
    label: str
    source: str
    split: str = ""


@dataclass(frozen=True)
class Reading:
    """What a reader hands back.

    Attributes
    ----------
    images : tuple of Listed
    boxes : dict of str to tuple of Box
        Path to annotated boxes.
    notes : tuple of str
        Things a user should be told.
    """

    images: tuple[Listed, ...]
    boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def walk_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each file below a folder as (relative path, status), in the order of the paths.

    Hidden files and folders are left out; links are followed, once each.

    Raises
    ------
    HematoVisionError
        If a folder can't be read.
    """
    yield from sorted(_walk(folder, "", {os.path.realpath(folder)}), key=lambda entry: entry[0])


def _walk(folder: Path, prefix: str, seen: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise explain_os_error(error, folder) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if real not in seen:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen | {real})
            continue
        try:
            yield prefix + entry.name, entry.stat()
        except OSError:  # a dangling link: there is no file
            continue


def fingerprint(folder: Path) -> str:
    """Return a key of the names, sizes and times of all files below a folder, without opening any."""
    return content_key([(path, s.st_size, s.st_mtime_ns) for path, s in walk_files(folder)])


def is_image(path: str) -> bool:
    """Whether the file's extension is that of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def folder_label(folder: Path) -> str:
    """Return the class that a folder is named after.

    Raises
    ------
    DataError
        If no class is called so, naming the folder.
    """
    try:
        return parse_label(folder.name)
    except DataError as error:
        raise DataError(
            f"{folder} is named after no class", f"rename or remove it; {error.remedy}"
        ) from error


def inspect_images(
    images: Sequence[Listed], dataset: str, data: Path, progress: Progress | None = None
) -> pd.DataFrame:
    """Hash and decode every listed file and return the rows of a manifest.

    Parameters
    ----------
    images : sequence of Listed
        An empty label gives the status ``unlabelled``.
    dataset : str
        Name in the catalogue.
    data : Path
        The folder that the paths are relative to.
    progress : callable, optional
        Called with (done, total) files.

    Returns
    -------
    DataFrame
        With the columns of the manifest; ``width`` and ``height`` are 0 and ``status`` says so where
        a file can't be decoded, ``sha256`` is empty where it can't even be read.
    """
    rows: list[tuple[str | int, ...]] = []
    files = ((data / image.path, image.path) for image in images)
    # threads: hashing and decoding both leave the interpreter lock
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while chunk := list(islice(files, _CHUNK)):
            for sha256, width, height, status in pool.map(_inspect, chunk):
                image = images[len(rows)]
                if status == "ok" and not image.label:
                    status = "unlabelled"
                facts = (image.path, dataset, image.label, image.source, image.split)
                rows.append((*facts, sha256, width, height, status))
            if progress:
                progress(len(rows), len(images))
    columns = ("path", "dataset", "label", "source", "split", "sha256", "width", "height", "status")
    return pd.DataFrame(rows, columns=list(columns))


def _inspect(file: tuple[Path, str]) -> tuple[str, int, int, str]:
    path, name = file
    try:
        if path.stat().st_size > _IN_MEMORY:
            info = probe_image(path, verify=True, name=name)
            return sha256_file(path), info.width, info.height, info.status
        content = path.read_bytes()
    except (OSError, HematoVisionError):
        return "", 0, 0, "unreadable"
    info = probe_image(content, verify=True, name=name)
    return hashlib.sha256(content).hexdigest(), info.width, info.height, info.status


def mark_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """Mark files of the same bytes in the column ``status``.

    Where all copies carry one label, the first path stays ``ok`` and the later ones become
    ``duplicate``. Where labels differ, every copy becomes ``conflict``: none of them can be trusted.
    Rows that are not ``ok`` (undecodable or unlabelled) take no part. No row is removed.
    """
    frame = frame.sort_values("path", ignore_index=True)
    usable = frame[frame["status"] == "ok"]
    labels = usable.groupby("sha256")["label"].transform("nunique")
    later = usable.duplicated("sha256")
    frame.loc[usable.index[later], "status"] = "duplicate"
    frame.loc[usable.index[labels > 1], "status"] = "conflict"
    return frame


def share_sources(frame: pd.DataFrame) -> pd.DataFrame:
    """Give files of the same bytes the source of the first of them: they are one picture."""
    frame = frame.sort_values("path", ignore_index=True)
    known = frame[(frame["sha256"] != "") & (frame["source"] != "")]
    frame.loc[known.index, "source"] = known.groupby("sha256")["source"].transform("first")
    return frame


def name_a_few(names: Iterable[str], most: int = 3) -> str:
    """Return the first names and how many more there are, for a message of one line."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
