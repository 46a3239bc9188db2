"""Reader of anybody's own images: one folder a class, named after it.

::

    DIR/neutrophil/*.png
    DIR/Lymphocytes/slide7/*.jpg
    DIR/sources.csv                optional

``sources.csv`` says which images belong together, because they show the same field, slide or patient:
two columns ``path,source``, paths relative to ``DIR``. Images of one source are never split across
training and test. Without it every image is taken to stand alone.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path, PurePosixPath

from hematovision.classes import EIGHT, parse_label
from hematovision.data.scan import Listed, Reading, is_image, name_a_few, walk_files
from hematovision.errors import DataError
from hematovision.files import explain_os_error

VERSION = 1
"""Changes whenever the same files would give another reading."""

SOURCES = "sources.csv"


def read(data: Path, root: Path) -> Reading:
    """List the images of the class folders.

    Folder names are understood in any case and with the aliases of `hematovision.classes`; folders
    within a class folder are searched too. Hidden files and files without the extension of an image
    are left out, the latter with a note. The source of an image that ``sources.csv`` does not name is
    its path without the extension: two classes may both hold a ``1.png``.

    Parameters
    ----------
    data, root : Path
        Both the folder that holds the class folders.

    Raises
    ------
    DataError
        If there is no image, only one class, a folder named after no class, or ``sources.csv`` is
        malformed or names a file that is not there.
    """
    images, others = _list_files(root)
    _check_folders(root, sorted({path.partition("/")[0] for path in images}))
    sources = _read_sources(root / SOURCES, set(images))
    listed = []
    for path in images:
        source = sources.get(path, str(PurePosixPath(path).with_suffix("")))
        full = (root / path).relative_to(data).as_posix()
        listed.append(Listed(full, parse_label(path.partition("/")[0]), source))
    counts = Counter(image.label for image in listed)
    if len(counts) == 1:
        raise DataError(
            f"{root} holds images of one class only ({next(iter(counts))})",
            "a classifier needs at least two class folders with images",
        )
    notes = (f"{len(others)} files are no images and were left out: {name_a_few(others)}",) if others else ()
    return Reading(tuple(listed), notes=notes)


def _list_files(root: Path) -> tuple[list[str], list[str]]:
    """Return the images within folders, and everything else that was passed over."""
    images, others, loose = [], [], []
    for path, _ in walk_files(root):
        if path == SOURCES:
            continue
        if not is_image(path):
            others.append(path)
        elif "/" not in path:
            loose.append(path)
        else:
            images.append(path)
    if not images:
        what = f"{root} holds {len(loose)} images but no class folder" if loose else f"{root} holds no image"
        raise DataError(what, f"put images into folders named after their class ({', '.join(EIGHT)})")
    return images, others + loose


def _check_folders(root: Path, names: list[str]) -> None:
    unknown = []
    for name in names:
        try:
            parse_label(name)
        except DataError:
            unknown.append(f"'{name}'")
    if unknown:
        raise DataError(
            f"{root} holds folders that are named after no class: {name_a_few(unknown, 8)}",
            f"rename or remove them; known classes are {', '.join(EIGHT)}",
        )


def _read_sources(path: Path, images: set[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    remedy = "write two columns, path,source, with paths relative to its folder"
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = csv.DictReader(handle, strict=True, restval="")
            if not {"path", "source"} <= set(rows.fieldnames or ()):
                raise DataError(f"{path} lacks the columns path and source", remedy)
            sources: dict[str, str] = {}
            for row in rows:
                name, source = row["path"].strip().replace("\\", "/"), row["source"].strip()
                where = f"{path}, line {rows.line_num}"
                if name not in images:
                    raise DataError(f"{where} names '{name}', which is no image here", remedy)
                if not source:
                    raise DataError(f"{where} names no source for '{name}'", remedy)
                if sources.setdefault(name, source) != source:
                    raise DataError(f"{where} names '{name}' again, with another source", remedy)
            return sources
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable CSV file ({error})", remedy) from error
