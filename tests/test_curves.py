"""Learning curves: nested photographs, one recipe, as many steps for few as for many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_network import small_base

from hematovision.classes import FOUR
from hematovision.config import load_profile
from hematovision.data.cells import CellStore
from hematovision.data.splits import Split
from hematovision.data.study import Study
from hematovision.learn import curves, recipe, runtime

COPIES = 3


@pytest.fixture
def study(tmp_path: Path) -> tuple[Study, CellStore]:
    """Forty photographs of four classes, three copies each: half of them train, a quarter validates."""
    rows, sides = [], {"train": [], "validation": [], "test": []}
    for i in range(40):
        side = "train" if i < 20 else "validation" if i < 30 else "test"
        for c in range(COPIES):
            path = f"{side}/{i}-{c}.png"
            sides[side].append(path)
            split = "test" if side == "test" else "train"
            rows.append((path, "synthetic", FOUR[i % 4], f"p{i:02d}", split, f"{i}{c}", 32, 32, "ok"))
    columns = ["path", "dataset", "label", "source", "split", "sha256", "width", "height", "status"]
    manifest = pd.DataFrame(rows, columns=columns)
    groups = manifest.set_index("path")["source"].rename("group")
    made = Study(tmp_path / "run", "synthetic", tmp_path, manifest, groups, pd.DataFrame(), {})
    made.write_split(Split("official", *(tuple(sides[s]) for s in ("train", "validation", "test"))))
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), 32, 32, 3)).astype(np.uint8)
    return made, CellStore((pixels,), manifest, "curves")


def test_sizes_stop_at_what_there_is(study: tuple[Study, CellStore]) -> None:
    assert curves.curve_sizes(study[0], [5, 10, 50, 0]) == [5, 10, 20]


def test_what_starts_from_nothing_takes_larger_steps_where_it_can() -> None:
    values = load_profile("quick").to_dict()
    rates = {
        (b, w): curves.curve_recipe(values, b, w).fine_tune_learning_rate
        for b in ("vgg16", "resnet50")
        for w in ("none", "hematovision")
    }
    assert rates["resnet50", "none"] > rates["resnet50", "hematovision"]
    assert rates["vgg16", "none"] == rates["vgg16", "hematovision"]
    made = curves.curve_recipe(values, "vgg16", "none")
    assert (made.input_size, made.copies_per_photograph) == (
        values["curve_input_size"],
        values["curve_copies"],
    )


def test_a_curve_has_a_row_a_size_and_few_photographs_are_seen_more_often(
    study: tuple[Study, CellStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.start(1)
    small_base(monkeypatch)
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))
    seen = []
    train = recipe.train_classifier

    def spy(choices: recipe.Recipe, data: recipe.TrainingData, **options: bool) -> recipe.Trained:
        seen.append((choices.fine_tune_epochs, set(data.sources[data.train])))
        return train(choices, data, **options)

    monkeypatch.setattr(recipe, "train_classifier", spy)
    values = load_profile("quick").to_dict() | {
        "curve_input_size": 32,
        "batch_size": 4,
        "curve_copies": COPIES,
    }
    choices = curves.curve_recipe(values, "mobilenetv2", "none")
    lines: list[str] = []
    curve = curves.learning_curve(*study, choices, [4, 20], steps=12, samples=50, say=lines.append)
    assert curve["photographs"].tolist() == [4, 20]
    assert curve["images"].tolist() == [4 * COPIES, 20 * COPIES]
    assert ((curve["low"] <= curve["value"]) & (curve["value"] <= curve["high"])).all()
    # twelve steps of four images: four epochs of twelve images, and not less than two of sixty
    assert [epochs for epochs, _ in seen] == [4, 2]
    assert seen[0][1] < seen[1][1]
    assert not seen[1][1] & {f"p{i}" for i in range(20, 40)}
    assert lines[0].startswith("MobileNetV2, from scratch:   4 photographs")
