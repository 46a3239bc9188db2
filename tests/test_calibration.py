"""Calibration is fitted, measured and used by photograph, and finds what was put in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from hematovision.errors import DataError
from hematovision.learn.calibration import (
    TEMPERATURES,
    apply_temperature,
    area_under_risk_coverage,
    choose_threshold,
    fit_temperature,
    measure_calibration,
    photograph_weights,
    reliability_table,
    risk_coverage,
)
from hematovision.learn.evaluation import Predictions

CLASSES = ("lymphocyte", "monocyte", "neutrophil")


def predictions(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], sources: NDArray[np.str_] | None = None
) -> Predictions:
    n = len(labels)
    ids = np.array([f"{i}.png" for i in range(n)], str)
    classes = tuple(f"class {i}" for i in range(probabilities.shape[1]))
    given = ids if sources is None else sources
    return Predictions(probabilities.astype(np.float32), labels.astype(np.int64), given, ids, classes)


def drawn(n: int, temperature: float, seed: int = 0) -> Predictions:
    """Return images whose labels were drawn with the probabilities, then sharpened by a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, 3))
    true = special.softmax(logits, axis=1)
    labels = (rng.random((n, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(max=2)
    return predictions(special.softmax(logits * temperature, axis=1), labels)


def binary(confidence: list[float], correct: list[int], sources: list[str] | None = None) -> Predictions:
    """Return images of one class that are named with a confidence, rightly or not."""
    sure, right = np.array(confidence), np.array(correct, bool)
    said = np.column_stack([np.where(right, sure, 1 - sure), np.where(right, 1 - sure, sure)])
    return predictions(said, np.zeros(len(sure), np.int64), None if sources is None else np.array(sources))


def copied(p: Predictions, times: NDArray[np.integer]) -> Predictions:
    rows = np.repeat(np.arange(len(p.labels)), times)
    return Predictions(p.probabilities[rows], p.labels[rows], p.sources[rows], p.image_ids[rows], p.classes)


class TestTemperature:
    # with 20,000 labels the standard error of a fitted temperature is about 1 %
    @pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
    def test_a_known_temperature_is_found(self, true: float) -> None:
        assert fit_temperature(drawn(20_000, true)) == pytest.approx(true, rel=0.04)

    def test_it_is_the_minimum_of_the_likelihood(self) -> None:
        p = drawn(500, 1.7)
        best = fit_temperature(p)
        losses = [
            measure_calibration(apply_temperature(p, best * f), samples=2).nll.value for f in (0.97, 1, 1.03)
        ]
        assert losses[1] == min(losses)

    def test_copies_of_a_photograph_change_nothing(self) -> None:
        p = drawn(300, 1.7)
        hard = np.where(p.correct, 1, 40)
        # the same objective in another order of summation
        assert fit_temperature(copied(p, hard)) == pytest.approx(fit_temperature(p), rel=1e-4)
        by_image = fit_temperature(copied(p, hard), np.ones(hard.sum()))
        assert by_image > 1.5 * fit_temperature(p)

    def test_weights_give_each_photograph_the_same(self) -> None:
        p = binary([0.9] * 5, [1] * 5, ["a", "a", "a", "b", "c"])
        assert photograph_weights(p) == pytest.approx(np.array([1, 1, 1, 3, 3]) * 5 / 9)

    def test_a_set_without_errors_does_not_make_a_model_infallible(self) -> None:
        assert fit_temperature(binary([0.9, 0.95, 0.8], [1, 1, 1])) == pytest.approx(
            TEMPERATURES[0], rel=1e-3
        )

    def test_no_label_changes(self) -> None:
        p = drawn(200, 2.0)
        warm = apply_temperature(p, 2.0)
        assert np.array_equal(warm.predicted, p.predicted)
        assert warm.probabilities.dtype == np.float32
        np.testing.assert_allclose(warm.probabilities.sum(axis=1), 1, atol=1e-6)

    def test_nothing_to_fit_on(self) -> None:
        empty = predictions(np.zeros((0, 3)), np.zeros(0, np.int64))
        for work in (fit_temperature, measure_calibration, reliability_table, risk_coverage):
            with pytest.raises(DataError, match="no predictions"):
                work(empty)  # type: ignore[operator]


class TestMeasures:
    def test_perfect_calibration_has_no_error(self) -> None:
        p = binary([0.75] * 4 + [0.6] * 5, [1, 1, 1, 0, 1, 1, 1, 0, 0])
        assert measure_calibration(p, samples=20).ece.value == pytest.approx(0, abs=1e-7)

    def test_known_values(self) -> None:
        p = binary([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1])
        found = measure_calibration(p, bins=2, samples=50)
        # bins {0.6, 0.6} and {0.9, 0.9}: |0.6 - 1| and |0.9 - 0.5|, each half of the images
        assert found.ece.value == pytest.approx(0.4, abs=1e-6)
        assert found.overconfidence.value == pytest.approx(0.0, abs=1e-6)
        assert found.brier.value == pytest.approx((2 * 0.01 + 2 * 0.81 + 4 * 0.16) / 4, abs=1e-6)
        assert found.nll.value == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean(), abs=1e-6)
        assert (found.bins, found.n_images, found.n_photographs) == (2, 4, 4)
        assert found.to_dict()["ece"]["value"] == found.ece.value

    def test_the_right_temperature_mends_the_error(self) -> None:
        p = drawn(5000, 2.5)
        before, after = (measure_calibration(apply_temperature(p, t), samples=200) for t in (1.0, 2.5))
        assert before.ece.low > 0.05
        assert before.overconfidence.low > 0.05
        # the noise of 15 bins of 333 images: 0.8 * sqrt(0.2 / 333), about 2 %
        assert after.ece.value < 0.03
        # three standard errors of a mean of 5000 whose spread is about 0.35
        assert abs(after.overconfidence.value) < 0.015
        assert after.nll.high < before.nll.low

    def test_order_does_not_matter_even_where_confidences_are_equal(self) -> None:
        p = binary([0.9] * 50 + [0.7] * 50, [1, 0] * 50)
        order = np.random.default_rng(0).permutation(100)
        mixed = Predictions(
            p.probabilities[order], p.labels[order], p.sources[order], p.image_ids[order], p.classes
        )
        assert measure_calibration(mixed, samples=2).ece.value == pytest.approx(
            measure_calibration(p, samples=2).ece.value
        )
        assert len(reliability_table(p)) == 2

    def test_copies_add_no_certainty(self) -> None:
        p = drawn(150, 1.5)  # a multiple of the bins, so that they part copies as they part photographs
        many = copied(p, np.full(150, 30))
        one, copies = measure_calibration(p), measure_calibration(many)
        assert copies.n_photographs == 150
        # thirty copies of a photograph hold no more than one
        for name in ("ece", "overconfidence", "brier", "nll"):
            a, b = getattr(one, name), getattr(copies, name)
            assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), abs=1e-6)

    def test_intervals_hold_their_value_and_repeat(self) -> None:
        found = measure_calibration(drawn(400, 1.0), seed=3)
        for name in ("ece", "overconfidence", "brier", "nll"):
            interval = getattr(found, name)
            assert interval.low <= interval.value <= interval.high
            assert interval.low < interval.high
        assert found == measure_calibration(drawn(400, 1.0), seed=3)
        assert found != measure_calibration(drawn(400, 1.0), seed=4)


