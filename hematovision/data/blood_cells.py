"""Reader of the Kaggle set "Blood Cell Images" (BCCD): photographs, and augmented copies of them.

Below ``blood-cells/``, as Kaggle's archive unpacks::

    dataset2-master/dataset2-master/images/{TRAIN,TEST,TEST_SIMPLE}/CLASS/*.jpeg
    dataset-master/dataset-master/{JPEGImages,Annotations,labels.csv}

The doubled folders may also stand once.
"""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from pathlib import Path

from hematovision.classes import parse_label
from hematovision.data.scan import Listed, Reading, folder_label, is_image, name_a_few
from hematovision.errors import DataError
from hematovision.files import explain_os_error
from hematovision.vision.field import Box

VERSION = 1
"""Changes whenever the same files would give another reading."""

_SIDES = {"TRAIN": "train", "TEST": "test", "TEST_SIMPLE": "test_simple"}
_REMEDY = "fetch the set again with 'hematovision fetch blood-cells', or name another folder with --data"
_LARGEST_XML = 1 << 20  # bytes; the largest annotation of the set has 12 kB


def read(data: Path, root: Path) -> Reading:
    """List the copies, the photographs with their labels, and the annotated boxes.

    A photograph with no label or several in ``labels.csv`` (even several of one class: it shows
    several cells) gets the label ``""``. Copies get the source ``""``: the number in their file name
    is not the photograph.

    Parameters
    ----------
    data : Path
        The data folder, to which the paths are relative.
    root : Path
        ``data / "blood-cells"``.

    Raises
    ------
    DataError
        If a folder or ``labels.csv`` is missing, or ``labels.csv`` is malformed. A damaged annotation
        is left out and noted: boxes are an extra, without which every image can still be used.
    """
    images = _subfolder(root, "dataset2-master", "images")
    photographs = _subfolder(root, "dataset-master", "JPEGImages")
    labels = read_labels(photographs.parent / "labels.csv")
    listed = [image for side in _SIDES for image in _list_copies(images / side, side, data)]
    listed += list_photographs(photographs, labels, data)
    boxes, notes = read_boxes(photographs, data)
    return Reading(tuple(listed), boxes, notes)


def _subfolder(root: Path, archive: str, inner: str) -> Path:
    for folder in (root / archive / archive / inner, root / archive / inner):
        if folder.is_dir():
            return folder
    raise DataError(f"{root / archive / archive / inner} is missing", _REMEDY)


def _list_copies(folder: Path, side: str, data: Path) -> list[Listed]:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing", _REMEDY)
    listed = []
    for class_folder in _entries(folder):
        if not class_folder.is_dir():
            continue
        label = folder_label(class_folder)
        listed += [
            Listed(file.relative_to(data).as_posix(), label, "", _SIDES[side])
            for file in _entries(class_folder)
            if is_image(file.name)
        ]
    if not listed:
        raise DataError(f"{folder} holds no image", _REMEDY)
    return listed


def list_photographs(folder: Path, labels: dict[int, tuple[str, ...]], data: Path) -> list[Listed]:
    """List the photographs of a folder with their labels, ``""`` where there is not exactly one.

    Parameters
    ----------
    folder : Path
        ``JPEGImages``.
    labels : dict
        From `read_labels`.
    data : Path
        What the paths are relative to.
    """
    listed = []
    for file in _entries(folder):
        if not is_image(file.name):
            continue
        digits = file.stem.rpartition("_")[2]
        found = labels.get(int(digits), ()) if digits.isdecimal() else ()
        label = found[0] if len(found) == 1 else ""
        listed.append(Listed(file.relative_to(data).as_posix(), label, file.stem, "photograph"))
    if not listed:
        raise DataError(f"{folder} holds no photograph", _REMEDY)
    return listed


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise explain_os_error(error, folder) from error


