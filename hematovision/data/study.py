"""What the notebooks of one run hand to each other: the set, its photographs, its splits, its crops.

Everything is a file under the run's artifacts, so that each notebook can be rerun alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.config import cache_folder
from hematovision.data.catalog import ImageSet
from hematovision.data.cells import CellStore, cut_cells, join_stores
from hematovision.data.manifest import Manifest, read_manifest, write_manifest
from hematovision.data.splits import Split, read_split, write_split
from hematovision.errors import DataError
from hematovision.files import read_json, write_json, write_text
from hematovision.vision.field import Box

_UNDECODABLE = ("unreadable", "truncated")
_LEFT_OUT = (*_UNDECODABLE, "unlabelled")
_PAIR_NAMES = {f"{what}_{side}": str for what in ("source", "path", "label") for side in ("a", "b")}
_NOT_WHITE = ("RBC", "Platelets", "platelet")


@dataclass(frozen=True)
class Study:
    """One image set as a run sees it.

    Attributes
    ----------
    folder : Path
        The run's artifacts.
    name : str
    root : Path
        The folder that the manifest's paths are relative to.
    manifest : Manifest
        With the photograph behind every image in ``source``.
    groups : Series
        Path -> group: photographs that are near-duplicates of each other share one. The unit of
        splits and of intervals.
    near_duplicates : DataFrame
        Pairs of photographs that look alike.
    boxes : dict of str to tuple of Box
        Annotated boxes, where there are any.
    """

    folder: Path
    name: str
    root: Path
    manifest: Manifest
    groups: pd.Series
    near_duplicates: pd.DataFrame
    boxes: dict[str, tuple[Box, ...]]

    def write(self) -> None:
        """Write everything under the artifacts; `open_study` reads it."""
        write_manifest(self.manifest, self.folder / "manifest.csv")
        write_text(self.folder / "groups.csv", self.groups.rename("group").rename_axis("path").to_csv())
        write_text(self.folder / "near_duplicates.csv", self.near_duplicates.to_csv(index=False))
        boxes = {path: [dataclasses.asdict(b) for b in found] for path, found in self.boxes.items()}
        write_json(self.folder / "boxes.json", boxes)
        # written last: its presence says that the others are complete
        write_json(self.folder / "study.json", {"name": self.name, "root": str(self.root)})

    def images(self, *splits: str) -> Manifest:
        """Return the usable, labelled rows of the given sides (all sides if none is given)."""
        rows = self.manifest[~self.manifest["status"].isin(_LEFT_OUT)]
        return rows[rows["split"].isin(splits)] if splits else rows

    def groups_of(self, paths: Iterable[str]) -> NDArray[np.str_]:
        """Return the group of each path; an image of another set is a group of its own."""
        index = pd.Index(paths)
        return self.groups.reindex(index).fillna(pd.Series(index, index=index)).to_numpy(str)

    def annotated(self) -> dict[str, tuple[Box, ...]]:
        """Return the annotated white cells of every annotated photograph, labelled or not."""
        photographs = self.manifest[self.manifest["split"] == "photograph"]
        return {
            path: tuple(b for b in self.boxes[path] if b.label not in _NOT_WHITE)
            for path in photographs.loc[~photographs["status"].isin(_UNDECODABLE), "path"]
            if path in self.boxes
        }

    def write_split(self, split: Split) -> None:
        """Write a split under its name."""
        write_split(split, self.folder / "splits" / f"{split.name}.csv")

    def split(self, name: str) -> Split:
        """Read a split that 02_preprocessing has written."""
        file = self.folder / "splits" / f"{name}.csv"
        if not file.exists():
            raise DataError(f"there is no split '{name}'", "run 02_preprocessing first")
        return read_split(file)

    def count_sides(self, splits: Iterable[Split]) -> pd.DataFrame:
        """Return images and photographs of every side, one row a split."""
        rows = [
            (split.name, side, len(paths), len(set(self.groups_of(paths))))
            for split in splits
            for side, paths in split.sides().items()
            if side not in split.extra
        ]
        table = pd.DataFrame(rows, columns=["split", "side", "images", "photographs"])
        return table.pivot_table(index="split", columns="side", values=["images", "photographs"], sort=False)

    def add_extra(self, other: ImageSet, classes: Iterable[str]) -> None:
        """Keep the usable cells of another set, of the given classes, for training alone."""
        wanted = other.manifest["label"].isin(list(classes)) & (other.manifest["status"] == "ok")
        manifest = other.manifest[wanted].reset_index(drop=True)
        write_manifest(manifest, self.folder / "extra" / f"{other.name}.csv")
        write_json(self.folder / "extra" / f"{other.name}.json", {"root": str(other.root)})

    def cells(
        self, size: int, margin: float, progress: Callable[[int, int], None] | None = None
    ) -> CellStore:
        """Return the crops of this set followed by those of the extra sets, cut on the first call.

        The photographs themselves are left out where the set is made of copies of them.
        """
        rows = self.images()
        if (rows["split"] == "train").any():
            rows = rows[rows["split"] != "photograph"]
        stores = [self._cut(rows, self.root, size, margin, progress)]
        for file in sorted((self.folder / "extra").glob("*.csv")):
            root = Path(read_json(file.with_suffix(".json"))["root"])
            stores.append(self._cut(read_manifest(file), root, size, margin, progress))
        return join_stores(*stores)

    @staticmethod
    def _cut(
        rows: Manifest, root: Path, size: int, margin: float, progress: Callable[[int, int], None] | None
    ) -> CellStore:
        return cut_cells(rows, root, cache_folder(), size=size, margin=margin, progress=progress)


def open_study(folder: Path) -> Study:
    """Read what `Study.write` wrote.

    Raises
    ------
    DataError
        If the first notebook has not run yet.
    """
    if not (folder / "study.json").exists():
        raise DataError(f"{folder} holds no study", "run 01_eda first")
    facts = read_json(folder / "study.json")
    groups = pd.read_csv(folder / "groups.csv", dtype=str, keep_default_na=False).set_index("path")["group"]
    boxes = {
        path: tuple(Box(**box) for box in found) for path, found in read_json(folder / "boxes.json").items()
    }
    return Study(
        folder,
        facts["name"],
        Path(facts["root"]),
        read_manifest(folder / "manifest.csv"),
        groups,
        # a photograph may be called 007 or NA
        pd.read_csv(folder / "near_duplicates.csv", dtype=_PAIR_NAMES, keep_default_na=False),
        boxes,
    )


def training_rows(
    study: Study, cells: CellStore, split: Split
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of the training and of the validation side.

    The crops of extra sets join the training side; they are never validated or tested on.
    """
    extra = np.flatnonzero((cells.table["dataset"] != study.name).to_numpy()).astype(np.int64)
    return np.concatenate([cells.rows_of(split.train), extra]), cells.rows_of(split.validation)
