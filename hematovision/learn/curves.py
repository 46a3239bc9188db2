"""Learning curves: what a network gains from more photographs, by where its weights come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hematovision.data.cells import CellStore
from hematovision.data.splits import learning_subset
from hematovision.data.study import Study
from hematovision.learn import backbones, evaluation, recipe
from hematovision.learn.recipe import Recipe
from hematovision.learn.training import draw_copies

FROM_NOTHING = 5.0
"""How much larger the steps of a network that starts from nothing are, where batch normalisation forgives
them."""

_EPOCHS = (2, 30)


def curve_sizes(study: Study, wanted: Sequence[int]) -> list[int]:
    """Return the numbers of training photographs to learn from; 0 stands for all, and so does too many."""
    everything = len(set(study.groups_of(study.split("official").train)))
    return sorted({everything if n == 0 else min(n, everything) for n in wanted})


def curve_recipe(values: Mapping[str, Any], backbone: str, weights: str) -> Recipe:
    """Return the recipe of a learning curve: the same for all, but for the start and what it asks for.

    Learned weights get a head on frozen features first. A start from nothing has no features to begin
    with, and takes larger steps where batch normalisation allows it.

    Parameters
    ----------
    values : mapping
        A profile's values or a notebook's ``globals()``: the keys that start with ``curve_``, and those of
        a recipe that have no such twin.
    backbone, weights : str
    """
    row = backbones.get_backbone(backbone)
    faster = FROM_NOTHING if weights == "none" and row.has_batch_norm else 1.0
    mine = {
        "backbone": backbone,
        "weights": weights,
        "precision": row.precision,
        "input_size": values["curve_input_size"],
        "copies_per_photograph": values["curve_copies"],
        "fine_tune_learning_rate": values["curve_learning_rate"] * faster,
        "fine_tune_epochs": 1,  # set by the number of steps
        "fine_tune_layers": 0,
        "head_epochs": 20,
        "optimizer": "adam",
        "head": "average",
    }
    return Recipe.from_values({**values, **mine})


def learning_curve(
    study: Study,
    cells: CellStore,
    choices: Recipe,
    sizes: Sequence[int],
    *,
    steps: int,
    samples: int,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Train on ever more photographs of the official split, and score each model on its TEST images.

    The subsets are nested and keep the proportions of the classes; the validation photographs are
    always the same. Cells of extra sets are left out: a curve counts photographs of one laboratory.
    Nothing is chosen by these scores.

    Parameters
    ----------
    study : Study
    cells : CellStore
    choices : Recipe
        ``copies_per_photograph`` copies of a photograph train, validate and test.
    sizes : sequence of int
        Numbers of photographs.
    steps : int
        Of fine-tuning, about: few photographs are seen in more epochs, so that a small training is not
        also a short one (from 2 to 30 epochs).
    samples : int
        Of the bootstrap by photograph.
    say : callable
        Takes a line of progress.

    Returns
    -------
    DataFrame
        One row a size: ``model, backbone, weights, photographs, images, value, low, high``; the value is
        the balanced accuracy, 0 to 1.
    """
    split = study.split("official")
    groups = study.groups_of(cells.table["path"])
    tested = cells.rows_of(split.test)
    tested = tested[draw_copies(groups[tested], choices.copies_per_photograph, choices.seed)]
    title = backbones.get_backbone(choices.backbone).title
    called = f"{title}, {backbones.initial_weights_title(choices.weights)}"
    rows: list[dict[str, Any]] = []
    for n in sizes:
        part = learning_subset(split, study.manifest, study.groups, n, choices.seed)
        train, validation = cells.rows_of(part.train), cells.rows_of(part.validation)
        drawn = len(draw_copies(groups[train], choices.copies_per_photograph, 0))
        epochs = round(steps * choices.batch_size / drawn)
        mine = choices.replace(fine_tune_epochs=int(np.clip(epochs, *_EPOCHS)))
        data = recipe.training_data(mine, cells, train, validation, groups.tolist())
        trained = recipe.train_classifier(mine, data, quiet=True)
        said = recipe.predict_rows(trained.model, data, tested, mine)
        score = evaluation.evaluate(said, samples=samples, seed=choices.seed).summary["balanced_accuracy"]
        rows.append(
            {
                "model": called,
                "backbone": choices.backbone,
                "weights": choices.weights,
                "photographs": n,
                "images": len(np.unique(train)),
                **score.to_dict(),
            }
        )
        say(f"{called}: {n:3d} photographs, balanced accuracy {score}")
    return pd.DataFrame(rows)
