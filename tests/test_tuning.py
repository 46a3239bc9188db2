"""The search: valid recipes, the same result twice and after a kill, a bounded disk, a JSON that trains."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_network import build_small, small_base

from hematovision.config import load_profile
from hematovision.data.cells import CellStore
from hematovision.errors import ConfigError, HematoVisionError
from hematovision.learn import backbones, runtime, training, tuning
from hematovision.learn.evaluation import Predictions
from hematovision.learn.recipe import (
    Recipe,
    TrainingData,
    build_head,
    compile_for_training,
    in_float32,
    load_model,
    save_model,
    train_classifier,
    training_data,
)
from hematovision.learn.training import TrainingDiverged
from hematovision.learn.tuning import Looks, RecipeTuner

keras = runtime.start(0)
SIZE, TRIALS = 16, 3
CLASSES = ("lymphocyte", "neutrophil")
HOUSE = Recipe(
    backbone="mobilenetv2",
    weights="none",
    classes=CLASSES,
    input_size=SIZE,
    precision="float32",
    batch_size=32,
    dropout=0.25,
    label_smoothing=0.0,
    augmentation=0.5,
    head_epochs=2,
    head_learning_rate=0.01,
    fine_tune_epochs=3,
    fine_tune_layers=0,
    fine_tune_learning_rate=0.003,
    copies_per_photograph=2,
    patience=3,
    seed=0,  # Keras Tuner's own trap: it takes 0 for "draw a seed"
)


def draw_data(recipe: Recipe = HOUSE, extra: int = 0) -> TrainingData:
    """Two copies of each of 24 drawn photographs, the last eight of them for validation."""
    rng = np.random.default_rng(1)
    n = 48 + extra
    kind = np.arange(n) // 2 % 2
    pictures = rng.integers(60, 190, (n, SIZE, SIZE, 3)).astype(np.uint8)
    pictures[kind == 1, 4:12, 4:12, 0] //= 2
    table = pd.DataFrame(
        {
            "dataset": ["drawn"] * 48 + ["other"] * extra,
            "path": [f"{i:02d}.png" for i in range(n)],
            "label": np.asarray(CLASSES)[kind],
            "source": [f"photo-{i // 2:02d}" for i in range(n)],
        }
    )
    train = np.concatenate([np.arange(32), np.arange(48, n)])
    return training_data(recipe, CellStore((pictures,), table, f"drawn-{extra}"), train, np.arange(32, 48))


def search(trials: int = TRIALS, house: Recipe = HOUSE) -> RecipeTuner:
    tuner = RecipeTuner(house, draw_data(house), tuning.search_space(house), trials=trials)
    tuner.search()
    return tuner


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    small_base(monkeypatch)
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


class TestSpace:
    def test_the_house_recipe_is_the_default(self) -> None:
        for house in (
            HOUSE,
            HOUSE.replace(optimizer="sgd", fine_tune_learning_rate=0.3, head_learning_rate=1.0),
        ):
            space = tuning.search_space(house)
            values = {p.name: p.default for p in space.space}
            assert house.replace(**tuning.to_changes(house, values)) == house

    def test_every_value_makes_a_recipe_that_a_profile_could_hold(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HEMATOVISION_HOME", str(Path(__file__).parents[1]))
        profile, house = (
            load_profile("full"),
            HOUSE.replace(weights="imagenet", fine_tune_learning_rate=0.001),
        )
        kept = ("backbone", "classes", "input_size")
        space = tuning.search_space(house)
        recipes = [
            house.replace(**tuning.to_changes(house, {p.name: p.random_sample(seed) for p in space.space}))
            for seed in range(40)
        ]
        for recipe in recipes:
            profile.replace(**{k: v for k, v in recipe.to_dict().items() if k not in kept})
        tried = {name: {getattr(r, name) for r in recipes} for name in ("optimizer", "batch_size", "head")}
        assert tried == {
            "optimizer": {"adam", "sgd"}, "batch_size": {16, 32}, "head": {"average", "attention"},
        }  # fmt: skip

    def test_layers_follow_from_the_backbone_and_from_its_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layers = {p.name: p for p in tuning.search_space(HOUSE).space}["fine_tune_layers"]
        assert (layers.default, type(layers).__name__) == (0, "Fixed")
        deep = keras.Sequential([keras.Input((4,)), *(keras.layers.ReLU() for _ in range(20))])
        monkeypatch.setattr(backbones, "build_base", lambda *_: deep)
        layers = {p.name: p for p in tuning.search_space(HOUSE.replace(weights="imagenet")).space}
        assert layers["fine_tune_layers"].get_config()["values"] == [0, 4, 10]

    def test_sgd_takes_longer_rates_than_adam(self) -> None:
        values = {"optimizer": "sgd", "learning_rate": 0.0003, "dropout": 0.1}
        assert tuning.to_changes(HOUSE, values) == {
            "optimizer": "sgd", "dropout": 0.1, "fine_tune_learning_rate": 0.03, "head_learning_rate": 1.0,
        }  # fmt: skip


class TestObjective:
    def test_photographs_and_classes_count_alike(self) -> None:
        probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1, 0], [0.8, 0.2]], np.float32)
        said = Predictions(
            probabilities,
            np.array([0, 0, 0, 1]),
            np.array(["a", "a", "b", "c"]),
            np.array(list("wxyz")),
            CLASSES,
        )
        first = ((math.log(2) + math.log(4)) / 2 + 0) / 2
        # probabilities are float32: seven digits
        assert tuning.balanced_loss(said) == pytest.approx((first + math.log(5)) / 2, rel=1e-6)

    def test_chance_is_the_logarithm_of_the_classes(self) -> None:
        said = Predictions(np.full((4, 2), 0.5, np.float32), np.array([0, 0, 0, 1]), np.array(list("abcd")),
                           np.array(list("abcd")), CLASSES)  # fmt: skip
        assert tuning.balanced_loss(said) == pytest.approx(math.log(2))


class TestLooks:
    def test_the_best_third_goes_on(self) -> None:
        earlier = [([1.0, loss], True) for loss in (0.5, 0.6, 0.7, 0.8, 0.9)]
        looks = Looks(20, earlier)
        # two of six: better than four of the five before
        assert [looks.is_weak([1.0, loss]) for loss in (0.4, 0.55, 0.65, 0.95)] == [False, False, True, True]

    def test_the_first_trial_is_never_weak(self) -> None:
        assert not Looks(20, []).is_weak([9.0, 9.0])

    def test_nobody_is_stopped_between_looks_or_at_the_end(self) -> None:
        earlier = [([0.1] * 6, False)]
        weak = [Looks(6, earlier).is_weak([0.5] * n) for n in range(1, 7)]
        assert weak == [False, True, False, False, False, False]
        assert [n for n in range(1, 21) if Looks(20, [([0.1] * 20, False)]).is_weak([0.5] * n)] == [2, 6, 18]

    def test_a_trial_that_ended_by_itself_is_compared_later_too(self) -> None:
        ended, stopped = ([0.1, 0.2, 0.3], False), ([0.1, 0.2, 0.3], True)
        assert Looks(20, [ended]).is_weak([0.5] * 6)
        assert not Looks(20, [stopped]).is_weak([0.5] * 6)

    def test_a_trial_that_diverged_at_once_is_no_bar(self) -> None:
        assert not Looks(20, [([], False)]).is_weak([0.5, 0.5])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted search: its table, its best, and the files that it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        small_base(patch)
        patch.setenv("HEMATOVISION_CACHE", str(tmp_path_factory.mktemp("whole")))
        tuner = search()
        files = {
            p.relative_to(tuner.folder): p.stat().st_size for p in tuner.folder.rglob("*") if p.is_file()
        }
        return tuner.table(), tuner.best(), files


class TestSearch:
    def test_the_first_trial_is_the_house_recipe(self, whole: Any) -> None:
        table = whole[0]
        assert table["trial"].tolist() == [1, 2, 3]
        first = table.iloc[0]
        assert first["learning_rate"] == HOUSE.fine_tune_learning_rate
        for name in ("optimizer", "batch_size", "dropout", "head", "fine_tune_layers", "augmentation"):
            assert first[name] == getattr(HOUSE, name)
        assert len(table.drop_duplicates(["learning_rate", "dropout"])) == TRIALS

    def test_the_best_has_the_lowest_balanced_loss(self, whole: Any) -> None:
        table, best, _ = whole
        row = table.loc[table["balanced_loss"].idxmin()]
        assert HOUSE.replace(**best).dropout == row["dropout"]
        assert table["balanced_loss"].between(0, 5).all()
        assert table["balanced_accuracy"].between(0, 1).all()

    def test_no_weights_are_kept(self, whole: Any) -> None:
        files = whole[2]
        assert {path.suffix for path in files} == {".json"}
        assert sum(files.values()) < 20_000 * TRIALS

    def test_another_seed_draws_other_trials(self, whole: Any) -> None:
        house = HOUSE.replace(seed=1)
        oracle = RecipeTuner(house, draw_data(house), tuning.search_space(house), trials=2).oracle
        assert oracle.populate_space("0")["values"]["dropout"] == HOUSE.dropout
        assert oracle.populate_space("1")["values"]["learning_rate"] != whole[0]["learning_rate"][1]

    def test_a_stopped_search_goes_on_inside_its_trial(
        self, whole: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Stopped in the second epoch of the third trial: two trials are kept, and one epoch.

        What the interrupted search computes is equal to what the whole one did, so this also shows that
        the same seed gives the same trials and the same scores.
        """
        save, epochs = training.Resumable.save, []

        def stop(run: training.Resumable, epoch: int, *rest: Any) -> None:
            epochs.append(epoch)
            if len(epochs) == stop_at:
                raise KeyboardInterrupt
            save(run, epoch, *rest)

        stop_at = int(whole[0]["epochs"][:2].sum()) + 2
        monkeypatch.setattr(training.Resumable, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            search()
        assert len(list((Path(os.environ["HEMATOVISION_CACHE"])).rglob("trial-*.json"))) == 2
        capsys.readouterr()
        before = len(epochs)
        tuner = search()
        pd.testing.assert_frame_equal(tuner.table(), whole[0])
        # the epoch that was interrupted and those after it; not one before
        assert len(epochs) - before == whole[0]["epochs"].sum() - (stop_at - 1)
        lines = capsys.readouterr().out.splitlines()
        assert [line[:10] for line in lines] == [f"trial {n:2d}/3" for n in (1, 2, 3)]
        assert not list(tuner.folder.glob("checkpoints-*"))

    @pytest.mark.slow
    def test_a_killed_search_goes_on(self, whole: Any) -> None:
        done = subprocess.run([sys.executable, __file__, "5"], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        tuner = search()
        pd.testing.assert_frame_equal(tuner.table(), whole[0])
        assert not list(tuner.folder.glob("checkpoints-*"))

    def test_half_a_book_of_keras_tuner_does_no_harm(self, whole: Any) -> None:
        tuner = search(1)
        for name in ("oracle.json", "tuner0.json"):
            (tuner.folder / "keras_tuner" / name).write_text('{"trials": ')
        pd.testing.assert_frame_equal(search().table(), whole[0])

    def test_more_trials_go_on_where_the_last_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = search(1).table()
        trained: list[Recipe] = []
        run = tuning.run_recipe
        monkeypatch.setattr(tuning, "run_recipe", lambda r, *rest: (trained.append(r), run(r, *rest))[1])
        pd.testing.assert_frame_equal(search(2).table().head(1), first)
        assert len(trained) == 1

    def test_a_diverged_trial_scores_as_chance_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def diverge(*_: Any, **__: Any) -> None:
            raise TrainingDiverged("training diverged in epoch 1")

        monkeypatch.setattr(tuning, "train_classifier", diverge)
        row = search(1).table().iloc[0]
        assert (row["ended"], row["epochs"], row["balanced_accuracy"]) == ("diverged", 0, 0.5)
        assert row["balanced_loss"] == pytest.approx(math.log(2))

    def test_any_other_failure_ends_the_search(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise HematoVisionError("cannot use x", "the disk is full")

        monkeypatch.setattr(tuning, "train_classifier", fail)
        with pytest.raises(HematoVisionError, match="the disk is full"):
            search(1)

    def test_nothing_to_search_with(self) -> None:
        for house, trials in ((HOUSE, 0), (HOUSE.replace(fine_tune_epochs=0), 1)):
            with pytest.raises(ConfigError, match="at least one trial of one epoch"):
                RecipeTuner(house, draw_data(house), tuning.search_space(house), trials=trials)


class TestBest:
    def test_travels_as_json_and_trains(self) -> None:
        values = {"optimizer": "sgd", "learning_rate": 0.001, "head": "attention", "dropout": 0.1}
        best = json.loads(json.dumps(tuning.to_changes(HOUSE, values)))
        tuned = HOUSE.replace(**best, fine_tune_epochs=1)
        assert (tuned.optimizer, tuned.head, tuned.fine_tune_learning_rate) == ("sgd", "attention", 0.1)
        trained = train_classifier(tuned, draw_data(tuned))
        assert list(trained.histories) == ["fine_tune"]
        assert trained.model(np.zeros((3, SIZE, SIZE, 3), np.float32)).shape == (3, 2)


class TestFewerPhotographs:
    def test_those_of_the_validated_set_stay_and_others_fill_up(self) -> None:
        data = draw_data(extra=40)
        few = tuning.fewer_photographs(data, 20, 3)
        sets = data.cells.table["dataset"].to_numpy(str)[few.train]
        assert (sets == "drawn").sum() == 32
        assert len(set(few.sources[few.train])) == 20
        assert (sets == "other").sum() == 8
        assert np.array_equal(few.train, tuning.fewer_photographs(data, 20, 3).train)
        assert not np.array_equal(few.train, tuning.fewer_photographs(data, 20, 4).train)
        assert np.array_equal(few.validation, data.validation)

    def test_none_is_taken_away_unless_asked_or_needed(self) -> None:
        data = draw_data(extra=4)
        assert tuning.fewer_photographs(data, 0, 1).train.tolist() == data.train.tolist()
        assert tuning.fewer_photographs(data, 99, 1).train.tolist() == data.train.tolist()
        assert len(tuning.fewer_photographs(data, 3, 1).train) == 32


class TestImportance:
    NAMES = ("learning_rate", "optimizer", "dropout")

    def table(self, n: int) -> pd.DataFrame:
        rng = np.random.default_rng(2)
        rate = 10 ** rng.uniform(-4, -2, n)
        return pd.DataFrame(
            {
                "learning_rate": rate,
                "optimizer": rng.choice(["adam", "sgd"], n),
                "dropout": rng.uniform(0, 0.5, n),
                "balanced_loss": (np.log10(rate) + 3) ** 2,
            }
        )

    def test_finds_what_decides(self) -> None:
        found = tuning.importance(self.table(40), list(self.NAMES), 5)
        assert found["name"][0] == "learning_rate"
        assert found["importance"][0] > 0.8
        assert found["importance"].sum() == pytest.approx(1)
        pd.testing.assert_frame_equal(found, tuning.importance(self.table(40), list(self.NAMES), 5))

    @pytest.mark.parametrize("n", [1, 3])
    def test_few_trials_are_enough_to_say_something(self, n: int) -> None:
        found = tuning.importance(self.table(n), list(self.NAMES), 5)
        assert sorted(found["name"]) == sorted(self.NAMES)
        assert np.isfinite(found[["importance", "spread"]].to_numpy()).all()

    def test_equal_trials_say_nothing(self) -> None:
        found = tuning.importance(self.table(5).assign(balanced_loss=0.5), list(self.NAMES), 5)
        assert (found["importance"] == 0).all()


class TestHeads:
    @pytest.mark.parametrize("channels", [512, 1280, 2048])
    def test_attention_fits_every_backbone_and_any_size(self, channels: int) -> None:
        head = backbones.build_head(channels, 4, 0.3, 1, "attention")
        for size in (1, 4):
            said = head(np.random.default_rng(0).normal(size=(2, size, size, channels)).astype(np.float32))
            assert said.shape == (2, 4)
            assert np.asarray(said).sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert head.count_params() < 1_000_000

    def test_places_are_weighed_and_their_order_is_not(self) -> None:
        head = backbones.build_head(512, 4, 0.0, 1, "attention")
        x = np.random.default_rng(0).normal(size=(1, 3, 3, 512)).astype(np.float32) * 3
        turned = np.asarray(head(x[:, ::-1, ::-1]))
        # float32 sums in another order
        assert np.abs(turned - np.asarray(head(x))).max() < 1e-5
        assert (
            np.abs(np.asarray(head(np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape))) - turned).max()
            > 1e-3
        )

    def test_same_seed_same_weights(self) -> None:
        one, same, other = (
            backbones.build_head(512, 4, 0.3, seed, "attention").get_weights() for seed in (1, 1, 2)
        )
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        query, key = one[2], one[4]
        assert query.shape == key.shape == (256, 4, 64)
        assert not np.array_equal(query, key)

    def test_an_unknown_one(self) -> None:
        with pytest.raises(ValueError, match="there is no head 'maximum'"):
            backbones.build_head(512, 4, 0.3, 1, "maximum")

    @pytest.mark.parametrize("kind", backbones.HEADS)
    def test_saved_and_loaded_in_float32(self, kind: str, tmp_path: Path) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        recipe = HOUSE.replace(head=kind, precision="mixed_bfloat16")
        base = build_small("mobilenetv2", "none", 1)
        mixed = backbones.build_classifier(
            "mobilenetv2", base, build_head(recipe), SIZE, frozen_batch_norm=True
        )
        plain = in_float32(recipe, mixed)
        assert mixed.get_layer("mobilenetv2").compute_dtype == "bfloat16"
        assert all(
            np.array_equal(a, b) for a, b in zip(mixed.get_weights(), plain.get_weights(), strict=True)
        )
        save_model(plain, tmp_path / "m.keras")
        images = draw_data().cells.read(np.arange(4)).astype(np.float32)
        assert np.array_equal(load_model(tmp_path / "m.keras")(images), plain(images))

    def test_attention_has_no_stage_on_frozen_features(self) -> None:
        recipe = HOUSE.replace(weights="imagenet")
        assert [recipe.frozen_epochs, recipe.replace(head="attention").frozen_epochs] == [2, 0]
        assert HOUSE.frozen_epochs == 0
        names = list(train_classifier(recipe.replace(fine_tune_epochs=0), draw_data()).histories)
        assert names == ["head"]


class TestOptimizers:
    def compiled(self, optimizer: str) -> Any:
        model = build_head(HOUSE)
        compile_for_training(model, HOUSE.replace(optimizer=optimizer), 0.25)
        return model.optimizer

    def test_sgd_has_nesterov_s_momentum(self) -> None:
        sgd = self.compiled("sgd")
        assert isinstance(sgd, keras.optimizers.SGD)
        assert (sgd.momentum, sgd.nesterov, sgd.global_clipnorm) == (0.9, True, 1.0)
        assert float(sgd.learning_rate) == 0.25

    def test_adam_is_the_default(self) -> None:
        assert isinstance(self.compiled("adam"), keras.optimizers.Adam)
        defaults = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name in ("optimizer", "head")}
        assert defaults == {"optimizer": "adam", "head": "average"}

    def test_an_unknown_one(self) -> None:
        with pytest.raises(ValueError, match="there is no optimizer 'lbfgs'"):
            self.compiled("lbfgs")


def _die_after(epochs: int) -> None:
    """Search, and kill this process when so many epochs have been saved."""
    save, saved = training.Resumable.save, []

    def save_and_die(run: training.Resumable, epoch: int, *rest: Any) -> None:
        save(run, epoch, *rest)
        saved.append(epoch)
        if len(saved) == epochs:
            os.kill(os.getpid(), signal.SIGKILL)

    training.Resumable.save = save_and_die  # type: ignore[method-assign]
    backbones.build_base = build_small
    search()


if __name__ == "__main__":
    _die_after(int(sys.argv[1]))
