"""How far a model's probabilities can be believed, and when a cell is better left to a person.

The intervals are bootstraps over photographs, drawn within each class, as in `evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, stats

from hematovision.errors import DataError
from hematovision.learn.evaluation import Interval, Predictions, draw_photographs
from hematovision.probabilities import LEAST_PROBABILITY, calibrate

BINS = 15
"""Bins of a reliability diagram and of the calibration error, as in Guo et al. 2017."""

TEMPERATURES = (0.2, 10.0)
"""Bounds of a fitted temperature. Published ones lie between about 0.5 (trained with smoothed labels)
and 5. Where a small validation set is named without one error the likelihood grows without end as the
temperature falls: the bound keeps a model from being called infallible on the strength of it."""

_THRESHOLD_STEPS = 51  # one threshold for each percent of coverage from the half to the whole


def photograph_weights(predictions: Predictions) -> NDArray[np.float64]:
    """Return a weight for each image that makes all photographs count alike; they sum to N."""
    codes, strata = predictions.photographs
    copies = np.bincount(codes)
    return len(codes) / (len(strata) * copies[codes])


def fit_temperature(predictions: Predictions, weights: NDArray[np.float64] | None = None) -> float:
    """Return the temperature that makes the labels of a validation set most likely.

    One number is fitted, by maximum likelihood (Guo et al. 2017), so that no label changes and little
    can be overfitted.

    Parameters
    ----------
    predictions : Predictions
        Of images the model was not trained on, uncalibrated.
    weights : float array of shape (N,), optional
        By default each photograph counts alike, however many copies there are of it: copies err
        together, and one hard photograph with forty copies would otherwise set the temperature.

    Returns
    -------
    float
        Within `TEMPERATURES`; above 1 for a model that is too sure of itself.

    Raises
    ------
    DataError
        If there is nothing to fit on.
    """
    _require_images(predictions)
    weights = photograph_weights(predictions) if weights is None else weights

    def loss(log_temperature: float) -> float:
        said = calibrate(predictions.probabilities, float(np.exp(log_temperature)))
        return float(np.average(_negative_log_likelihood(said, predictions.labels), weights=weights))

    # convex in 1 / temperature, so there is one minimum
    bounds = tuple(np.log(TEMPERATURES))
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with calibrated probabilities; no label changes."""
    said = calibrate(predictions.probabilities, temperature).astype(np.float32)
    return replace(predictions, probabilities=said)


