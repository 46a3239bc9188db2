"""Training on cells of one source alone, and testing on another's: what is left in a new laboratory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hematovision.config import cache_folder
from hematovision.data.catalog import load_set
from hematovision.data.cells import CellStore, cut_cells, join_stores
from hematovision.data.manifest import Manifest
from hematovision.data.splits import random_split
from hematovision.data.study import Study
from hematovision.learn import recipe
from hematovision.learn.evaluation import Predictions
from hematovision.learn.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """Cells that come from elsewhere.

    Attributes
    ----------
    manifest : Manifest
        One image a cell, of the classes that are studied.
    root : Path
        The folder that its paths are relative to.
    """

    manifest: Manifest
    root: Path

    def cut(self, size: int, margin: float) -> CellStore:
        """Return its crops."""
        return cut_cells(self.manifest, self.root, cache_folder(), size=size, margin=margin)


def foreign_sources(
    others: Sequence[str], data: Path, classes: Sequence[str], *, photographs: int, seed: int
) -> dict[str, Source]:
    """Return the sources of a transfer test: drawn cells, then other laboratories' sets.

    Parameters
    ----------
    others : sequence of str
        Sets of the catalogue.
    data : Path
        The data folder.
    classes : sequence of str
        Cells of other classes are left out.
    photographs, seed : int
        Of the drawn set; another seed than the study's draws other laboratories.
    """
    drawn = load_set("synthetic", photographs=photographs, copies=1, seed=seed, classes=classes)
    fields = drawn.manifest[drawn.manifest["split"] == "photograph"].assign(split="")
    sources = {"drawn cells": Source(fields.reset_index(drop=True), drawn.root)}
    for name in others:
        other = load_set(name, data)
        usable = other.manifest["label"].isin(list(classes)) & (other.manifest["status"] == "ok")
        sources[name] = Source(other.manifest[usable].reset_index(drop=True), other.root)
    return sources


def train_elsewhere(
    choices: Recipe, source: Source, store: CellStore, study: Study, margin: float
) -> Predictions:
    """Train on a source alone and say what the study's TEST_SIMPLE photographs show.

    Every image of a source is a cell of its own, so its sides are drawn by image: a tenth validates.

    Returns
    -------
    Predictions
        On TEST_SIMPLE, with the study's groups of photographs.
    """
    tested = study.images("test_simple").reset_index(drop=True)
    home = cut_cells(tested, study.root, cache_folder(), size=store.size, margin=margin)
    both = join_stores(store, home)
    side = random_split(source.manifest, choices.seed, test_fraction=0.05, validation_fraction=0.1)
    data = recipe.training_data(
        choices, both, both.rows_of(side.train + side.test), both.rows_of(side.validation)
    )
    trained = recipe.train_classifier(choices, data)
    paths = study.split("official").extra["test_simple"]
    said = recipe.predict_rows(trained.model, data, len(store.table) + home.rows_of(paths), choices)
    # the study's groups, not the store's: paths of two sets may be alike, and linked photographs count once
    return dataclasses.replace(said, sources=study.groups_of(paths))
