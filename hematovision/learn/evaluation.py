"""What a model gets right, with intervals that respect the photograph.

Copies of one photograph are not independent: their errors come together. Every interval here is a
bootstrap over photographs, drawn within each class (Davison and Hinkley 1997, section 2.4 and 3.8),
and every comparison of two models is paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from hematovision.errors import DataError
from hematovision.files import write_text

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

SUMMARY_METRICS = ("accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro")
_TINY = 1e-12
_LEAST_OF_LOSS = 1e-7


@dataclass(frozen=True)
class Predictions:
    """What a model said of a set of images.

    Attributes
    ----------
    probabilities : float32 array of shape (N, C), rows sum to 1
    labels : int64 array of shape (N,), positions in ``classes``
    sources : array of str, shape (N,)
        The photograph (or linked group of photographs) behind each image.
    image_ids : array of str, shape (N,)
    classes : tuple of str
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    sources: NDArray[np.str_]
    image_ids: NDArray[np.str_]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.labels)
        if (
            self.probabilities.shape != (n, len(self.classes))
            or not len(self.sources) == len(self.image_ids) == n
        ):
            raise DataError("predictions of unequal length", "give one row an image")

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Position of the most probable class, shape (N,)."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the most probable class is the label, shape (N,)."""
        return self.predicted == self.labels

    @property
    def label_losses(self) -> NDArray[np.float64]:
        """``-ln p(label)`` of each image in nats, shape (N,); p is at least 1e-7, as in Keras."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        return -np.log(np.maximum(own, _LEAST_OF_LOSS))

    @property
    def photographs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of the photograph of each image, shape (N,), and class of each photograph, shape (G,).

        A group whose images have two labels counts as two photographs.
        """
        codes, uniques = pd.factorize(pd.MultiIndex.from_arrays([self.labels, self.sources]))
        return codes.astype(np.int64), np.array([label for label, _ in uniques], np.int64)

    def to_frame(self) -> pd.DataFrame:
        """Return one row an image: ``image, source, label, predicted, p_<class>...``."""
        names = np.asarray(self.classes)
        frame = pd.DataFrame(
            {
                "image": self.image_ids,
                "source": self.sources,
                "label": names[self.labels],
                "predicted": names[self.predicted],
            }
        )
        for i, name in enumerate(self.classes):
            frame[f"p_{name}"] = self.probabilities[:, i].astype(float).round(7)
        return frame

    def write(self, path: Path | str) -> None:
        """Write the frame as CSV, atomically."""
        write_text(path, self.to_frame().to_csv(index=False))


def read_predictions(path: Path | str) -> Predictions:
    """Read what `Predictions.write` wrote.

    Raises
    ------
    DataError
        If the file is missing or holds something else.
    """
    text = dict.fromkeys(("image", "source", "label"), str)
    try:
        frame = pd.read_csv(path, dtype=text, keep_default_na=False)
        columns = [c for c in frame.columns if c.startswith("p_")]
        classes = tuple(c.removeprefix("p_") for c in columns)
        labels = pd.Index(classes).get_indexer(pd.Index(frame["label"])).astype(np.int64)
        probabilities = frame[columns].to_numpy(np.float32)
        sources, images = frame["source"].to_numpy(str), frame["image"].to_numpy(str)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} holds no predictions ({error})", "run the notebook that writes it"
        ) from error
    if (labels < 0).any():
        raise DataError(f"{path}: a label is none of {', '.join(classes)}", "run the notebook that writes it")
    return Predictions(probabilities, labels, sources, images, classes)


def predict_images(
    model: keras.Model,
    batches: tf.data.Dataset,
    sources: Sequence[str] | NDArray[np.str_],
    image_ids: Sequence[str] | NDArray[np.str_],
    classes: Sequence[str],
) -> Predictions:
    """Run a model over ordered batches of (images, one-hot labels)."""
    probabilities, labels = [], []
    for images, targets in batches:
        probabilities.append(model.predict_on_batch(images))
        labels.append(np.asarray(targets).argmax(axis=1))
    return Predictions(
        np.concatenate(probabilities).astype(np.float32),
        np.concatenate(labels).astype(np.int64),
        np.asarray(sources, str),
        np.asarray(image_ids, str),
        tuple(classes),
    )


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Scores:
    """All scores of one model on one set of images, each with its interval.

    Attributes
    ----------
    summary : dict of str to Interval
        Keys are `SUMMARY_METRICS`; macro means run over the classes that occur in the set.
    per_class : dict of str to dict of str to Interval
        ``precision``, ``recall`` and ``f1`` of each class.
    confusion : int64 array of shape (C, C), rows are true classes
    n_images, n_photographs : int
    """

    summary: dict[str, Interval]
    per_class: dict[str, dict[str, Interval]]
    confusion: NDArray[np.int64]
    n_images: int
    n_photographs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``metrics.json``."""
        return {
            "n_images": self.n_images,
            "n_photographs": self.n_photographs,
            "metrics": {k: v.to_dict() for k, v in self.summary.items()},
            "per_class": {c: {k: v.to_dict() for k, v in d.items()} for c, d in self.per_class.items()},
            "confusion": self.confusion.tolist(),
        }


def evaluate(predictions: Predictions, *, samples: int = 2000, seed: int = 0) -> Scores:
    """Score predictions, with 95 % percentile intervals bootstrapped by photograph.

    Photographs are drawn with replacement within each class; all images of a drawn photograph come
    along. A statistic is computed on the summed confusion matrix of every draw.
    """
    matrices, strata = _photograph_matrices(predictions)
    total = matrices.sum(axis=0)
    draws = np.tensordot(draw_photographs(strata, samples, seed), matrices, axes=1)
    value, spread = _statistics(total[None]), _statistics(draws)

    def interval(name: str, column: int | None = None) -> Interval:
        v, s = value[name], spread[name]
        if column is not None:
            v, s = v[:, column], s[:, column]
        low, high = np.nanpercentile(s, [2.5, 97.5]) if np.isfinite(s).any() else (np.nan, np.nan)
        return Interval(*(float(np.nan_to_num(x)) for x in (v[0], low, high)))

    per_class = {
        name: {k: interval(k, i) for k in ("precision", "recall", "f1")}
        for i, name in enumerate(predictions.classes)
        if total[i].sum() > 0
    }
    return Scores(
        {k: interval(k) for k in SUMMARY_METRICS},
        per_class,
        total.astype(np.int64),
        len(predictions.labels),
        len(matrices),
    )


def point_scores(predictions: Predictions) -> dict[str, float]:
    """Return the values of `SUMMARY_METRICS`, 0 to 1, without their intervals."""
    value = _statistics(_photograph_matrices(predictions)[0].sum(axis=0)[None])
    return {name: float(np.nan_to_num(value[name][0])) for name in SUMMARY_METRICS}


def _photograph_matrices(p: Predictions) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return one confusion matrix a photograph, shape (G, C, C), and the class of each photograph."""
    codes, strata = p.photographs
    n = len(p.classes)
    matrices = np.zeros((len(strata), n, n))
    np.add.at(matrices, (codes, p.labels, p.predicted), 1)
    return matrices, strata


