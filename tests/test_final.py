"""The sides of several sets, and the model that is chosen, averaged and judged on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_network import small_base
from test_pretraining import coloured_cells

from hematovision.classes import EIGHT, FOUR
from hematovision.data.cells import CellStore
from hematovision.data.sides import Sides, join_sides
from hematovision.data.splits import Split
from hematovision.errors import DataError
from hematovision.learn import final, runtime
from hematovision.learn.evaluation import Predictions
from hematovision.learn.pretraining import Plan, Stage


def four_cells(copies: int = 2) -> Sides:
    """Photographs of four classes with four copies each, as a study has them."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.tile(np.arange(4), 6), 4)
    images = rng.integers(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
    paths = [f"s{i:03d}.png" for i in range(len(labels))]
    groups = np.array([f"photograph-{i // 4}" for i in range(len(labels))])
    names = np.asarray(FOUR)[labels]
    table = pd.DataFrame({"dataset": "study", "path": paths, "label": names, "source": groups, "split": ""})
    part = np.arange(len(labels)) // 16 % 3
    sides = [tuple(np.asarray(paths)[part == k]) for k in range(3)]
    split = Split("official", *sides, extra={"test_simple": sides[2][:4]})
    return Sides(CellStore((images,), table, "four"), split, FOUR, np.eye(4)[labels], groups, copies)


@pytest.fixture(scope="module")
def both() -> dict[str, Sides]:
    return {"pbc": coloured_cells(), "study": four_cells()}


def test_joined_sides_hold_training_and_validation_of_both_and_no_test(both: dict[str, Sides]) -> None:
    together = final.joined(both)
    pbc, study = both.values()
    assert together.classes == EIGHT
    assert together.split.test == ()
    assert set(together.split.train) == {*pbc.split.train, *study.split.train}
    rows = together.rows("train")
    labels = together.cells.table["label"].to_numpy(str)[rows]
    assert (np.asarray(EIGHT)[together.labels[rows].argmax(axis=1)] == labels).all()
    assert together.copies == 2
    assert not set(together.split.train) & {*pbc.split.test, *study.split.test}


def test_a_set_with_other_classes_cannot_be_joined(both: dict[str, Sides]) -> None:
    with pytest.raises(DataError, match="is no class of the set joined to"):
        join_sides(both["study"], both["pbc"])


def test_counts_are_of_photographs(both: dict[str, Sides]) -> None:
    counts = both["study"].counts()
    assert counts[("images", "train")].sum() == 32
    assert counts[("photographs", "train")].sum() == 8


def predictions(classes: tuple[str, ...], labels: list[int], said: np.ndarray) -> Predictions:
    names = np.array([f"i{i}" for i in range(len(labels))])
    return Predictions(said.astype(np.float32), np.array(labels), names, names, classes)


def test_asked_about_four_classes_a_model_of_eight_gives_four_that_sum_to_one() -> None:
    said = np.full((2, 8), 0.05)
    said[0, 4], said[1, 2] = 0.65, 0.65  # a basophil, and a monocyte
    said[0, 1] = 0.1
    said /= said.sum(axis=1, keepdims=True)
    four = final.restrict(predictions(EIGHT, [1, 2], said), FOUR)
    assert four.classes == FOUR
    assert four.probabilities.sum(axis=1) == pytest.approx(1)
    # of the four that can occur the lymphocyte is the most probable: twice each other
    assert four.predicted.tolist() == [1, 2]
    assert four.probabilities[0, 1] == pytest.approx(0.4)
    turned = final.restrict(predictions(EIGHT, [1, 2], said), FOUR[::-1])
    assert turned.labels.tolist() == [2, 1]
    assert turned.correct.all()


def test_pooled_predictions_keep_labels_and_leave_absent_classes_at_nothing() -> None:
    four = predictions(FOUR, [3], np.array([[0.1, 0.2, 0.3, 0.4]]))
    eight = predictions(EIGHT, [7], np.eye(8)[[7]])
    pooled = final.pool([eight, four], EIGHT)
    assert pooled.labels.tolist() == [7, 3]
    assert pooled.probabilities[1] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0])


def test_mistakes_are_shown_once_a_photograph_the_surest_first() -> None:
    said = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    p = Predictions(
        said.astype(np.float32),
        np.array([1, 1, 1, 1]),
        np.array(["a", "a", "b", "c"]),
        np.array(["1", "2", "3", "4"]),
        ("eosinophil", "lymphocyte"),
    )
    wrong = final.mistakes(p, 5)
    assert wrong["image"].tolist() == ["1", "3"]
    assert wrong["predicted"].tolist() == ["eosinophil", "eosinophil"]


def test_candidates_are_trained_averaged_and_judged(
    both: dict[str, Sides], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path))
    runtime.start(1)
    small_base(monkeypatch)
    plan = Plan((Stage(32, 1, 1e-3),), precision="float32", batch_size=8)
    candidates = final.train_candidates("mobilenetv2", final.joined(both), plan, [1, 2], lambda _: None)
    assert [c.name for c in candidates] == ["seed 1", "seed 2", final.AVERAGE]
    one, two, mean = (c.model.get_weights() for c in candidates)
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b, m in zip(one, two, mean, strict=True):
        assert m == pytest.approx((a + b) / 2, abs=1e-6)
    judged = final.judge_candidates(candidates, both)
    assert set(judged.index) == {c.name for c in candidates}
    assert judged["loss"].is_monotonic_increasing
    assert {"pbc", "study", "mean"} <= set(judged.columns)
    said = final.predict_side(candidates[0].model, both["study"], "test_simple", EIGHT)
    assert said.classes == FOUR
    assert len(said.labels) == 4
    # as in training, two copies of a photograph validate
    validated = final.predict_side(candidates[0].model, both["study"], "validation", EIGHT)
    assert len(validated.labels) == 2 * len(set(validated.sources))