class TestReliability:
    def test_bins_of_equal_mass_from_the_least_confidence(self) -> None:
        p = drawn(300, 1.0)
        table = reliability_table(p, bins=10)
        assert table["images"].tolist() == [30] * 10
        assert table["confidence"].is_monotonic_increasing
        assert (table["images"] * table["accuracy"]).sum() == pytest.approx(p.correct.sum())
        assert list(table) == ["confidence", "accuracy", "low", "high", "images", "photographs"]

    def test_the_interval_counts_photographs(self) -> None:
        p = binary([0.8] * 40, [1, 1, 1, 0] * 10, [f"{i % 10}" for i in range(40)])
        row = reliability_table(p).iloc[0]
        assert (row["images"], row["photographs"]) == (40, 10)
        expected = stats.binomtest(30, 40).proportion_ci(method="wilson")
        assert row["low"] < expected.low
        assert row["high"] > expected.high
        alone = reliability_table(replace(p, sources=p.image_ids)).iloc[0]
        assert (alone["low"], alone["high"]) == pytest.approx((expected.low, expected.high))


class TestRiskCoverage:
    def test_known_values(self) -> None:
        p = binary([0.9, 0.6, 0.8, 0.8], [1, 0, 1, 0])
        frame = risk_coverage(p)
        assert frame["threshold"].tolist() == pytest.approx([0.9, 0.8, 0.6])
        assert frame["coverage"].tolist() == pytest.approx([0.25, 0.75, 1.0])
        assert frame["risk"].tolist() == pytest.approx([0, 1 / 3, 1 / 2])
        # the two images at 0.8 are accepted together
        expected = (0 + 1 / 3 + 1 / 3 + 1 / 2) / 4
        assert area_under_risk_coverage(p, samples=10).value == pytest.approx(expected)

    def test_the_last_risk_is_the_error_of_all(self) -> None:
        p = drawn(500, 1.0)
        frame = risk_coverage(p)
        assert frame["coverage"].iloc[-1] == 1
        assert frame["risk"].iloc[-1] == pytest.approx(1 - p.correct.mean())
        assert frame["coverage"].is_monotonic_increasing

    def test_a_confidence_that_knows_is_worth_more_than_one_that_does_not(self) -> None:
        p = drawn(1000, 1.0)
        area = area_under_risk_coverage(p, samples=300)
        assert area.low < area.value < area.high
        blind = np.random.default_rng(0).permutation(np.linspace(0.5, 1, 1000))
        without = area_under_risk_coverage(binary(list(blind), list(p.correct)), samples=300)
        assert area.high < without.low
        assert without.value == pytest.approx(1 - p.correct.mean(), abs=0.05)


