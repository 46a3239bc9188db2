"""Scores against scikit-learn, intervals against simulation, tests against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

from hematovision.errors import DataError
from hematovision.learn.evaluation import (
    SUMMARY_METRICS,
    Interval,
    Predictions,
    compare,
    evaluate,
    read_predictions,
)

CLASSES = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")


def predictions(
    labels: NDArray[np.int64], said: NDArray[np.int64], sources: NDArray[np.str_] | None = None
) -> Predictions:
    """Return predictions of the four classes; every image is a photograph of its own unless told."""
    n = len(labels)
    ids = np.array([f"{i:05d}.png" for i in range(n)])
    probabilities = np.full((n, 4), 0.1, np.float32)
    probabilities[np.arange(n), said] = 0.7
    return Predictions(probabilities, labels, ids if sources is None else sources, ids, CLASSES)


def copies(
    labels: NDArray[np.int64], said: NDArray[np.int64], n: int, sources: NDArray[np.str_]
) -> Predictions:
    """Return predictions in which each photograph has ``n`` copies that are all answered alike."""
    return predictions(np.repeat(labels, n), np.repeat(said, n), np.repeat(sources, n))


def random_predictions(n: int, seed: int, n_classes: int = 4) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    said = np.where(rng.random(n) < 0.6, labels, rng.integers(0, 4, n))
    sources = np.array(
        [f"photo-{label}-{k}" for label, k in zip(labels, rng.integers(0, 12, n), strict=True)]
    )
    return predictions(labels, said, sources)


class TestPredictions:
    def test_what_follows_from_probabilities(self) -> None:
        p = predictions(np.array([0, 1, 2]), np.array([0, 3, 2]))
        assert p.predicted.tolist() == [0, 3, 2]
        assert p.correct.tolist() == [True, False, True]
        assert p.predicted.dtype == np.int64

    @pytest.mark.parametrize("short", ["probabilities", "labels", "sources", "image_ids", "classes"])
    def test_lengths_must_agree(self, short: str) -> None:
        p = predictions(np.array([0, 1, 2]), np.array([0, 1, 2]))
        with pytest.raises(DataError, match="predictions of unequal length: give one row an image"):
            Predictions(**{**vars(p), short: getattr(p, short)[:2]})

    def test_round_trip(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        sources = np.array(["007", "NA", "", "1e5", "x,y", 'a "b"'])
        ids = np.array(["1", "null", "nan", "é.png", "02", "03"])
        probabilities = rng.dirichlet(np.ones(4), 6).astype(np.float32)
        p = Predictions(probabilities, np.array([0, 1, 2, 3, 0, 1]), sources, ids, CLASSES)
        p.write(tmp_path / "p.csv")
        again = read_predictions(tmp_path / "p.csv")
        # seven decimals are written: half a unit of the last, and float32's own rounding
        assert np.abs(again.probabilities - p.probabilities).max() < 1.2e-7
        assert again.probabilities.dtype == np.float32
        assert again.labels.tolist() == p.labels.tolist()
        assert again.sources.tolist() == sources.tolist()
        assert again.image_ids.tolist() == ids.tolist()
        assert again.classes == CLASSES
        again.write(tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()

    def test_the_table_names_classes(self) -> None:
        frame = predictions(np.array([0, 1]), np.array([0, 3])).to_frame()
        assert frame["label"].tolist() == ["eosinophil", "lymphocyte"]
        assert frame["predicted"].tolist() == ["eosinophil", "neutrophil"]
        assert list(frame.columns[-4:]) == [f"p_{name}" for name in CLASSES]

    @pytest.mark.parametrize(
        "content",
        [
            None,
            "",
            "image,source\n1,2\n",
            "image,source,label,p_monocyte\n1,1,monocyte,much\n",
            "image,source,label,p_monocyte\n1,1,cat,1.0\n",
        ],
    )
    def test_a_file_that_holds_none(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "p.csv").write_text(content)
        with pytest.raises(DataError, match=r"p\.csv.*: run the notebook that writes it$") as caught:
            read_predictions(tmp_path / "p.csv")
        assert "\n" not in str(caught.value)


class TestValues:
    @pytest.mark.parametrize("seed", range(5))
    def test_are_those_of_scikit_learn(self, seed: int) -> None:
        p = random_predictions(200, seed)
        scores = evaluate(p, samples=100)
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            p.labels, p.predicted, labels=range(4), zero_division=0
        )
        expected = {
            "accuracy": metrics.accuracy_score(p.labels, p.predicted),
            "balanced_accuracy": metrics.balanced_accuracy_score(p.labels, p.predicted),
            "precision_macro": precision.mean(),
            "recall_macro": recall.mean(),
            "f1_macro": f1.mean(),
        }
        assert {k: v.value for k, v in scores.summary.items()} == pytest.approx(expected, abs=1e-12)
        for i, name in enumerate(CLASSES):
            values = {k: v.value for k, v in scores.per_class[name].items()}
            assert values == pytest.approx({"precision": precision[i], "recall": recall[i], "f1": f1[i]})
        assert np.array_equal(scores.confusion, metrics.confusion_matrix(p.labels, p.predicted))

    def test_a_class_that_does_not_occur_is_in_no_mean(self) -> None:
        p = random_predictions(200, 1, n_classes=3)
        assert 3 in p.predicted  # it is said, wrongly
        scores = evaluate(p, samples=100)
        present = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
        assert scores.summary["f1_macro"].value == pytest.approx(
            metrics.f1_score(p.labels, p.predicted, **present)
        )
        assert scores.summary["precision_macro"].value == pytest.approx(
            metrics.precision_score(p.labels, p.predicted, **present)
        )
        assert list(scores.per_class) == list(CLASSES[:3])

    def test_a_class_that_is_never_said_has_precision_zero(self) -> None:
        labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
        scores = evaluate(predictions(labels, np.where(labels == 3, 0, labels)), samples=100)
        assert scores.per_class["neutrophil"]["precision"] == Interval(0.0, 0.0, 0.0)
        assert scores.summary["precision_macro"].value == pytest.approx((0.5 + 1 + 1 + 0) / 4)

    def test_counts(self) -> None:
        labels = np.array([0, 0, 1, 1])
        p = predictions(labels, labels, np.array(["a", "a", "b", "c"]))
        scores = evaluate(p, samples=100)
        assert (scores.n_images, scores.n_photographs) == (4, 3)

    def test_plain_values_for_json(self) -> None:
        plain = evaluate(random_predictions(50, 0), samples=100).to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert tuple(plain["metrics"]) == SUMMARY_METRICS
        assert set(plain["metrics"]["accuracy"]) == {"value", "low", "high"}


class TestIntervals:
    def test_hold_the_value(self) -> None:
        scores = evaluate(random_predictions(150, 3), samples=500)
        intervals = [*scores.summary.values(), *(v for d in scores.per_class.values() for v in d.values())]
        assert len(intervals) == 5 + 3 * 4
        for interval in intervals:
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
            assert interval.high - interval.low > 0.02

    def test_are_repeatable_and_depend_on_the_seed(self) -> None:
        p = random_predictions(150, 3)
        assert evaluate(p, samples=200, seed=1).summary == evaluate(p, samples=200, seed=1).summary
        assert evaluate(p, samples=200, seed=1).summary != evaluate(p, samples=200, seed=2).summary

    def test_copies_that_agree_add_nothing(self) -> None:
        """With ten equal copies of each photograph the interval is as wide as without copies."""
        rng = np.random.default_rng(5)
        labels = np.repeat(np.arange(4), 20)
        said = np.where(rng.random(80) < 0.75, labels, (labels + 1) % 4)
        sources = np.array([f"photo-{i:02d}" for i in range(80)])
        clustered = evaluate(copies(labels, said, 10, sources)).summary["accuracy"]
        alone = evaluate(predictions(labels, said, sources)).summary["accuracy"]
        by_image = evaluate(predictions(np.repeat(labels, 10), np.repeat(said, 10))).summary["accuracy"]
        assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
        # ten times the images taken for independent: a factor of sqrt(10), within a quarter for the draws
        ratio = (clustered.high - clustered.low) / (by_image.high - by_image.low)
        assert ratio == pytest.approx(10**0.5, rel=0.25)

    def test_every_class_stays_in_every_draw(self) -> None:
        """One photograph of a class among a hundred: drawn regardless of class it would often be absent."""
        labels = np.array([3, *[0] * 100])
        scores = evaluate(predictions(labels, np.where(labels == 3, 3, 1)), samples=500)
        assert scores.per_class["neutrophil"]["recall"] == Interval(1.0, 1.0, 1.0)
        assert scores.summary["balanced_accuracy"] == Interval(0.5, 0.5, 0.5)

    def test_the_order_of_images_does_not_matter(self) -> None:
        p = random_predictions(120, 8)
        by_source = np.argsort(p.sources, kind="stable")
        sorted_p = Predictions(
            p.probabilities[by_source],
            p.labels[by_source],
            p.sources[by_source],
            p.image_ids[by_source],
            CLASSES,
        )
        a, b = (evaluate(x, samples=4000).summary["accuracy"] for x in (p, sorted_p))
        assert a.value == b.value
        # other draws, the same distribution: the ends' standard error is below 0.004 at 4000 draws
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.015)

    def test_cover_the_truth_as_often_as_they_say(self) -> None:
        """Simulated: 4 x 25 photographs, 8 copies each, a photograph's own rate of right answers.

        The rates follow a U-shaped beta distribution with mean 0.7. In 120 simulated sets a 95 %
        interval should hold 0.7 in 95 %; percentile intervals of 100 clusters lose a point or two
        (Davison and Hinkley 1997, section 5.3), and 120 trials have a standard error of 2 points.
        """
        rng = np.random.default_rng(11)
        labels = np.repeat(np.arange(4), 25 * 8)
        sources = np.repeat([f"photo-{i:03d}" for i in range(100)], 8)
        covered = {"photograph": 0, "image": 0}
        for trial in range(120):
            rates = np.repeat(rng.beta(0.7, 0.3, 100), 8)
            said = np.where(rng.random(800) < rates, labels, (labels + 1) % 4)
            for unit, clusters in (("photograph", sources), ("image", None)):
                found = evaluate(predictions(labels, said, clusters), samples=300, seed=trial)
                covered[unit] += found.summary["accuracy"].low <= 0.7 <= found.summary["accuracy"].high
        assert 0.89 <= covered["photograph"] / 120 <= 0.99
        assert covered["image"] / 120 < 0.8  # what ignoring the photograph would do

    def test_are_told_in_percent(self) -> None:
        assert str(Interval(0.876, 0.8, 0.95)) == "87.6 (80.0 to 95.0)"


class TestCompare:
    def pair(self, only_first: int, only_second: int, n_copies: int = 1) -> tuple[Predictions, Predictions]:
        """Return two models on 40 photographs, with the given discordant ones; the rest are right twice."""
        labels = np.tile(np.arange(4), 10)
        wrong = (labels + 1) % 4
        index = np.arange(40)
        a = np.where((index >= only_first) & (index < only_first + only_second), wrong, labels)
        b = np.where(index < only_first, wrong, labels)
        sources = np.array([f"photo-{i:02d}" for i in range(40)])
        return copies(labels, a, n_copies, sources), copies(labels, b, n_copies, sources)

    @pytest.mark.parametrize(
        ("only_first", "only_second", "p"),
        [
            (8, 2, 2 * (1 + 10 + 45) / 1024),
            (2, 8, 2 * (1 + 10 + 45) / 1024),
            (5, 0, 2 / 32),
            (1, 0, 1.0),
            (4, 4, 1.0),
        ],
    )
    def test_mcnemar_by_hand(self, only_first: int, only_second: int, p: float) -> None:
        result = compare(*self.pair(only_first, only_second), samples=200)
        assert (result.only_first, result.only_second) == (only_first, only_second)
        assert result.p_value == pytest.approx(p)
        tail = stats.binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)
        assert result.p_value == pytest.approx(min(1.0, 2 * tail))
        assert result.difference.value == pytest.approx((only_first - only_second) / 40)

    def test_copies_do_not_sharpen_it(self) -> None:
        one, twenty = (compare(*self.pair(8, 2, n), samples=500) for n in (1, 20))
        assert twenty.p_value == one.p_value
        assert (twenty.difference.low, twenty.difference.high) == pytest.approx(
            (one.difference.low, one.difference.high)
        )

    def test_identical_models(self) -> None:
        p = random_predictions(100, 2)
        result = compare(p, p, samples=200)
        assert result.p_value == 1.0
        assert result.difference == Interval(0.0, 0.0, 0.0)
        assert (result.only_first, result.only_second) == (0, 0)

    def test_a_photograph_is_right_by_more_than_half_of_its_images(self) -> None:
        labels, sources = np.zeros(4, np.int64), np.repeat("a", 4)
        half = predictions(labels, np.array([0, 0, 1, 1]), sources)
        most = predictions(labels, np.array([0, 0, 0, 1]), sources)
        result = compare(most, half, samples=100)
        assert (result.only_first, result.only_second) == (1, 0)
        assert result.difference.value == 0.25

    def test_swapping_the_models_changes_the_sign(self) -> None:
        a, b = self.pair(7, 3)
        forth, back = compare(a, b, samples=300, seed=4), compare(b, a, samples=300, seed=4)
        assert forth.p_value == back.p_value
        d = back.difference
        assert forth.difference == Interval(*(pytest.approx(x) for x in (-d.value, -d.high, -d.low)))

    def test_errors_in_common_cancel(self) -> None:
        """Both fail on the same 12 of 40 photographs and one on one more: the difference is well known."""
        labels = np.tile(np.arange(4), 10)
        index = np.arange(40)
        a = predictions(labels, np.where(index < 12, (labels + 1) % 4, labels))
        b = predictions(labels, np.where(index < 13, (labels + 1) % 4, labels))
        paired, single = compare(a, b).difference, evaluate(b).summary["accuracy"]
        assert paired.value == pytest.approx(1 / 40)
        # standard errors by the binomial: sqrt(p q / 40) with p = 1/40 and 27/40, that is 0.025 and 0.074
        assert paired.high - paired.low < 0.5 * (single.high - single.low)

    def test_of_other_images_is_refused(self) -> None:
        a, b = self.pair(1, 1)
        turned = Predictions(**{**vars(b), "image_ids": b.image_ids[::-1]})
        with pytest.raises(DataError, match="compared on the same images only: predict both on one list"):
            compare(a, turned)
