"""The audit finds labels that were made wrong, judges photographs and not copies, and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from hematovision.errors import DataError
from hematovision.learn.evaluation import Predictions
from hematovision.learn.label_audit import COLUMNS, apply_audit, find_suspects, out_of_fold_probabilities

CLASSES = ("lymphocyte", "monocyte", "neutrophil")
PER_CLASS, COPIES, WIDTH = 40, 3, 12


def synthetic(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Return features, true labels and photographs: three clouds, three copies a photograph."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), PER_CLASS)
    photographs = 5 * np.eye(3, WIDTH)[labels] + rng.normal(0, 0.7, (len(labels), WIDTH))
    features = np.repeat(photographs, COPIES, axis=0) + rng.normal(0, 0.2, (COPIES * len(labels), WIDTH))
    names = np.repeat([f"photograph {i:03d}" for i in range(len(labels))], COPIES)
    return features.astype(np.float32), np.repeat(labels, COPIES).astype(np.int64), names


def ids(n: int) -> NDArray[np.str_]:
    return np.array([f"{i}.png" for i in range(n)])


def audit(labels: NDArray[np.int64], features: NDArray[np.float32], names: NDArray[np.str_]) -> pd.DataFrame:
    said = out_of_fold_probabilities(features, labels, names)
    return find_suspects(labels, said, ids(len(labels)), names, CLASSES)


class TestFolds:
    def test_no_photograph_is_in_two_folds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sklearn.pipeline import Pipeline

        features, labels, names = synthetic()
        # the number of the photograph travels along as a feature that nothing depends on
        marked = np.column_stack([features, np.unique(names, return_inverse=True)[1]]).astype(np.float32)
        learned: list[set[float]] = []
        asked: list[set[float]] = []
        fit, predict = Pipeline.fit, Pipeline.predict_proba

        def spy_on_fit(pipeline: Pipeline, x: Any, y: Any) -> Pipeline:
            learned.append(set(x[:, -1]))
            return fit(pipeline, x, y)

        def spy_on_predict(pipeline: Pipeline, x: Any) -> Any:
            asked.append(set(x[:, -1]))
            return predict(pipeline, x)

        monkeypatch.setattr(Pipeline, "fit", spy_on_fit)
        monkeypatch.setattr(Pipeline, "predict_proba", spy_on_predict)
        said = out_of_fold_probabilities(marked, labels, names, folds=4)
        assert len(learned) == len(asked) == 4
        everyone = set(marked[:, -1])
        assert all(a.isdisjoint(b) and a | b == everyone for a, b in zip(learned, asked, strict=True))
        assert sum(map(len, asked)) == len(everyone)
        assert said.dtype == np.float32
        np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-5)

    def test_a_photograph_cannot_be_learned_by_heart(self) -> None:
        # every photograph has a feature of its own and a random label: with a copy in training all were right
        rng = np.random.default_rng(0)
        labels = np.repeat(rng.permutation(np.arange(60) % 2), 4)
        names = np.repeat([f"p{i}" for i in range(60)], 4)
        features = 10 * np.repeat(np.eye(60), 4, axis=0).astype(np.float32)
        said = out_of_fold_probabilities(features, labels, names)
        assert (said.argmax(axis=1) == labels).mean() < 0.7
        leaky = out_of_fold_probabilities(features, labels, ids(240))
        assert (leaky.argmax(axis=1) == labels).mean() > 0.95

    def test_repeats_with_its_seed(self) -> None:
        features, labels, names = synthetic()
        first = out_of_fold_probabilities(features, labels, names, seed=1)
        assert np.array_equal(first, out_of_fold_probabilities(features, labels, names, seed=1))
        assert not np.array_equal(first, out_of_fold_probabilities(features, labels, names, seed=2))

    def test_too_few_photographs(self) -> None:
        features, labels, names = synthetic()
        with pytest.raises(DataError, match="41 folds need 41 photographs of every class, one has 40"):
            out_of_fold_probabilities(features, labels, names, folds=41)
        with pytest.raises(DataError, match="one has 0"):
            out_of_fold_probabilities(features[:0], labels[:0], names[:0])


class TestSuspects:
    def test_flipped_labels_are_found_with_their_true_class(self) -> None:
        features, truth, names = synthetic()
        labels, flipped = truth.copy(), {"photograph 003": 2, "photograph 055": 0, "photograph 095": 1}
        for name, wrong in flipped.items():
            labels[names == name] = wrong
            features[names == name] *= 1.5  # a clear case: only those surer than the average are evidence
        found = audit(labels, features, names)
        assert list(found) == list(COLUMNS)
        assert set(found["source"][:3]) == set(flipped)
        assert len(found) <= 4
        for row in found[:3].itertuples():
            assert row.given == CLASSES[flipped[row.source]]
            assert row.suggested == CLASSES[truth[names == row.source][0]]
            assert (row.copies, row.copies_disagreeing) == (COPIES, COPIES)
        assert found["rank"].tolist() == list(range(1, len(found) + 1))
        assert found["self_confidence"].is_monotonic_increasing

    def test_clean_labels_are_left_alone(self) -> None:
        features, labels, names = synthetic()
        assert audit(labels, features, names).empty
        assert list(audit(labels, features, names)) == list(COLUMNS)

    def test_one_row_a_photograph_with_its_worst_copy(self) -> None:
        labels = np.repeat([0, 0, 0, 1, 1, 1], 2).astype(np.int64)
        names = np.repeat(list("abcdef"), 2)
        said = np.array([[0.9, 0.1]] * 6 + [[0.1, 0.9]] * 6, np.float32)
        said[2:4] = [[0.3, 0.7], [0.02, 0.98]]  # both copies of b
        said[6] = [0.6, 0.4]  # one copy of d, which stays a monocyte on the whole
        found = find_suspects(labels, said, ids(12), names, ("lymphocyte", "monocyte"))
        assert len(found) == 1
        row = found.iloc[0]
        assert (row["source"], row["image"], row["given"], row["suggested"]) == (
            "b",
            "3.png",
            "lymphocyte",
            "monocyte",
        )
        assert (row["self_confidence"], row["worst_confidence"]) == pytest.approx((0.16, 0.02))
        assert (row["rank"], row["copies"], row["copies_disagreeing"]) == (1, 2, 2)

    def test_the_labels_of_a_linked_group_are_judged_apart(self) -> None:
        features, labels, names = synthetic()
        names[names == "photograph 060"] = "photograph 000"  # a monocyte and a lymphocyte in one group
        labels[:COPIES] = 2
        found = audit(labels, features, names)
        assert found["source"].tolist() == ["photograph 000"]
        assert found["given"].tolist() == ["neutrophil"]
        assert found["copies"].tolist() == [COPIES]

    def test_classes_that_do_not_occur(self) -> None:
        features, labels, names = synthetic()
        labels[:COPIES] = 2
        said = out_of_fold_probabilities(features, labels, names)
        wide = np.zeros((len(labels), 5), np.float32)
        wide[:, [0, 2, 4]] = said
        found = find_suspects(2 * labels, wide, ids(len(labels)), names, ("a", "b", "c", "d", "e"))
        assert found["source"].tolist() == ["photograph 000"]
        assert (found["given"][0], found["suggested"][0]) == ("e", "a")

    @pytest.mark.filterwarnings("error")
    def test_quiet(self, capfd: pytest.CaptureFixture[str]) -> None:
        features, labels, names = synthetic()
        labels[:COPIES] = 2
        assert len(audit(labels, features, names)) == 1
        assert capfd.readouterr() == ("", "")


class TestApply:
    @pytest.fixture
    def predictions(self) -> Predictions:
        said = np.array([[0.9, 0.1]] * 4 + [[0.2, 0.8]] * 4, np.float32)
        labels = np.array([0, 0, 1, 1, 1, 1, 0, 0])
        return Predictions(said, labels, np.repeat(list("abcd"), 2), ids(8), ("eosinophil", "neutrophil"))

    def test_suspected_photographs_are_left_out_with_all_copies(self, predictions: Predictions) -> None:
        before = predictions.labels.copy()
        suspects = pd.DataFrame({"source": ["b", "z"], "given": ["neutrophil", "monocyte"]})
        kept = apply_audit(predictions, suspects)
        assert kept.sources.tolist() == ["a", "a", "c", "c", "d", "d"]
        assert kept.correct.tolist() == [True] * 4 + [False] * 2
        assert np.array_equal(predictions.labels, before)
        assert len(predictions.labels) == 8

    def test_the_suspicion_is_of_a_label(self, predictions: Predictions) -> None:
        other = pd.DataFrame({"source": ["b"], "given": ["eosinophil"]})
        assert len(apply_audit(predictions, other).labels) == 8
        assert len(apply_audit(predictions, other.iloc[:0]).labels) == 8

    def test_nothing_left(self, predictions: Predictions) -> None:
        names = np.array(predictions.classes)[predictions.labels]
        with pytest.raises(DataError, match="every photograph is under suspicion"):
            apply_audit(predictions, pd.DataFrame({"source": predictions.sources, "given": names}))
