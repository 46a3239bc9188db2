"""A search for better hyperparameters with Keras Tuner, that can be killed, goes on and repeats.

Random search with early stopping of weak trials. Keras Tuner draws the trials and keeps the book;
each trial is one `recipe.train_classifier`, with its seeds and its checkpoints. What a trial found
is one small JSON file, written when it has ended: a search that starts again draws the same trials,
reads those that have ended and goes on inside the one that was interrupted. No weights are kept.

The objective is the *balanced loss* of the validation photographs (`balanced_loss`) and not their
balanced accuracy, by which networks are compared in the end. With three or four validation
photographs of the rarest class one image moves the balanced accuracy by percents, trials tie, and
luck chooses; the loss also counts how sure a network was of each answer, and in it, too, every class
counts alike.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.errors import ConfigError
from hematovision.files import content_key, read_json, write_json
from hematovision.learn import backbones
from hematovision.learn.evaluation import Predictions, point_scores
from hematovision.learn.recipe import (
    OPTIMIZERS,
    Recipe,
    TrainingData,
    checkpoint_folder,
    predict_rows,
    train_classifier,
)
from hematovision.learn.training import TrainingDiverged
from hematovision.quiet import silence

# the one module that loads TensorFlow when it is imported: a tuner is a subclass of Keras Tuner's
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with silence():
    import keras
    import keras_tuner
    from keras_tuner.engine.base_tuner import BaseTuner
    from keras_tuner.engine.hyperparameters import Fixed

OBJECTIVE = "balanced_loss"
# Gradients are clipped to norm 1, so that a step of SGD with momentum 0.9 is at most 10 rates long. A step
# of Adam is about one rate in each of the weights: some 1,500 rates for the two million of MobileNetV2.
SGD_FACTOR = 100.0
RATE_SPAN = 10.0
FIRST_LOOK, REDUCTION = 2, 3


def balanced_loss(said: Predictions) -> float:
    """Return the cross-entropy in nats in which photographs of a class, and then classes, count alike.

    The mean of ``-ln p(label)`` over the images of a photograph, over the photographs of a class, and
    over the classes that occur; ``ln C`` for a network that knows nothing of C classes.
    """
    frame = pd.DataFrame({"label": said.labels, "source": said.sources, "loss": said.label_losses})
    photographs = frame.groupby(["label", "source"])["loss"].mean()
    return float(photographs.groupby("label").mean().mean())


def search_space(house: Recipe) -> keras_tuner.HyperParameters:
    """Return what is searched around a recipe; the recipe's own values are the defaults.

    ``learning_rate`` (logarithmic, a tenth to ten times the recipe's) is what Adam gets; SGD gets
    `SGD_FACTOR` times as much. ``fine_tune_layers`` counts from the end of the network, 0 standing for
    all: all, half or a fifth of this backbone's layers; all of them where it starts from nothing.
    """
    space = keras_tuner.HyperParameters()
    rate = house.fine_tune_learning_rate / (SGD_FACTOR if house.optimizer == "sgd" else 1.0)
    space.Choice("optimizer", list(OPTIMIZERS), default=house.optimizer)
    space.Float("learning_rate", rate / RATE_SPAN, rate * RATE_SPAN, sampling="log", default=rate)
    for name, values in {
        "batch_size": (16, 32),
        "dropout": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        "head": backbones.HEADS,
        "fine_tune_layers": _layer_choices(house),
        "augmentation": (0.0, 0.5, 1.0, 1.5, 2.0),
    }.items():
        own = getattr(house, name)
        choices = sorted({*values, own})
        space.Choice(name, choices, default=own) if len(choices) > 1 else space.Fixed(name, own)
    return space


def _layer_choices(house: Recipe) -> tuple[int, ...]:
    if not house.pretrained:
        return (0,)  # frozen layers that have learned nothing are noise
    layers = len(backbones.build_base(house.backbone, "none").layers)
    return (0, layers // 2, layers // 5)


def to_changes(house: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """Return values of the search space as changes for `Recipe.replace`.

    Both learning rates become those of the optimizer: SGD takes `SGD_FACTOR` times what Adam takes.
    """
    before = SGD_FACTOR if house.optimizer == "sgd" else 1.0
    factor = SGD_FACTOR if values["optimizer"] == "sgd" else 1.0
    changes = {k: v for k, v in values.items() if k != "learning_rate"}
    return changes | {
        # six digits: readable, and 0.0003 * 100 is 0.03
        "fine_tune_learning_rate": float(f"{values['learning_rate'] * factor:.6g}"),
        "head_learning_rate": float(f"{house.head_learning_rate / before * factor:.6g}"),
    }


def fewer_photographs(data: TrainingData, photographs: int, seed: int) -> TrainingData:
    """Return the same data with at most so many training photographs, for a search that can be paid.

    The photographs of the set that is validated on stay; cells of other sets fill up, drawn at random.

    Parameters
    ----------
    data : TrainingData
    photographs : int
        0 for all.
    seed : int
    """
    if photographs == 0:
        return data
    sets = data.cells.table["dataset"].to_numpy(str)
    sources, own = data.sources[data.train], np.isin(sets[data.train], sets[data.validation])
    first, others = np.unique(sources[own]), np.setdiff1d(sources[~own], sources[own])
    order = np.random.default_rng(seed).permutation(others)
    kept = np.isin(sources, [*first, *order[: max(0, photographs - len(first))]])
    return dataclasses.replace(data, train=data.train[kept])


@dataclasses.dataclass(frozen=True)
class Looks:
    """When trials are looked at, and what earlier ones were like then.

    Every trial is looked at after `FIRST_LOOK` epochs, those that go on again after `REDUCTION` times
    as many, and so on. It goes on if its best validation loss so far stands among the best third of all
    trials that came as far, itself included: the stopping rule of asynchronous successive halving (Li
    et al. 2020, "A system for massively parallel hyperparameter tuning", MLSys; arXiv 1810.05934).

    Attributes
    ----------
    epochs : int
        The most that a trial gets; at the last one nothing can be saved any more.
    earlier : list of (list of float, bool)
        The validation losses of each earlier trial, one an epoch, and whether it was stopped as weak.
        A trial that ended by itself is compared at later looks too, by its best.
    """

    epochs: int
    earlier: list[tuple[list[float], bool]]

    def is_weak(self, losses: list[float]) -> bool:
        """Whether a trial with these validation losses, one an epoch, is stopped after the last one."""
        now = len(losses)
        if now not in _look_epochs(self.epochs):
            return False
        others = [min(past[:now]) for past, weak in self.earlier if past and (len(past) >= now or not weak)]
        ahead = sum(other <= min(losses) for other in others)
        return ahead >= math.ceil((len(others) + 1) / REDUCTION)


def _look_epochs(epochs: int) -> list[int]:
    looks, epoch = [], FIRST_LOOK
    while epoch < epochs:
        looks.append(epoch)
        epoch *= REDUCTION
    return looks


class _StopWeak(keras.callbacks.Callback):
    """Stops a trial that `Looks` finds weak, also where it goes on after a kill."""

    def __init__(self, looks: Looks, checkpoints: Path) -> None:
        super().__init__()
        self.looks, self.checkpoints = looks, checkpoints

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self.losses = _losses(self.checkpoints)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self.losses.append(float((logs or {})["val_loss"]))
        if self.looks.is_weak(self.losses):
            self.model.stop_training = True


def _losses(checkpoints: Path) -> list[float]:
    file = checkpoints / "fine_tune" / "state.json"
    return [row["val_loss"] for row in read_json(file)["history"]] if file.exists() else []


def run_recipe(recipe: Recipe, data: TrainingData, looks: Looks, checkpoints: Path) -> dict[str, Any]:
    """Train and score one trial; resumes a killed one.

    Returns
    -------
    dict
        ``balanced_loss`` and ``balanced_accuracy`` on validation, of the best epoch's weights;
        ``epochs``; ``ended``: ``"whole"`` (all epochs), ``"plateau"`` (no better validation loss for as
        long as the recipe's patience), ``"weak"`` (`Looks`) or ``"diverged"``, which scores as chance
        does; and ``validation_losses``, one an epoch.
    """
    stop, ended = _StopWeak(looks, checkpoints), "whole"
    loss, accuracy = math.log(len(recipe.classes)), 1 / len(recipe.classes)
    try:
        trained = train_classifier(recipe, data, folder=checkpoints, watchers=[stop], quiet=True)
    except TrainingDiverged:
        ended = "diverged"
    else:
        said = predict_rows(trained.model, data, data.validation, recipe)
        loss, accuracy = balanced_loss(said), point_scores(said)["balanced_accuracy"]
    losses = _losses(checkpoints)
    if ended == "whole" and len(losses) < recipe.fine_tune_epochs:
        ended = "weak" if looks.is_weak(losses) else "plateau"
    return {
        OBJECTIVE: loss,
        "balanced_accuracy": accuracy,
        "epochs": len(losses),
        "ended": ended,
        "validation_losses": losses,
    }


class _HouseFirst(keras_tuner.oracles.RandomSearchOracle):
    """Random search whose first trial is made of the defaults."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if int(trial_id) == 0:
            return {"status": "RUNNING", "values": {p.name: p.default for p in self.hyperparameters.space}}
        return super().populate_space(trial_id)


class RecipeTuner(BaseTuner):
    """A Keras Tuner whose trials are recipes.

    Parameters
    ----------
    house : Recipe
        The first trial, and what all trials share: its ``fine_tune_epochs`` are the most that a trial
        gets, its seed draws the trials. A trial is stopped where its validation loss no longer falls
        (the recipe's patience, the rate halved after half of it), or where it is weak (`Looks`).
    data : TrainingData
    space : keras_tuner.HyperParameters
        From `search_space`, narrowed or not.
    trials : int
        More than before goes on where the last search ended.

    Attributes
    ----------
    folder : Path
        Named by the recipe, the data and the code; holds one JSON file a trial that has ended, and the
        checkpoints of the one that runs.

    Raises
    ------
    ConfigError
        If there is no trial or no epoch to search with.
    """

    def __init__(
        self, house: Recipe, data: TrainingData, space: keras_tuner.HyperParameters, *, trials: int
    ) -> None:
        if trials < 1 or house.fine_tune_epochs < 1:
            raise ConfigError(
                "a search needs at least one trial of one epoch", "raise tuning_trials or tuning_epochs"
            )
        self.house, self.data = house, data
        self.folder = checkpoint_folder(house, data, "tuning")
        oracle = _HouseFirst(
            keras_tuner.Objective(OBJECTIVE, "min"),
            max_trials=trials,
            hyperparameters=space,
            allow_new_entries=False,
            seed=house.seed + 1,  # Keras Tuner takes 0 for "no seed"
        )
        # Keras Tuner writes its own book in place: a kill can leave half a file, which it then refuses.
        # So the book is written anew each time, from the files of the trials.
        super().__init__(oracle, directory=str(self.folder), project_name="keras_tuner", overwrite=True)

    def search(self) -> None:
        """Run the trials, one line of text each; those that have ended before are read."""
        try:
            super().search(verbose=0)
        except keras_tuner.errors.FatalError as fatal:
            raise (fatal.__cause__ or fatal) from None

    def run_trial(self, trial: Any, **_: Any) -> dict[str, float]:
        """Train, score and keep one trial, or read it; called by Keras Tuner."""
        number, values = int(trial.trial_id), dict(trial.hyperparameters.values)
        try:
            row = self._ended(number, values) or self._run(number, values)
        except Exception as error:
            # Keras Tuner would go on after any other error, and count the trial as a bad one
            raise keras_tuner.errors.FatalError(str(error)) from error
        self._say(row)
        return {OBJECTIVE: row[OBJECTIVE]}

    def _file(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}.json"

    def _ended(self, number: int, values: dict[str, Any]) -> dict[str, Any] | None:
        if not self._file(number).exists():
            return None
        row = read_json(self._file(number))
        # another space, or another version of Keras Tuner, draws otherwise
        return row if row["values"] == values else None

    def _run(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        keras.utils.clear_session()
        checkpoints = self.folder / f"checkpoints-{content_key(number, values)}"
        for stale in set(self.folder.glob("checkpoints-*")) - {checkpoints}:
            shutil.rmtree(stale, ignore_errors=True)
        rows = [read_json(self._file(n)) for n in range(number)]
        past = [(row["validation_losses"], row["ended"] == "weak") for row in rows]
        recipe = self.house.replace(**to_changes(self.house, values))
        found = run_recipe(recipe, self.data, Looks(recipe.fine_tune_epochs, past), checkpoints)
        row = {"trial": number + 1, "values": values, **found}
        write_json(self._file(number), row)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return row

    def _say(self, row: dict[str, Any]) -> None:
        values = ", ".join(
            f"{k.replace('_', ' ')} {v:.2g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
            for k, v in row["values"].items()
            if k in self.names()
        )
        print(
            f"trial {row['trial']:2d}/{self.oracle.max_trials}  balanced loss {row[OBJECTIVE]:.3f}  "
            f"balanced accuracy {row['balanced_accuracy']:.3f}  "
            f"{row['ended']} after {row['epochs']} epochs  ({values})",
            flush=True,
        )

    def table(self) -> pd.DataFrame:
        """Return one row a trial, in order.

        Columns are ``trial`` (from 1), the names of the space, and those of `run_recipe` but for the
        single epochs.
        """
        rows = [read_json(self._file(int(name))) for name in sorted(self.oracle.end_order, key=int)]
        found = (OBJECTIVE, "balanced_accuracy", "epochs", "ended")
        return pd.DataFrame(
            [{"trial": row["trial"]} | row["values"] | {k: row[k] for k in found} for row in rows]
        )

    def names(self) -> list[str]:
        """Return the hyperparameters of which the space holds more than one value."""
        return [p.name for p in self.oracle.hyperparameters.space if not isinstance(p, Fixed)]

    def best(self) -> dict[str, Any]:
        """Return the best trial as changes for `Recipe.replace`."""
        return to_changes(self.house, dict(self.get_best_hyperparameters()[0].values))


def importance(table: pd.DataFrame, names: list[str], seed: int, repeats: int = 30) -> pd.DataFrame:
    """Return how much each hyperparameter decided, as a random forest over the trials sees it.

    Permutation importance (Breiman 2001, doi 10.1023/A:1010933404324): by how much the forest's error
    on the trials grows when the column is shuffled, as a share of the sum over all columns. With few
    trials it is a hint and no more: the forest has seen the trials that it is asked about.

    Parameters
    ----------
    table : DataFrame
        From `RecipeTuner.table`.
    names : list of str
        Its columns of hyperparameters.
    seed : int
    repeats : int
        Shuffles a column.

    Returns
    -------
    DataFrame
        ``name, importance, spread`` (0 to 1; the standard deviation over the shuffles), the greatest
        first. All zero where the trials do not differ.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    columns = [_as_numbers(table[name], name) for name in names]
    x, y = np.stack(columns, axis=1), table[OBJECTIVE].to_numpy(float)
    forest = RandomForestRegressor(300, random_state=seed).fit(x, y)
    found = permutation_importance(
        forest, x, y, scoring="neg_mean_squared_error", n_repeats=repeats, random_state=seed
    )
    total = float(np.maximum(found.importances_mean, 0).sum()) or 1.0
    frame = pd.DataFrame(
        {
            "name": names,
            "importance": np.maximum(found.importances_mean, 0) / total,
            "spread": found.importances_std / total,
        }
    )
    return frame.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def _as_numbers(column: pd.Series, name: str) -> NDArray[np.float64]:
    if not pd.api.types.is_numeric_dtype(column):
        return pd.factorize(column, sort=True)[0].astype(float)
    values = column.to_numpy(float)
    return np.log(values) if name == "learning_rate" else values