class TestThreshold:
    def test_the_bound_and_not_the_accuracy_reaches_the_target(self) -> None:
        p = drawn(2000, 1.0)
        threshold = choose_threshold(p, 0.9)
        accepted = p.probabilities.max(axis=1) >= threshold
        right, n = p.correct[accepted].sum(), accepted.sum()
        assert stats.beta.ppf(0.05, right, n - right + 1) >= 0.9
        assert 0.5 <= accepted.mean() < 1
        # a step of one percent of coverage further down, it fails or fails to be proven
        lower = np.quantile(p.probabilities.max(axis=1), 1 - accepted.mean() - 0.011)
        more = p.probabilities.max(axis=1) >= lower
        assert stats.beta.ppf(0.05, p.correct[more].sum(), more.sum() - p.correct[more].sum() + 1) < 0.9

    def test_a_higher_target_leaves_more_to_a_person(self) -> None:
        p = drawn(2000, 1.0)
        found = [choose_threshold(p, target) for target in (0.6, 0.85, 0.92)]
        assert found == sorted(set(found))
        assert found[0] == p.probabilities.max(axis=1).min()

    def test_copies_prove_nothing(self) -> None:
        right = binary([0.9] * 20, [1] * 20)
        # 20 of 20 right: the lower bound is 0.05 ** (1 / 20) = 0.861
        assert choose_threshold(right, 0.86) == pytest.approx(0.9)
        many = copied(right, np.full(20, 50))
        assert choose_threshold(many, 0.86) == pytest.approx(0.9)
        for p in (right, many):
            with pytest.raises(DataError, match=r"the bound is 0\.861: lower the target"):
                choose_threshold(p, 0.87)

    def test_a_model_that_is_never_right(self) -> None:
        with pytest.raises(DataError, match=r"the bound is 0\.000"):
            choose_threshold(binary([0.9, 0.8], [0, 0]), 0.5)
