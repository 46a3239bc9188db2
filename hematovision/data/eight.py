"""Cells of all eight classes: the Barcelona set (PBC), alone or joined by the Kaggle photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hematovision.classes import EIGHT
from hematovision.config import cache_folder
from hematovision.data.audit import linked_groups, near_duplicates
from hematovision.data.catalog import load_set
from hematovision.data.cells import CellStore, cut_cells, join_stores
from hematovision.data.splits import Split, grouped_split
from hematovision.data.study import Study

PBC_SEED = 2026
"""Of the split of PBC. It never changes: a cell that is held out once stays held out."""
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.1
CELL_SIZE = 128
CROP_MARGIN = 0.15


@dataclass(frozen=True)
class EightClasses:
    """Cells of the eight classes with the three sides of their split.

    Attributes
    ----------
    cells : CellStore
    split : Split
        ``test`` is held out from everything but the last evaluation.
    labels : float32 array of shape (rows, 8), one-hot in the order of `classes.EIGHT`
    groups : array of str, shape (rows,)
        Images of one photograph, and copies of one another, share one.
    copies : int
        Images of a group that an epoch sees; 0 for all of them.
    """

    cells: CellStore
    split: Split
    labels: NDArray[np.float32]
    groups: NDArray[np.str_]
    copies: int = 0

    def rows(self, side: str) -> NDArray[np.int64]:
        """Return the rows of a side: ``train``, ``validation`` or ``test``."""
        return self.cells.rows_of(getattr(self.split, side))


def _one_hot(cells: CellStore) -> NDArray[np.float32]:
    labels = cells.table["label"].to_numpy(str)
    return (labels[:, None] == np.asarray(EIGHT)[None]).astype(np.float32)


def read_eight_classes(
    data: Path | str | None = None,
    *,
    size: int = CELL_SIZE,
    margin: float = CROP_MARGIN,
    progress: Callable[[int, int], None] | None = None,
) -> EightClasses:
    """Read PBC, split it by groups of near-duplicates, and cut out its cells.

    A fifth of each class is the test side, a tenth of the rest the validation side.

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
    cells = cut_cells(manifest, images.root, cache_folder(), size=size, margin=margin, progress=progress)
    return EightClasses(cells, split, _one_hot(cells), groups.reindex(cells.table["path"]).to_numpy(str))


def join_photographs(eight: EightClasses, study: Study, *, margin: float, copies: int) -> EightClasses:
    """Add the official training and validation photographs of a study of four classes.

    The study's test images stay out: they are in none of the three sides.

    Parameters
    ----------
    eight : EightClasses
    study : Study
        With its official split.
    margin : float
        Of the crops.
    copies : int
        Copies of a photograph that an epoch sees, and that validate.
    """
    official = study.split("official")
    wanted = {*official.train, *official.validation}
    rows = study.images()
    rows = rows[rows["path"].isin(wanted)].reset_index(drop=True)
    mine = cut_cells(rows, study.root, cache_folder(), size=eight.cells.size, margin=margin)
    both = join_stores(eight.cells, mine)
    groups = np.concatenate([eight.groups, study.groups_of(list(mine.table["path"]))])
    split = dataclasses.replace(
        eight.split,
        name="eight",
        train=eight.split.train + official.train,
        validation=eight.split.validation + official.validation,
    )
    return EightClasses(both, split, _one_hot(both), groups, copies)
