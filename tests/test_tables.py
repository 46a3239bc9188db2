"""Tables of the notebooks: every number under its own name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hematovision.learn.evaluation import SUMMARY_METRICS, Predictions, evaluate
from hematovision.report import plots, tables

CLASSES = ("eosinophil", "lymphocyte", "monocyte")


def predictions(seed: int, right: float) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 20)
    said = np.where(rng.random(60) < right, labels, rng.integers(0, 3, 60))
    probabilities = np.full((60, 3), 0.1, np.float32)
    probabilities[np.arange(60), said] = 0.8
    names = np.array([f"i{i:02d}" for i in range(60)])
    return Predictions(probabilities, labels, np.array([f"p{i // 4}" for i in range(60)]), names, CLASSES)


@pytest.fixture(scope="module")
def said() -> dict:
    return {
        (name, test_set): predictions(10 * i + j, right)
        for i, (name, right) in enumerate({"vgg16": 0.4, "mobilenetv2": 0.9}.items())
        for j, test_set in enumerate(("TEST", "TEST_SIMPLE", tables.RANDOM))
    }


@pytest.fixture(scope="module")
def scores(said: dict) -> dict:
    return {key: evaluate(value, samples=100) for key, value in said.items()}


@pytest.fixture(scope="module")
def trainings(scores: dict) -> dict:
    def training(name: str, weights: str, parameters: int) -> dict:
        validation = json.loads(json.dumps(scores[name, "TEST"].to_dict(), sort_keys=True))
        recipe = {"weights": weights, "input_size": 48}
        return {"recipe": recipe, "parameters": parameters, "epochs": 3, "validation": validation}

    return {"vgg16": training("vgg16", "none", 20), "mobilenetv2": training("mobilenetv2", "imagenet", 10)}


def test_the_best_on_validation_comes_first_and_among_equals_the_smaller(trainings: dict) -> None:
    assert tables.order_by_validation(trainings) == ["mobilenetv2", "vgg16"]
    alike = {name: {**t, "validation": trainings["vgg16"]["validation"]} for name, t in trainings.items()}
    assert tables.order_by_validation(alike) == ["mobilenetv2", "vgg16"]
    assert tables.validation_table(trainings).index.tolist() == ["MobileNetV2", "VGG16"]
    assert tables.choice_entry(trainings)["backbone"] == "mobilenetv2"


def test_a_row_from_a_file_has_every_score_under_its_own_name(scores: dict) -> None:
    s = scores["vgg16", "TEST"]
    # JSON files have sorted keys: the order of their values is not that of the scores
    read = json.loads(json.dumps(s.to_dict()["metrics"], sort_keys=True))
    assert list(read) != list(SUMMARY_METRICS)
    assert tables.summary_row(read) == tables.summary_row(s.summary)
    assert tables.summary_row(read)["precision macro"] == str(s.summary["precision_macro"])


def test_scores_by_test_set_and_backbone(scores: dict, trainings: dict) -> None:
    table = tables.score_table(scores, trainings)
    row = table.loc[("TEST", "MobileNetV2, ImageNet")]
    assert row["accuracy"] == str(scores["mobilenetv2", "TEST"].summary["accuracy"])
    assert row["precision"] == str(scores["mobilenetv2", "TEST"].summary["precision_macro"])
    assert row["images (photographs)"] == "60 (15)"
    by_class = tables.class_table(scores, "TEST")
    assert by_class.loc[("monocyte", "VGG16"), "recall"] == str(
        scores["vgg16", "TEST"].per_class["monocyte"]["recall"]
    )


def test_the_leak_has_a_share_only_where_something_was_learned_before(scores: dict, trainings: dict) -> None:
    leak = tables.leak_table(scores, trainings, published=True)
    expected = (
        scores["mobilenetv2", tables.RANDOM].summary["accuracy"].value
        - scores["mobilenetv2", "TEST"].summary["accuracy"].value
    )
    assert leak.loc["MobileNetV2", "the leak's share"] == pytest.approx(expected)
    assert np.isnan(leak.loc["VGG16", "the leak's share"])
    assert tables.leak_entry(leak) == {"points": {"MobileNetV2": pytest.approx(expected)}}
    assert "published" not in tables.leak_table(scores, trainings, published=False)
    blank = {name: {**t, "recipe": {**t["recipe"], "weights": "none"}} for name, t in trainings.items()}
    assert tables.leak_entry(tables.leak_table(scores, blank, published=False)) == {"points": {}}


def test_every_split_of_the_forest_has_a_colour(scores: dict, trainings: dict) -> None:
    forest = tables.forest_table(scores, trainings, published=True)
    assert set(forest["split"]) == set(plots.SPLIT_COLOURS)
    assert len(forest) == 6
    home = {"balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    elsewhere = tables.transfer_forest({"drawn cells": scores["vgg16", "TEST"]}, home)
    assert set(elsewhere["trained on"]) == set(plots.SOURCE_COLOURS)


def test_pairs_are_compared_in_order(said: dict) -> None:
    pairs = tables.paired_comparisons(said, ["mobilenetv2", "vgg16"], "TEST", samples=100, seed=0)
    assert [(p["first"], p["second"]) for p in pairs] == [("MobileNetV2", "VGG16")]
    assert pairs[0]["difference"]["value"] > 0
    assert "difference" not in tables.pair_table(pairs)


def test_entries_say_which_split_they_belong_to(scores: dict, trainings: dict) -> None:
    entries = tables.model_entries(scores, trainings)
    assert {e["split"] for e in entries if e["test_set"] == tables.RANDOM} == {"random"}
    assert {e["split"] for e in entries if e["test_set"] != tables.RANDOM} == {"official"}
    alone = tables.transfer_entries({"pbc": scores["vgg16", "TEST"]}, "vgg16", "none")
    assert alone[0]["split"] == "trained on pbc alone"


def test_one_network_alone_has_no_pairs_and_an_empty_table() -> None:
    assert tables.paired_comparisons({}, ["vgg16"], "TEST", samples=10, seed=0) == []
    assert tables.pair_table([]).empty
