"""The model that is released: trained on all there is, several times, averaged, and judged set by set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.data.sides import Sides, join_sides, read_pbc_sides, study_sides
from hematovision.data.study import Study
from hematovision.learn import calibration, evaluation
from hematovision.learn.evaluation import Predictions
from hematovision.learn.pretraining import Plan, train_plan
from hematovision.learn.training import draw_copies, image_reader, ordered_batches

if TYPE_CHECKING:
    import keras

AVERAGE = "average of the weights"


def final_sides(
    study: Study,
    classes: Sequence[str],
    extra: Sequence[str],
    data: Path | None,
    *,
    size: int,
    margin: float,
    copies: int,
) -> dict[str, Sides]:
    """Return the sides of every set that the final model learns from, by name; the study's own comes last.

    Parameters
    ----------
    study : Study
    classes : sequence of str
        Of the study.
    extra : sequence of str
        ``pbc``, or nothing.
    data : Path or None
        The data folder.
    size, margin, copies
        As in `data.sides`.
    """
    own = study_sides(study, classes, size=size, margin=margin, copies=copies)
    others = {name: read_pbc_sides(data, size=size, margin=margin) for name in extra}
    return {**others, study.name: own}


def joined(sides: Mapping[str, Sides]) -> Sides:
    """Return training and validation of all sets as one; the first set's classes are learned."""
    first, *others = sides.values()
    for other in others:
        first = join_sides(first, other)
    return first


@dataclass(frozen=True)
class Candidate:
    """One of the models of which the final one is chosen.

    Attributes
    ----------
    name : str
    model : keras.Model
    seconds : float
        Of its training.
    """

    name: str
    model: keras.Model
    seconds: float


def train_candidates(
    backbone: str, sides: Sides, plan: Plan, seeds: Sequence[int], say: Callable[[str], None] = print
) -> list[Candidate]:
    """Train once for each seed, and add the average of their weights.

    Trainings that start from the same weights end in one valley of the loss, and the average of their
    weights lies deeper in it than each of them (Wortsman et al. 2022, "Model soups", arXiv 2203.05482).
    """
    found = []
    for seed in seeds:
        say(f"seed {seed}")
        trained = train_plan(backbone, sides, dataclasses.replace(plan, seed=seed), say)
        found.append(Candidate(f"seed {seed}", trained.model, trained.seconds))
    if len(found) > 1:
        weights = [np.mean(w, axis=0) for w in zip(*(c.model.get_weights() for c in found), strict=True)]
        model = _copy(found[0].model)
        model.set_weights(weights)
        found.append(Candidate(AVERAGE, model, 0.0))
    return found


def _copy(model: keras.Model) -> keras.Model:
    import keras

    return keras.models.clone_model(model)


def predict_side(
    model: keras.Model, sides: Sides, side: str, classes: Sequence[str] | None = None
) -> Predictions:
    """Run a model over a side of a set.

    Parameters
    ----------
    model : keras.Model
        Its outputs are ``classes``.
    sides : Sides
    side : str
        ``validation``, ``test``, or an extra one. Of the validation side, `Sides.copies` images of each
        photograph are taken, as in training.
    classes : sequence of str, optional
        The model's; those of the set unless given. The result is about the set's own classes: see
        `restrict`.
    """
    rows = sides.rows(side)
    if side == "validation" and sides.copies:
        rows = rows[draw_copies(sides.groups[rows], sides.copies, 0)]
    names = tuple(classes or sides.classes)
    read = image_reader(sides.cells, int(model.input_shape[1]))
    labels = sides.cells.table["label"].to_numpy(str)[rows]
    hot = (labels[:, None] == np.asarray(names)[None]).astype(np.float32)
    paths = sides.cells.table["path"].to_numpy(str)[rows]
    batches = ordered_batches(lambda places: read(rows[places]), np.arange(len(rows)), hot)
    said = evaluation.predict_images(model, batches, sides.groups[rows], paths, names)
    return restrict(said, sides.classes)


def predict_sets(
    model: keras.Model, sets: Mapping[tuple[str, str], Sides], classes: Sequence[str]
) -> dict[tuple[str, str], Predictions]:
    """Run a model over a side of each of several sets, by (name, side); see `predict_side`."""
    return {key: predict_side(model, s, key[1], classes) for key, s in sets.items()}


