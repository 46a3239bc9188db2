"""The tables of the notebooks: results in, frames out, in the words and the order that a reader sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hematovision.learn import evaluation, recipe
from hematovision.learn.backbones import BACKBONES, initial_weights_title
from hematovision.learn.calibration import Calibration
from hematovision.learn.evaluation import Predictions, Scores

RANDOM = "random 20 %"
"""Name of the test side of the random split."""

LEAKY, OFFICIAL, PUBLISHED = "random 80/20 (leaky)", "official, by photograph", "published"

Trainings = Mapping[str, Mapping[str, Any]]
"""Backbone to what notebook 03 left of its training."""

AllScores = Mapping[tuple[str, str], Scores]
"""(backbone, test set) to scores."""


def _title(name: str) -> str:
    return BACKBONES[name].title


def _start(trainings: Trainings, name: str) -> str:
    return initial_weights_title(trainings[name]["recipe"]["weights"])


def order_by_validation(trainings: Trainings) -> list[str]:
    """Return the backbones by balanced accuracy on validation photographs; among equals fewer weights."""

    def rank(name: str) -> tuple[float, int]:
        training = trainings[name]
        return -training["validation"]["metrics"]["balanced_accuracy"]["value"], training["parameters"]

    return sorted(trainings, key=rank)


def validation_table(trainings: Trainings) -> pd.DataFrame:
    """Return what the choice rests on, the best first."""
    rows = {}
    for name in order_by_validation(trainings):
        training = trainings[name]
        interval = evaluation.Interval(**training["validation"]["metrics"]["balanced_accuracy"])
        rows[_title(name)] = {
            "initial weights": _start(trainings, name),
            "weights (millions)": round(training["parameters"] / 1e6, 1),
            "pixels": training["recipe"]["input_size"],
            "epochs": training["epochs"],
            "validation balanced accuracy, %": str(interval),
        }
    return pd.DataFrame(rows).T


def score_table(scores: AllScores, trainings: Trainings) -> pd.DataFrame:
    """Return every score with its interval, in percent, by test set and backbone."""
    rows = [
        {
            "test set": test_set,
            "backbone": f"{_title(name)}, {_start(trainings, name)}",
            "images (photographs)": f"{s.n_images:,} ({s.n_photographs})",
            **{k.removesuffix("_macro").replace("_", " "): str(v) for k, v in s.summary.items()},
        }
        for (name, test_set), s in scores.items()
    ]
    # macro recall is balanced accuracy by another name
    table = pd.DataFrame(rows).drop(columns="recall")
    return table.set_index(["test set", "backbone"]).sort_index()


def class_table(scores: AllScores, test_set: str) -> pd.DataFrame:
    """Return precision, recall and F1 of every class on one test set, in percent."""
    rows = [
        {"class": c, "backbone": _title(name), **{k: str(v) for k, v in values.items()}}
        for (name, judged), s in scores.items()
        if judged == test_set
        for c, values in s.per_class.items()
    ]
    return pd.DataFrame(rows).set_index(["class", "backbone"]).sort_index()


def paired_comparisons(
    predictions: Mapping[tuple[str, str], Predictions],
    order: Sequence[str],
    test_set: str,
    *,
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Compare every two models on the same images; see `evaluation.compare`."""
    pairs = []
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            c = evaluation.compare(
                predictions[a, test_set], predictions[b, test_set], samples=samples, seed=seed
            )
            pairs.append(
                {
                    "first": _title(a),
                    "second": _title(b),
                    "difference": c.difference.to_dict(),
                    "text": str(c.difference),
                    "only first right": c.only_first,
                    "only second right": c.only_second,
                    "McNemar p": c.p_value,
                }
            )
    return pairs