@dataclass(frozen=True)
class Calibration:
    """How well probabilities fit what happens, on one set of images.

    Attributes
    ----------
    ece : Interval
        Expected calibration error of the named class (Naeini et al. 2015) over bins of equal mass
        (Nguyen and O'Connor 2015), 0 to 1. It is biased upwards on few images, and so is its interval.
    overconfidence : Interval
        Mean confidence less accuracy, -1 to 1; above 0 for a model that is too sure of itself.
    brier : Interval
        Brier score over all classes (Brier 1950), 0 to 2.
    nll : Interval
        Mean negative log-likelihood of the label, in nats.
    bins, n_images, n_photographs : int
    """

    ece: Interval
    overconfidence: Interval
    brier: Interval
    nll: Interval
    bins: int
    n_images: int
    n_photographs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``metrics.json``."""
        scores = ("ece", "overconfidence", "brier", "nll")
        counts = ("bins", "n_images", "n_photographs")
        return {k: getattr(self, k).to_dict() for k in scores} | {k: getattr(self, k) for k in counts}


def measure_calibration(
    predictions: Predictions, *, bins: int = BINS, samples: int = 2000, seed: int = 0
) -> Calibration:
    """Measure how far probabilities can be believed, with 95 % intervals bootstrapped by photograph.

    Every image counts alike, as in `evaluation.evaluate`. The bins stay those of the whole set in
    every draw.

    Raises
    ------
    DataError
        If there are no images.
    """
    _require_images(predictions)
    confidence, correct = _confidence(predictions), predictions.correct.astype(float)
    said, labels = predictions.probabilities.astype(np.float64), predictions.labels
    one_hot = np.eye(said.shape[1])[labels]
    losses = np.column_stack(
        [
            confidence - correct,
            ((said - one_hot) ** 2).sum(axis=1),
            _negative_log_likelihood(said, labels),
        ]
    )
    codes, strata = predictions.photographs
    counts = draw_photographs(strata, samples, seed)
    images = np.bincount(codes).astype(float)
    gap, brier, nll = (_spread(np.bincount(codes, column), images, counts) for column in losses.T)
    gaps = _sum_by_bin(codes, _equal_mass(confidence, bins), confidence - correct)
    value, spread = _ece(gaps.sum(axis=0), images.sum()), _ece(counts @ gaps, counts @ images)
    low, high = np.percentile(spread, [2.5, 97.5])
    # resampling adds noise, which counts as error in every bin: the draws lie above the value
    ece = Interval(float(value), float(min(low, value)), float(max(high, value)))
    return Calibration(ece, gap, brier, nll, bins, len(labels), len(strata))


def reliability_table(predictions: Predictions, bins: int = BINS) -> pd.DataFrame:
    """Return what a reliability diagram shows: confidence against accuracy in bins of equal mass.

    Returns
    -------
    DataFrame
        One row a bin, from the least confidence up: ``confidence`` (mean), ``accuracy``, ``low``,
        ``high``, ``images``, ``photographs``. The interval is Wilson's 95 % (Wilson 1927) with the
        photographs of the bin for its n, as if all copies of one were a single observation.
    """
    _require_images(predictions)
    confidence = _confidence(predictions)
    frame = pd.DataFrame(
        {
            "bin": _equal_mass(confidence, bins),
            "confidence": confidence,
            "accuracy": predictions.correct.astype(float),
            "photograph": predictions.photographs[0],
        }
    )
    grouped = frame.groupby("bin")
    table = grouped[["confidence", "accuracy"]].mean()
    table["images"], table["photographs"] = grouped.size(), grouped["photograph"].nunique()
    low, high = _wilson(table["accuracy"].to_numpy(), table["photographs"].to_numpy(float))
    table.insert(2, "low", low)
    table.insert(3, "high", high)
    return table.reset_index(drop=True)


def risk_coverage(predictions: Predictions) -> pd.DataFrame:
    """Return the error among accepted images for every threshold on confidence.

    Returns
    -------
    DataFrame
        One row for each distinct confidence, from the strictest: ``threshold`` (images at least as
        sure are accepted), ``coverage`` (share accepted) and ``risk`` (share of those that are
        wrong), each 0 to 1 (El-Yaniv and Wiener 2010).
    """
    _require_images(predictions)
    order, last = _strictest_first(_confidence(predictions))
    wrong = np.cumsum(~predictions.correct[order])
    accepted = np.unique(last) + 1
    return pd.DataFrame(
        {
            "threshold": _confidence(predictions)[order][accepted - 1],
            "coverage": accepted / len(order),
            "risk": wrong[accepted - 1] / accepted,
        }
    )


def area_under_risk_coverage(predictions: Predictions, *, samples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean risk over all coverages (Geifman and El-Yaniv 2017), less is better.

    The interval is a 95 % bootstrap by photograph.
    """
    _require_images(predictions)
    order, last = _strictest_first(_confidence(predictions))
    wrong = (~predictions.correct[order]).astype(float)
    codes, strata = predictions.photographs
    codes = codes[order]

    def area(counts: NDArray[np.float64]) -> float:
        weights = counts[codes]
        accepted, failed = np.cumsum(weights)[last], np.cumsum(weights * wrong)[last]
        return float(np.average(failed / np.maximum(accepted, 1), weights=weights))

    spread = [area(counts) for counts in draw_photographs(strata, samples, seed)]
    low, high = np.percentile(spread, [2.5, 97.5])
    return Interval(area(np.ones(len(strata))), float(low), float(high))