def draw_photographs(strata: NDArray[np.int64], samples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each photograph is drawn, shape (samples, G): with replacement, within each class.

    Parameters
    ----------
    strata : int64 array of shape (G,)
        The class of each photograph, as `Predictions.photographs` gives it.
    samples, seed : int
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((samples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        counts[:, members] = rng.multinomial(n, np.full(n, 1 / n), size=samples)
    return counts


def _statistics(m: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return metrics of confusion matrices of shape (B, C, C); absent classes are NaN."""
    hit = np.diagonal(m, axis1=1, axis2=2)
    true, said = m.sum(axis=2), m.sum(axis=1)
    present = true > 0
    recall = np.where(present, hit / np.maximum(true, _TINY), np.nan)
    # a class that was never said has precision 0, as scikit-learn's zero_division=0
    precision = np.where(present, hit / np.maximum(said, _TINY), np.nan)
    f1 = np.where(present, 2 * hit / np.maximum(true + said, _TINY), np.nan)
    return {
        "recall": recall,
        "precision": precision,
        "f1": f1,
        "accuracy": hit.sum(axis=1) / np.maximum(true.sum(axis=1), _TINY),
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "precision_macro": np.nanmean(precision, axis=1),
        "recall_macro": np.nanmean(recall, axis=1),
        "f1_macro": np.nanmean(f1, axis=1),
    }


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, paired.

    Attributes
    ----------
    difference : Interval
        Accuracy of the first minus accuracy of the second, bootstrapped by photograph.
    only_first, only_second : int
        Photographs that one model names correctly (most of its images) and the other does not.
    p_value : float
        Exact McNemar test on those photographs, two-sided.
    """

    difference: Interval
    only_first: int
    only_second: int
    p_value: float


def compare(first: Predictions, second: Predictions, *, samples: int = 2000, seed: int = 0) -> Comparison:
    """Compare two models on the same images.

    McNemar's exact test (McNemar 1947) counts photographs, not copies: a photograph is right when
    more than half of its images are. The bootstrap of the difference counts images.

    Raises
    ------
    DataError
        If the two are not about the same images in the same order.
    """
    if not np.array_equal(first.image_ids, second.image_ids):
        raise DataError("two models can be compared on the same images only", "predict both on one list")
    frame = pd.DataFrame(
        {
            "s": first.sources,
            "l": first.labels,
            "a": first.correct.astype(float),
            "b": second.correct.astype(float),
        }
    )
    grouped = frame.groupby(["l", "s"], sort=True)
    means, n = grouped[["a", "b"]].mean(), grouped.size()
    a, b = (means["a"] > 0.5).to_numpy(), (means["b"] > 0.5).to_numpy()
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    sums = grouped[["a", "b"]].sum()
    cells = np.zeros((len(n), 1, 2))
    cells[:, 0, 0] = (sums["a"] - sums["b"]).to_numpy()
    cells[:, 0, 1] = n.to_numpy()
    strata = np.array([label for label, _ in n.index], np.int64)
    draws = np.tensordot(draw_photographs(strata, samples, seed), cells, axes=1)[:, 0]
    low, high = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])
    value = float(cells[:, 0, 0].sum() / cells[:, 0, 1].sum())
    return Comparison(Interval(value, float(low), float(high)), only_first, only_second, p)


def measure_latency(model: keras.Model, input_size: int, repeats: int = 20) -> float:
    """Return the median milliseconds from one image to its probabilities, on this machine's CPU."""
    import time

    import tensorflow as tf

    call = tf.function(lambda x: model(x, training=False))
    image = tf.zeros((1, input_size, input_size, 3))
    call(image)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call(image)
        times.append(time.perf_counter() - began)
    return float(1000 * np.median(times))
