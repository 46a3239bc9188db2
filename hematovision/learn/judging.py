"""Saved models before the test images: the one place where test sides are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hematovision.data.cells import CellStore
from hematovision.data.splits import Split
from hematovision.data.study import Study, training_rows
from hematovision.learn import recipe
from hematovision.learn.evaluation import Predictions


def predict_saved(
    study: Study,
    cells: CellStore,
    training: Mapping[str, Any],
    split: Split,
    test_sets: Mapping[str, Sequence[str]],
) -> dict[tuple[str, str], Predictions]:
    """Run the model that was trained under a split over its test sets, and keep what it says.

    Parameters
    ----------
    study : Study
    cells : CellStore
    training : mapping
        What notebook 03 left of the training; its ``recipe`` is read.
    split : Split
        The model is ``models/<backbone>-<split>.keras``.
    test_sets : mapping of str to sequence of str
        Name of a test set to its paths.

    Returns
    -------
    dict of (backbone, test set) to Predictions
        Also written to ``predictions/<backbone>-<split>-<test set>.csv``.
    """
    choices = recipe.Recipe.from_values(training["recipe"])
    model = recipe.load_model(study.folder / "models" / f"{choices.backbone}-{split.name}.keras")
    groups = study.groups_of(cells.table["path"])
    data = recipe.training_data(choices, cells, *training_rows(study, cells, split), groups.tolist())
    said = {}
    for name, paths in test_sets.items():
        predictions = recipe.predict_rows(model, data, cells.rows_of(paths), choices)
        file = f"{choices.backbone}-{split.name}-{name.split()[0].lower()}.csv"
        predictions.write(study.folder / "predictions" / file)
        said[choices.backbone, name] = predictions
    return said


def share_with_siblings(study: Study, split: Split) -> float:
    """Return the share of test images that have a copy of their own photograph in training (0 to 1)."""
    test, train = study.groups_of(split.test), study.groups_of(split.train)
    return float(np.isin(test, train).mean())