def pair_table(pairs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return paired comparisons for people: the difference is in percentage points of accuracy."""
    columns = ["first", "second", "text", "only first right", "only second right", "McNemar p"]
    table = pd.DataFrame(pairs, columns=columns)  # a study of one network has no pairs
    return table.rename(columns={"text": "difference, % points"}).round({"McNemar p": 4})


def leak_table(scores: AllScores, trainings: Trainings, *, published: bool) -> pd.DataFrame:
    """Return accuracy under both splits (0 to 1), beside the published one where it is about the same set.

    The leak's share is given for networks that started from learned weights: one that starts from
    nothing may not have learned enough, in a short training, to remember anything.
    """
    rows = {}
    for name in trainings:
        random = scores[name, RANDOM].summary["accuracy"].value
        official = scores[name, "TEST"].summary["accuracy"].value
        learned = trainings[name]["recipe"]["weights"] != "none"
        rows[_title(name)] = {
            "random split": random,
            "official split": official,
            "the leak's share": random - official if learned else np.nan,
            "published": BACKBONES[name].published_accuracy if published else np.nan,
        }
    return pd.DataFrame(rows).T.dropna(axis=1, how="all")


def forest_table(scores: AllScores, trainings: Trainings, *, published: bool) -> pd.DataFrame:
    """Return accuracies under both splits as `plots.plot_intervals` draws them."""
    rows = []
    for name in trainings:
        called = f"{_title(name)}, {_start(trainings, name)}"
        for split, test_set in ((LEAKY, RANDOM), (OFFICIAL, "TEST")):
            accuracy = scores[name, test_set].summary["accuracy"]
            rows.append({"name": called, "split": split, **accuracy.to_dict()})
        if published:
            said = BACKBONES[name].published_accuracy
            rows.append({"name": called, "split": PUBLISHED, "value": said, "low": np.nan, "high": np.nan})
    return pd.DataFrame(rows)


def cost_table(folder: Path, trainings: Trainings, times: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return size, latency and training time of the official models.

    Parameters
    ----------
    folder : Path
        That holds ``<backbone>-official.keras``.
    """
    cost = {}
    for name, training in trainings.items():
        file = folder / f"{name}-official.keras"
        size = training["recipe"]["input_size"]
        cost[_title(name)] = {
            "weights (millions)": training["parameters"] / 1e6,
            "file (MB)": file.stat().st_size / 1e6,
            "input (pixels)": size,
            "latency (ms, one image, CPU)": evaluation.measure_latency(recipe.load_model(file), size),
            "training (minutes)": times[name]["seconds"] / 60,
        }
    return pd.DataFrame(cost).T.round(1)


def model_entries(
    scores: AllScores, trainings: Trainings, splits: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the scores as ``metrics.json`` holds them.

    Parameters
    ----------
    splits : mapping, optional
        Test set to the split it belongs to; `RANDOM` to ``random`` and all others to ``official``
        unless given.
    """
    known = {RANDOM: "random", **(splits or {})}
    return [
        {
            "backbone": name,
            "weights": trainings[name]["recipe"]["weights"],
            "split": known.get(test_set, "official"),
            "test_set": test_set,
            **s.to_dict(),
        }
        for (name, test_set), s in scores.items()
    ]


def summary_row(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of scores in percent, by the name of each, from `Scores` or from ``metrics.json``."""
    intervals = {
        name: value if isinstance(value, evaluation.Interval) else evaluation.Interval(**value)
        for name, value in summary.items()
    }
    return {name.replace("_", " "): str(intervals[name]) for name in evaluation.SUMMARY_METRICS}


def choice_entry(trainings: Trainings) -> dict[str, Any]:
    """Return which network is chosen, and why, as ``metrics.json`` holds it."""
    chosen = order_by_validation(trainings)[0]
    rule = (
        "highest balanced accuracy on validation photographs of the official split; among equals "
        "fewer weights"
    )
    return {"backbone": chosen, "rule": rule, "validation": trainings[chosen]["validation"]}


def leak_entry(leak: pd.DataFrame) -> dict[str, Any]:
    """Return the leak's share of each network that has one, as ``metrics.json`` holds it."""
    shares = leak.get("the leak's share", pd.Series(dtype=float)).dropna()
    return {"points": {str(name): float(share) for name, share in shares.items()}}


def published_entries(backbones: Sequence[str]) -> list[dict[str, Any]]:
    """Return the published accuracies as ``metrics.json`` holds them."""
    return [{"backbone": name, "accuracy": BACKBONES[name].published_accuracy} for name in backbones]


def transfer_forest(scores: Mapping[str, Scores], at_home: Mapping[str, Any]) -> pd.DataFrame:
    """Return balanced accuracies by the source of training as `plots.plot_intervals` draws them."""
    rows = [
        {"name": name, "trained on": "elsewhere", **s.summary["balanced_accuracy"].to_dict()}
        for name, s in scores.items()
    ]
    home = {"name": "the chosen model", "trained on": "the same laboratory"}
    return pd.DataFrame([*rows, {**home, **at_home["balanced_accuracy"]}])


def transfer_entries(scores: Mapping[str, Scores], backbone: str, weights: str) -> list[dict[str, Any]]:
    """Return the scores of models that were trained elsewhere as ``metrics.json`` holds them."""
    return [
        {
            "backbone": backbone,
            "weights": weights,
            "split": f"trained on {name} alone",
            "test_set": "TEST_SIMPLE",
            **s.to_dict(),
        }
        for name, s in scores.items()
    ]


# -- a model that is judged on several sets ------------------------------------------------------

SetKey = tuple[str, str]
"""Name of a set, and a side of it."""

_SIDES = {"test": "TEST", "test_simple": "TEST_SIMPLE"}


def set_title(name: str, side: str) -> str:
    """Return how a side of a set is called: its own name where the set's authors made the sides."""
    if name == "pbc":
        return f"pbc, held-out {'fifth' if side == 'test' else side}"
    return f"{name} {_SIDES.get(side, side)}"


def set_table(scores: Mapping[SetKey, Scores]) -> pd.DataFrame:
    """Return one model's scores on every set, in percent with intervals."""
    rows = {
        set_title(*key): {
            "images (photographs)": f"{s.n_images:,} ({s.n_photographs})",
            "classes": len(s.per_class),
            **{k: v for k, v in summary_row(s.summary).items() if k != "recall macro"},
        }
        for key, s in scores.items()
    }
    return pd.DataFrame(rows).T.rename(columns={"precision macro": "precision", "f1 macro": "f1"})


def set_class_table(scores: Mapping[SetKey, Scores]) -> pd.DataFrame:
    """Return precision, recall and F1 of every class on every set, in percent with intervals."""
    rows = [
        {"tested on": set_title(*key), "class": c, **{k: str(v) for k, v in values.items()}}
        for key, s in scores.items()
        for c, values in s.per_class.items()
    ]
    return pd.DataFrame(rows).set_index(["tested on", "class"])


def accuracies(said: Mapping[SetKey, Predictions]) -> dict[str, float]:
    """Return accuracy and balanced accuracy on every set, 0 to 1."""
    found = {}
    for key, predictions in said.items():
        scores = evaluation.point_scores(predictions)
        for name in ("accuracy", "balanced_accuracy"):
            found[f"{set_title(*key)}, {name.replace('_', ' ')}"] = scores[name]
    return found


def calibration_table(
    before: Mapping[SetKey, Calibration], after: Mapping[SetKey, Calibration]
) -> pd.DataFrame:
    """Return calibration errors of every set before and after the temperature."""
    rows = {}
    for key in after:
        for name, measured in (("before", before[key]), ("after", after[key])):
            rows[set_title(*key), name] = {
                "ECE, %": str(measured.ece),
                "confidence less accuracy, %": str(measured.overconfidence),
                "Brier": f"{measured.brier.value:.3f}",
                "NLL": f"{measured.nll.value:.3f}",
            }
    return pd.DataFrame(rows).T


def calibration_entries(measured: Mapping[SetKey, Calibration]) -> dict[str, Any]:
    """Return calibration errors by set as ``metrics.json`` holds them."""
    return {set_title(*key): c.to_dict() for key, c in measured.items()}


def set_entries(scores: Mapping[SetKey, Scores], backbone: str, weights: str) -> list[dict[str, Any]]:
    """Return the final model's scores as ``metrics.json`` holds them."""
    return [
        {
            "backbone": backbone,
            "weights": weights,
            "split": "the final model",
            "test_set": set_title(*key),
            **s.to_dict(),
        }
        for key, s in scores.items()
    ]


def by_set(entries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return entries of ``metrics.json`` by the set that was tested on."""
    return {entry["test_set"]: entry for entry in entries}


def correct_examples(predictions: Predictions, per_class: int) -> pd.DataFrame:
    """Return images that are named correctly, the surest of each class: ``image, label``."""
    frame = predictions.to_frame().assign(sure=predictions.probabilities.max(axis=1))
    right = frame[predictions.correct].sort_values(["label", "sure", "image"], ascending=[True, False, True])
    return right.drop_duplicates("source").groupby("label").head(per_class)[["image", "label"]]