def choose_threshold(predictions: Predictions, target_accuracy: float, *, level: float = 0.95) -> float:
    """Return the least confidence at which the accepted cells are named as well as was asked for.

    What must reach the target is not the accuracy seen but its one-sided exact lower bound (Clopper
    and Pearson 1934), counted in photographs. Thresholds are tried from the one that accepts half of
    the images down to the one that accepts all, as long as the bound holds: a sequence fixed in
    advance needs no correction for the number of thresholds tried (Angelopoulos et al. 2021, "Learn
    then Test").

    Parameters
    ----------
    predictions : Predictions
        Of a validation set, calibrated as the released model will be (`apply_temperature`).
    target_accuracy : float
        Of the accepted cells, between 0 and 1.
    level : float
        Confidence of the bound.

    Returns
    -------
    float
        For ``Thresholds.confidence``. Where all images may be accepted it is the least confidence
        seen, not 0: nothing is known of cells that are less sure than any here.

    Raises
    ------
    DataError
        If the bound does not reach the target even for the surer half; it says what is reached.
    """
    _require_images(predictions)
    confidence = _confidence(predictions)
    coverages = np.linspace(0.5, 1.0, _THRESHOLD_STEPS)
    thresholds = np.quantile(confidence, 1 - coverages, method="lower")
    codes, correct = predictions.photographs[0], predictions.correct
    accepted = (confidence >= t for t in thresholds)
    bounds = [_accuracy_bound(codes[rows], correct[rows], level) for rows in accepted]
    failed = np.flatnonzero(np.array(bounds) < target_accuracy)
    if failed.size and failed[0] == 0:
        raise DataError(
            f"no threshold is known to reach an accuracy of {target_accuracy:g}: for the surer half of "
            f"{len(confidence)} images the bound is {bounds[0]:.3f}",
            "lower the target or validate on more photographs",
        )
    return float(thresholds[failed[0] - 1] if failed.size else thresholds[-1])


def choose_threshold_or(predictions: Predictions, target_accuracy: float, *, default: float) -> float:
    """Return `choose_threshold`, or a default where too few photographs can prove the target."""
    try:
        return choose_threshold(predictions, target_accuracy)
    except DataError:
        return default


def _accuracy_bound(codes: NDArray[np.int64], correct: NDArray[np.bool_], level: float) -> float:
    # a photograph counts once, with the share of its accepted copies that are right
    copies = np.bincount(codes)
    right = np.bincount(codes, weights=correct)
    shares = right[copies > 0] / copies[copies > 0]
    k, n = float(shares.sum()), len(shares)
    return float(stats.beta.ppf(1 - level, k, n - k + 1)) if k > 0 else 0.0


def _require_images(predictions: Predictions) -> None:
    if not len(predictions.labels):
        raise DataError("there are no predictions", "predict at least one image")


def _confidence(predictions: Predictions) -> NDArray[np.float64]:
    return predictions.probabilities.max(axis=1).astype(np.float64)


def _negative_log_likelihood(said: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    return -np.log(np.maximum(said[np.arange(len(labels)), labels], LEAST_PROBABILITY))


def _sum_by_bin(
    codes: NDArray[np.int64], bins: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    sums = np.zeros((codes.max() + 1, bins.max() + 1))
    np.add.at(sums, (codes, bins), values)
    return sums


def _spread(sums: NDArray[Any], images: NDArray[np.float64], counts: NDArray[np.float64]) -> Interval:
    low, high = np.percentile((counts @ sums) / (counts @ images), [2.5, 97.5])
    return Interval(float(sums.sum() / images.sum()), float(low), float(high))


def _equal_mass(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Return the bin of each image, shape (N,): bins of equal mass, equal confidences together.

    Neither depends on the order of the images; bins that ties leave empty are not counted.
    """
    edges = np.quantile(confidence, np.arange(1, bins) / bins, method="lower")
    found = np.searchsorted(edges, confidence, side="left")
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def _ece(gaps: NDArray[np.float64], images: Any) -> Any:
    # the share of a bin times |confidence - accuracy| is its summed gap over all images
    return np.abs(gaps).sum(axis=-1) / images


def _wilson(
    share: NDArray[np.float64], n: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    z = float(stats.norm.ppf(0.975))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def _strictest_first(confidence: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order by falling confidence, and for each place the last place as sure as it."""
    order = np.argsort(-confidence, kind="stable")
    falling = -confidence[order]
    return order, np.searchsorted(falling, falling, side="right").astype(np.int64) - 1
