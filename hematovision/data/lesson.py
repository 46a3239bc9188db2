"""The Kaggle photographs alone, with augmented copies of our own making: the whole story for a lecture.

Of the public set only the 368 photographs are needed (8 MB). Copies are made of them as the set's
authors made theirs, so that the leak can be shown on real cells; here the photograph behind each copy
is known, and a quarter of the photographs of each class is the test side.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hematovision.classes import FOUR
from hematovision.data import blood_cells
from hematovision.data.manifest import Manifest, check_manifest, read_manifest, write_manifest
from hematovision.data.synthetic import copy_of, encode_copy, reduce_photograph
from hematovision.errors import DataError
from hematovision.files import atomic_path, content_key, sha256_file, write_json
from hematovision.vision.image import read_image

VERSION = 1
TEST_FRACTION = 0.25


@dataclass(frozen=True)
class _Photograph:
    """One photograph with the copies that are made of it: their names in a folder, and seeds."""

    file: Path
    label: str
    test: bool
    copies: tuple[tuple[str, int], ...]


def read(
    root: Path,
    cache: Path,
    copies: int,
    seed: int,
    classes: Sequence[str] = FOUR,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, Path]:
    """Return the set of these arguments and its folder, making the copies if they are not there.

    Parameters
    ----------
    root : Path
        That holds ``JPEGImages/`` and ``labels.csv``.
    cache : Path
        The set lies in ``cache/lesson/<key>/``.
    copies : int
        Of each photograph.
    seed : int
    classes : sequence of str
        Photographs with another label, with none or with several are left out.
    progress : callable, optional
        Called with (done, total) photographs.

    Returns
    -------
    manifest : Manifest
        Paths relative to the folder.
    folder : Path

    Raises
    ------
    DataError
        If photographs or labels are missing.
    """
    photographs = _find(root, classes)
    plan = _plan(photographs, copies, seed)
    content = [(p.file.name, sha256_file(p.file), p.label, p.test, p.copies) for p in plan]
    folder = Path(cache) / "lesson" / content_key("lesson", VERSION, content)
    if not (folder / "manifest.csv").is_file():
        with atomic_path(folder) as draft:
            _make(plan, root, draft, progress)
    return read_manifest(folder / "manifest.csv"), folder


def _find(root: Path, classes: Sequence[str]) -> list[tuple[Path, str]]:
    folder, labels = root / "JPEGImages", blood_cells.read_labels(root / "labels.csv")
    listed = blood_cells.list_photographs(folder, labels, root)
    found = [(root / one.path, one.label) for one in listed if one.label in classes]
    for name in classes:
        if sum(label == name for _, label in found) < 4:
            raise DataError(f"{folder} has too few photographs of a {name}", "fetch blood-cells")
    return found


def _plan(photographs: list[tuple[Path, str]], copies: int, seed: int) -> list[_Photograph]:
    rng = np.random.default_rng([seed, VERSION])
    planned = []
    for name in sorted({label for _, label in photographs}):
        members = [file for file, label in photographs if label == name]
        tested = set(rng.permutation(len(members))[: max(1, round(TEST_FRACTION * len(members)))].tolist())
        # names tell nothing of the photograph, as in the public set
        numbers = iter(rng.permutation(len(members) * copies).tolist())
        for i, file in enumerate(members):
            made = tuple(
                (f"_{next(numbers)}_{int(rng.integers(10_000)):04d}.jpg", int(rng.integers(2**31)))
                for _ in range(copies)
            )
            planned.append(_Photograph(file, name, i in tested, made))
    return planned


def _make(
    plan: list[_Photograph], root: Path, folder: Path, progress: Callable[[int, int], None] | None
) -> None:
    annotated, _ = blood_cells.read_boxes(root / "JPEGImages", root)
    rows: list[dict[str, Any]] = []
    boxes: dict[str, list[dict[str, Any]]] = {}
    for done, one in enumerate(plan, start=1):
        rgb = read_image(one.file, name=one.file.name)
        kind = one.label.upper()
        kept = f"photographs/{one.file.name}"
        (folder / kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.file, folder / kept)
        rows.append(_row(folder, kept, one, "photograph", rgb.shape))
        boxes[kept] = [asdict(box) for box in annotated.get(one.file.relative_to(root).as_posix(), ())]
        side = "TEST" if one.test else "TRAIN"
        files = [(f"{side}/{kind}/{name}", copy_of(rgb, seed)) for name, seed in one.copies]
        if one.test:
            files.append((f"TEST_SIMPLE/{kind}/{one.file.name}", reduce_photograph(rgb)))
        for path, picture in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(encode_copy(picture))
            split = path.split("/")[0].lower()
            rows.append(_row(folder, path, one, split, picture.shape))
        if progress is not None:
            progress(done, len(plan))
    write_json(folder / "boxes.json", boxes)
    write_manifest(check_manifest(pd.DataFrame(rows)), folder / "manifest.csv")


def _row(folder: Path, path: str, one: _Photograph, split: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "path": path,
        "dataset": "photographs",
        "label": one.label,
        "source": one.file.stem,
        "split": split,
        "sha256": sha256_file(folder / path),
        "width": shape[1],
        "height": shape[0],
        "status": "ok",
    }