def read_labels(path: Path) -> dict[int, tuple[str, ...]]:
    """Read ``labels.csv``.

    Returns
    -------
    dict of int to tuple of str
        Number of the photograph to the labels written for it, in standard names: none, one, or
        several (``"NEUTROPHIL, EOSINOPHIL"``). Rows that name one photograph twice are joined.

    Raises
    ------
    DataError
        If the file is missing, is not UTF-8 text, lacks a column ``Image`` or ``Category``, or holds
        a line whose number or class can't be understood (naming the line).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", _REMEDY) from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", _REMEDY) from error
    try:
        return _parse_labels(text, path)
    except csv.Error as error:
        raise DataError(f"{path} is not a readable CSV file ({error})", _REMEDY) from error


def _parse_labels(text: str, path: Path) -> dict[int, tuple[str, ...]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip().lower() for name in next(rows, [])]
    if "image" not in header or "category" not in header:
        raise DataError(f"{path} lacks the columns Image and Category", _REMEDY)
    number_at, label_at = header.index("image"), header.index("category")
    labels: dict[int, tuple[str, ...]] = {}
    for row in rows:
        if not any(value.strip() for value in row):
            continue
        where = f"{path}, line {rows.line_num}"
        if len(row) <= max(number_at, label_at) or not row[number_at].strip().isdecimal():
            raise DataError(f"{where} has no image number", _REMEDY)
        number = int(row[number_at])
        try:
            found = tuple(parse_label(word) for word in row[label_at].split(",") if word.strip())
        except DataError as error:
            raise DataError(f"{where}: {error.what}", error.remedy) from error
        labels[number] = labels.get(number, ()) + found
    if not labels:
        raise DataError(f"{path} holds no row", _REMEDY)
    return labels


def read_boxes(photographs: Path, data: Path) -> tuple[dict[str, tuple[Box, ...]], tuple[str, ...]]:
    """Return the annotated boxes of the photographs of a folder by path, and what could not be read."""
    folder = photographs.parent / "Annotations"
    if not folder.is_dir():
        return {}, (f"{folder} is missing: no boxes are known",)
    names = {file.stem: file for file in _entries(photographs) if is_image(file.name)}
    boxes, damaged = {}, []
    for file in _entries(folder):
        if file.suffix.lower() != ".xml" or file.stem not in names:
            continue
        try:
            boxes[names[file.stem].relative_to(data).as_posix()] = read_annotation(file)
        except DataError:
            damaged.append(file.name)
    if damaged:
        return boxes, (f"{len(damaged)} annotations cannot be read and were left out: {name_a_few(damaged)}",)
    return boxes, ()


class _SafeBuilder(ET.TreeBuilder):
    """Refuses a document type: nothing here needs one, and entities that expand into gigabytes do."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ET.ParseError(f"a document type ({name}, {pubid}, {system}) is not allowed")


def read_annotation(path: Path) -> tuple[Box, ...]:
    """Read the boxes of one Pascal VOC file.

    Corners count pixels from 1 and belong to the box (Everingham and Winn 2012, VOC development
    kit), so ``xmin=1, xmax=10`` are the columns 0 to 9. A box beyond the stated size of the picture is
    clipped to it; ``cut`` is set where the file says ``truncated`` or a side lies on the edge.

    Raises
    ------
    DataError
        If the file is not such XML, is larger than 1 MiB, or has a document type.
    """
    try:
        content = path.read_bytes()
        if len(content) > _LARGEST_XML:
            raise DataError(f"{path} is too large for an annotation", "remove it")
        tree = ET.fromstring(content, parser=ET.XMLParser(target=_SafeBuilder()))
        width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
        boxes = (_read_object(item, width, height) for item in tree.iter("object"))
        return tuple(box for box in boxes if box is not None)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", _REMEDY) from error
    except (ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} is not a Pascal VOC annotation ({error})", _REMEDY) from error


def _read_object(item: ET.Element, width: int, height: int) -> Box | None:
    left, top, right, bottom = (
        round(float(item.findtext(f"bndbox/{corner}", ""))) for corner in ("xmin", "ymin", "xmax", "ymax")
    )
    left, top, right, bottom = max(left - 1, 0), max(top - 1, 0), min(right, width), min(bottom, height)
    if right <= left or bottom <= top:
        return None
    on_edge = left == 0 or top == 0 or right == width or bottom == height
    truncated = item.findtext("truncated", "0").strip() == "1"
    name = item.findtext("name", "").strip()
    return Box(left, top, right - left, bottom - top, name, cut=truncated or on_edge)