def restrict(predictions: Predictions, classes: Sequence[str]) -> Predictions:
    """Return what a model of many classes says when it is known that only some can occur.

    Probabilities of the others are dropped and the rest scaled to sum to 1.

    Parameters
    ----------
    predictions : Predictions
        Of images whose labels are all among ``classes``.
    classes : sequence of str
        In the order wanted.
    """
    kept = [predictions.classes.index(name) for name in classes]
    said = predictions.probabilities[:, kept].astype(np.float64)
    said = said / np.maximum(said.sum(axis=1, keepdims=True), 1e-12)
    position = {old: new for new, old in enumerate(kept)}
    labels = np.array([position[int(label)] for label in predictions.labels], np.int64)
    return dataclasses.replace(
        predictions, probabilities=said.astype(np.float32), labels=labels, classes=tuple(classes)
    )


def judge_candidates(candidates: Sequence[Candidate], sides: Mapping[str, Sides]) -> pd.DataFrame:
    """Score every candidate on the validation side of every set, the best first.

    Returns
    -------
    DataFrame
        Indexed by candidate: balanced accuracy on each set, their ``mean``, and ``loss``, the mean
        negative log-likelihood over the sets with each photograph counting alike. Sorted by loss: it
        uses how sure a model is and not only whether it is right, and a validation side is small.
    """
    classes = next(iter(sides.values())).classes
    rows = {}
    for candidate in candidates:
        said = {name: predict_side(candidate.model, s, "validation", classes) for name, s in sides.items()}
        accuracy = {name: evaluation.point_scores(p)["balanced_accuracy"] for name, p in said.items()}
        losses = [
            np.average(p.label_losses, weights=calibration.photograph_weights(p)) for p in said.values()
        ]
        rows[candidate.name] = {
            **accuracy,
            "mean": float(np.mean(list(accuracy.values()))),
            "loss": float(np.mean(losses)),
        }
    return pd.DataFrame(rows).T.sort_values("loss")


def pool(predictions: Sequence[Predictions], classes: Sequence[str]) -> Predictions:
    """Put the predictions of several sets together, over all classes; absent ones get probability 0."""
    probabilities, labels = [], []
    for p in predictions:
        places = [list(classes).index(name) for name in p.classes]
        wide = np.zeros((len(p.labels), len(classes)), np.float32)
        wide[:, places] = p.probabilities
        probabilities.append(wide)
        labels.append(np.asarray(places, np.int64)[p.labels])
    return Predictions(
        np.concatenate(probabilities),
        np.concatenate(labels),
        np.concatenate([p.sources for p in predictions]),
        np.concatenate([p.image_ids for p in predictions]),
        tuple(classes),
    )


def spread(scores: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return mean, standard deviation and range of scores over trainings that differ in their seed.

    Parameters
    ----------
    scores : sequence of mapping
        One a seed: name of a score to its value.
    """
    frame = pd.DataFrame(scores)
    return frame.agg(["mean", "std", "min", "max"]).T


def mistakes(predictions: Predictions, most: int) -> pd.DataFrame:
    """Return the images that a model is most surely wrong about, one a photograph.

    Returns
    -------
    DataFrame
        ``image, source, label, predicted, confidence``, the surest first.
    """
    frame = predictions.to_frame().assign(confidence=predictions.probabilities.max(axis=1))
    wrong = frame[~predictions.correct].sort_values(["confidence", "image"], ascending=[False, True])
    columns = ["image", "source", "label", "predicted", "confidence"]
    return wrong.drop_duplicates("source").head(most)[columns].reset_index(drop=True)


def crops_of(sides: Sides, paths: Sequence[str], size: int) -> NDArray[np.uint8]:
    """Return the crops of images by their paths, uint8 (N, size, size, 3)."""
    return sides.cells.read(sides.cells.rows_of(list(paths)), size)


def test_sets(sides: Mapping[str, Sides], study: str) -> dict[tuple[str, str], Sides]:
    """Return what the final model is tested on: the test side of every set, and the study's photographs."""
    sets = {(name, "test"): s for name, s in sides.items()}
    return {**sets, (study, "test_simple"): sides[study]}


def read_said(folder: Path, sets: Mapping[tuple[str, str], Sides]) -> dict[tuple[str, str], Predictions]:
    """Read what notebook 7 kept of the final model's predictions."""
    return {
        (name, side): evaluation.read_predictions(folder / f"final-{name}-{side}.csv") for name, side in sets
    }


def some_crops(sides: Mapping[str, Sides], side: str, most: int, seed: int) -> NDArray[np.uint8]:
    """Return crops drawn from a side of every set, as many of each."""
    rng = np.random.default_rng(seed)
    drawn = []
    for s in sides.values():
        rows = s.rows(side)
        drawn.append(s.cells.read(np.sort(rng.permutation(rows)[: most // len(sides)])))
    return np.concatenate(drawn)
