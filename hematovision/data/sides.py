"""Labelled cells with the three sides of a split: of PBC, of a study, or of both joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.classes import EIGHT
from hematovision.config import cache_folder
from hematovision.data.audit import linked_groups, near_duplicates
from hematovision.data.catalog import load_set
from hematovision.data.cells import CellStore, cut_cells, join_stores
from hematovision.data.splits import Split, grouped_split, prove_disjoint
from hematovision.data.study import Study
from hematovision.errors import DataError

PBC_SEED = 2026
"""Of the split of PBC. It never changes: a cell that is held out once stays held out."""
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.1
CELL_SIZE = 128
CROP_MARGIN = 0.15


@dataclass(frozen=True)
class Sides:
    """Cells with labels, and who may see which.

    Attributes
    ----------
    cells : CellStore
    split : Split
        ``test`` is held out from everything but the last evaluation.
    classes : tuple of str
    labels : float32 array of shape (rows, C), one-hot in the order of ``classes``
    groups : array of str, shape (rows,)
        Images of one photograph, and copies of one another, share one.
    copies : int
        Images of a group that an epoch sees; 0 for all of them.
    """

    cells: CellStore
    split: Split
    classes: tuple[str, ...]
    labels: NDArray[np.float32]
    groups: NDArray[np.str_]
    copies: int = 0

    def rows(self, side: str) -> NDArray[np.int64]:
        """Return the rows of a side: ``train``, ``validation``, ``test`` or one of the split's extra ones."""
        return self.cells.rows_of(self.split.sides()[side])

    def counts(self) -> pd.DataFrame:
        """Return images and groups by set, class and side."""
        table = self.cells.table
        rows = [
            (table["dataset"].iloc[row], table["label"].iloc[row], side, self.groups[row])
            for side in ("train", "validation", "test")
            for row in self.rows(side)
        ]
        frame = pd.DataFrame(rows, columns=["dataset", "label", "side", "group"])
        by = ["dataset", "label", "side"]
        counted = frame.groupby(by, sort=False)["group"].agg(images="size", photographs="nunique")
        return counted.reset_index().pivot_table(
            index=by[:2], columns="side", values=["images", "photographs"], fill_value=0, sort=False
        )


def _one_hot(cells: CellStore, classes: Sequence[str]) -> NDArray[np.float32]:
    labels = cells.table["label"].to_numpy(str)
    return (labels[:, None] == np.asarray(classes)[None]).astype(np.float32)


def read_pbc_sides(
    data: Path | str | None = None,
    *,
    size: int = CELL_SIZE,
    margin: float = CROP_MARGIN,
    progress: Callable[[int, int], None] | None = None,
) -> Sides:
    """Read PBC, split it by groups of near-duplicates, and cut out its cells.

    A fifth of each class is the test side, a tenth of the rest the validation side. The sides are
    proved disjoint.

    Parameters
    ----------
    data : path, optional
        The folder that holds ``pbc/``.
    size, margin : int, float
        Of the crops.
    progress : callable, optional
        Called with (done, total) images.

    Raises
    ------
    DataError
        If the set is not there, or lacks a class.
    """
    images = load_set("pbc", data, progress=progress)
    manifest = images.manifest[images.manifest["status"] == "ok"].reset_index(drop=True)
    pairs = near_duplicates(manifest, images.root, cache_folder())
    groups = linked_groups(manifest, pairs)
    split = grouped_split(manifest, groups, PBC_SEED, TEST_FRACTION, VALIDATION_FRACTION)
    prove_disjoint(split, manifest, pairs)
    cells = cut_cells(manifest, images.root, cache_folder(), size=size, margin=margin, progress=progress)
    linked = groups.reindex(cells.table["path"]).to_numpy(str)
    return Sides(cells, split, EIGHT, _one_hot(cells, EIGHT), linked)


def study_sides(study: Study, classes: Sequence[str], *, size: int, margin: float, copies: int) -> Sides:
    """Return a study's own cells under its official split; extra sets are left out.

    Parameters
    ----------
    study : Study
    classes : sequence of str
    size, margin : int, float
        Of the crops.
    copies : int
        Copies of a photograph that an epoch sees, and that validate.
    """
    split = study.split("official")
    wanted = {path for side in split.sides().values() for path in side}
    rows = study.images()
    rows = rows[rows["path"].isin(wanted)].reset_index(drop=True)
    cells = cut_cells(rows, study.root, cache_folder(), size=size, margin=margin)
    groups = study.groups_of(list(cells.table["path"]))
    return Sides(cells, split, tuple(classes), _one_hot(cells, classes), groups, copies)


def join_sides(first: Sides, second: Sides) -> Sides:
    """Return the training and validation sides of both, for one model that learns the classes of the first.

    Neither's test side comes along.

    Raises
    ------
    DataError
        If the second has classes that the first has not.
    """
    if unknown := sorted(set(second.classes) - set(first.classes)):
        raise DataError(f"'{unknown[0]}' is no class of the set joined to", "join it the other way round")
    cells = join_stores(first.cells, second.cells)
    split = Split(
        "joined",
        first.split.train + second.split.train,
        first.split.validation + second.split.validation,
        (),
        note="both sets; their test sides are left out",
    )
    groups = np.concatenate([first.groups, second.groups])
    labels = _one_hot(cells, first.classes)
    copies = max(first.copies, second.copies)
    return dataclasses.replace(first, cells=cells, split=split, labels=labels, groups=groups, copies=copies)
