"""One call trains as the notebook does; equal recipes on equal data give equal models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from small_network import small_base

from hematovision.config import load_profile
from hematovision.data.cells import CellStore
from hematovision.learn import backbones, runtime
from hematovision.learn import recipe as recipe_module
from hematovision.learn.evaluation import measure_latency, predict_images
from hematovision.learn.recipe import (
    Recipe,
    build_training_model,
    checkpoint_folder,
    compile_for_training,
    in_float32,
    load_model,
    predict_rows,
    save_model,
    train_classifier,
    training_data,
)
from hematovision.learn.training import ordered_batches

keras = runtime.start(0)
SIZE, N = 32, 24
CLASSES = ("lymphocyte", "neutrophil")
RECIPE = Recipe(
    backbone="mobilenetv2",
    weights="none",
    classes=CLASSES,
    input_size=SIZE,
    precision="mixed_bfloat16",
    batch_size=8,
    dropout=0.2,
    label_smoothing=0.05,
    augmentation=1.0,
    head_epochs=1,
    head_learning_rate=0.01,
    fine_tune_epochs=1,
    fine_tune_layers=8,
    fine_tune_learning_rate=0.001,
    copies_per_photograph=2,
    patience=2,
    seed=4,
)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keras.config.set_dtype_policy("float32")
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))


def draw_cells() -> CellStore:
    """Return drawn cells, violet lobes or a round nucleus; four copies of each of six photographs."""
    rng = np.random.default_rng(0)
    pictures = np.full((N, SIZE, SIZE, 3), (214, 210, 208), np.uint8)
    for i, picture in enumerate(pictures):
        x, y = rng.integers(13, 19, 2).tolist()
        cv2.circle(picture, (x, y), 12, (190, 160, 198), -1)
        for dx in (-5, 5) if (i // 4) % 2 else (0,):
            cv2.circle(picture, (x + dx, y), 5 if (i // 4) % 2 else 10, (110, 80, 180), -1)
    table = pd.DataFrame(
        {
            "dataset": "drawn",
            "path": [f"{i:02d}.png" for i in range(N)],
            "label": [CLASSES[(i // 4) % 2] for i in range(N - 1)] + ["platelet"],
            "source": [f"photo-{i // 4}" for i in range(N)],
        }
    )
    return CellStore((pictures,), table, "drawn")


@pytest.fixture
def cells() -> CellStore:
    return draw_cells()


def data_of(cells: CellStore, recipe: Recipe = RECIPE) -> Any:
    return training_data(recipe, cells, np.arange(16), np.arange(16, 23))


class TestRecipe:
    def test_every_choice_is_a_key_of_the_profile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HEMATOVISION_HOME", str(Path(__file__).parents[1]))
        values = load_profile("full").for_backbone("vgg16") | {"backbone": "vgg16", "unrelated": 1}
        recipe = Recipe.from_values(values)
        assert recipe.classes == ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
        assert recipe.weights == values["weights"]
        assert isinstance(recipe.input_size, int)

    def test_travels_as_json(self) -> None:
        assert Recipe.from_values(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE

    def test_pretrained(self) -> None:
        assert [RECIPE.replace(weights=w).pretrained for w in ("none", "imagenet", "a.h5")] == [
            False,
            True,
            True,
        ]


class TestTrainingData:
    def test_labels_and_sides(self, cells: CellStore) -> None:
        data = data_of(cells)
        assert data.labels.shape == (N, 2)
        assert data.labels[:23].sum() == 23
        assert data.labels[23].tolist() == [0, 0]  # a platelet is none of the classes
        assert data.labels.argmax(axis=1)[[0, 4, 8]].tolist() == [0, 1, 0]
        assert data.train.tolist() == list(range(16))

    def test_validation_holds_some_copies_always_the_same(self, cells: CellStore) -> None:
        data = data_of(cells)
        counts = pd.Series(data.sources[data.validation]).value_counts().to_dict()
        assert counts == {"photo-4": 2, "photo-5": 2}
        assert np.array_equal(data.validation, data_of(cells).validation)
        everything = data_of(cells, RECIPE.replace(copies_per_photograph=0))
        assert everything.validation.tolist() == list(range(16, 23))

    def test_groups_take_the_place_of_photographs(self, cells: CellStore) -> None:
        data = training_data(RECIPE, cells, np.arange(16), np.arange(16, 23), ["one"] * N)
        assert len(data.validation) == 2
        assert set(data.sources) == {"one"}

    def test_class_weights(self, cells: CellStore) -> None:
        assert data_of(cells).class_weights(RECIPE) == {0: 1.0, 1: 1.0}


class TestCheckpointFolder:
    def test_follows_from_recipe_and_data(self, cells: CellStore, tmp_path: Path) -> None:
        folder = checkpoint_folder(RECIPE, data_of(cells), "head")
        assert folder == checkpoint_folder(RECIPE, data_of(draw_cells()), "head")
        assert folder.parent == tmp_path / "cache" / "checkpoints"
        assert folder.name.startswith("mobilenetv2-head-")

    def test_another_for_another_stage_or_any_other_choice(self, cells: CellStore) -> None:
        data = data_of(cells)
        folders = {checkpoint_folder(RECIPE, data, stage) for stage in ("head", "fine_tune")}
        for field in dataclasses.fields(Recipe):
            value = getattr(RECIPE, field.name)
            other = (
                value + 1
                if isinstance(value, (int, float))
                else (*value, "x")
                if field.name == "classes"
                else "x"
            )
            folders.add(checkpoint_folder(RECIPE.replace(**{field.name: other}), data, "head"))
        assert len(folders) == 2 + len(dataclasses.fields(Recipe))

    def test_another_for_other_data(self, cells: CellStore) -> None:
        rows = np.arange(16), np.arange(16, 23)
        relabelled = dataclasses.replace(cells, table=cells.table.assign(label=CLASSES[0]))
        folders = {
            checkpoint_folder(RECIPE, data, "head")
            for data in (
                data_of(cells),
                data_of(dataclasses.replace(cells, key="other pixels")),
                data_of(relabelled),
                training_data(RECIPE, cells, *rows, ["one"] * N),
                training_data(RECIPE, cells, rows[0][1:], rows[1]),
                training_data(RECIPE, cells, rows[0], rows[1][1:]),
            )
        }
        assert len(folders) == 6

    def test_another_for_a_weight_file_of_the_same_name(self, cells: CellStore, tmp_path: Path) -> None:
        file = tmp_path / "w.h5"
        recipe, folders = RECIPE.replace(weights=str(file)), set()
        for content in (b"one", b"two"):
            file.write_bytes(content)
            folders.add(checkpoint_folder(recipe, data_of(cells), "head"))
        assert len(folders) == 2

    def test_another_for_other_code(self, cells: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
        before = checkpoint_folder(RECIPE, data_of(cells), "head")
        monkeypatch.setattr(recipe_module, "sha256_file", lambda _: "changed")
        assert checkpoint_folder(RECIPE, data_of(cells), "head") != before


class TestModels:
    def test_training_model_shares_weights_and_adds_augmentation(
        self, monkeypatch: pytest.MonkeyPatch, cells: CellStore
    ) -> None:
        small_base(monkeypatch)
        classifier = in_float32(RECIPE, self.classifier())
        model = build_training_model(RECIPE, classifier)
        images = cells.read(np.arange(4)).astype(np.float32)
        assert [id(w) for w in model.trainable_weights] == [id(w) for w in classifier.trainable_weights]
        assert np.array_equal(model(images, training=False), classifier(images))
        assert not np.allclose(model(images, training=True), classifier(images), atol=1e-3)

    def test_every_random_layer_is_in_reach_of_the_epoch_s_seed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `Resumable` sets at the start of an epoch, so that a resumed epoch repeats."""
        small_base(monkeypatch)
        model = build_training_model(RECIPE, self.classifier())
        generators = [v.path for v in model.variables if "seed_generator_state" in v.path]
        # two flips, rotation, shift, zoom, colour and focus jitter, and the head's dropout
        assert len(generators) == 8

    def classifier(self) -> Any:
        base = backbones.build_base("mobilenetv2", "none", 1)
        head = backbones.build_head(1280, 2, 0.2, 1)
        return backbones.build_classifier("mobilenetv2", base, head, SIZE, frozen_batch_norm=False)

    def test_float32_says_what_bfloat16_said(self, cells: CellStore) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        recipe = RECIPE.replace(backbone="vgg16")
        head = backbones.build_head(512, 2, 0.2, 1)
        base = backbones.build_base("vgg16", "none", 1)
        mixed = backbones.build_classifier("vgg16", base, head, SIZE, frozen_batch_norm=False)
        plain = in_float32(recipe, mixed)
        images = cells.read(np.arange(N)).astype(np.float32)
        rough, exact = (m(images, training=False).numpy() for m in (mixed, plain))
        assert base.compute_dtype == "bfloat16"
        assert plain.get_layer("vgg16").compute_dtype == "float32"
        # bfloat16 keeps eight bits (0.4 %), and the errors of thirteen layers add up
        assert 0 < np.abs(rough - exact).max() < 0.05
        assert np.ptp(exact[:, 0]) > 0.05  # it is no constant that the two agree on
        assert all(
            np.array_equal(a, b) for a, b in zip(mixed.get_weights(), plain.get_weights(), strict=True)
        )

    def test_compiled_for_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small_base(monkeypatch)
        model = self.classifier()
        compile_for_training(model, RECIPE, 0.125)
        assert float(model.optimizer.learning_rate) == 0.125
        assert model.optimizer.global_clipnorm == 1.0
        assert model.loss.label_smoothing == RECIPE.label_smoothing

    def test_predictions_name_their_images(self, monkeypatch: pytest.MonkeyPatch, cells: CellStore) -> None:
        small_base(monkeypatch)
        model, data = self.classifier(), data_of(cells)
        rows = np.array([20, 3, 4])
        said = predict_rows(model, data, rows, RECIPE)
        assert said.image_ids.tolist() == ["20.png", "03.png", "04.png"]
        assert said.sources.tolist() == ["photo-5", "photo-0", "photo-1"]
        assert said.labels.tolist() == [1, 0, 1]
        alone = model(cells.read(rows).astype(np.float32), training=False).numpy()
        assert np.abs(said.probabilities - alone).max() < 1e-5  # float32, another size of batch
        assert said.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)

    def test_predictions_do_not_depend_on_the_batches(
        self, monkeypatch: pytest.MonkeyPatch, cells: CellStore
    ) -> None:
        small_base(monkeypatch)
        model, data = self.classifier(), data_of(cells)

        def said(size: int) -> NDArray[np.float32]:
            batches = ordered_batches(
                lambda rows: cells.read(rows).astype(np.float32),
                np.arange(20),
                data.labels[:20],
                batch_size=size,
            )
            return predict_images(
                model, batches, ["s"] * 20, [str(i) for i in range(20)], CLASSES
            ).probabilities

        assert np.abs(said(7) - said(20)).max() < 1e-5  # float32 sums in another order

    def test_latency_is_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small_base(monkeypatch)
        assert 0 < measure_latency(self.classifier(), SIZE, repeats=3) < 10_000


@pytest.mark.slow
class TestEndToEnd:
    """MobileNetV2 at 32 pixels from a weight file, in bfloat16: head on frozen features, then fine-tuning."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("end-to-end")

    @pytest.fixture(scope="class")
    def recipe(self, folder: Path) -> Recipe:
        keras.config.set_dtype_policy("float32")
        base = backbones.build_base("mobilenetv2", "none", 9)
        # one step of batch norm's memory, as after a training: the network passes its signal on
        base.compile("sgd", "mse")
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.0
        images = draw_cells().read(np.arange(16)).astype(np.float32) / 127.5 - 1
        base(images, training=True)
        base.save_weights(folder / "base.weights.h5")
        return RECIPE.replace(weights=str(folder / "base.weights.h5"))

    @pytest.fixture(scope="class")
    def trained(self, folder: Path, recipe: Recipe) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HEMATOVISION_CACHE", str(folder / "cache"))
            kept: list[Any] = []
            patch.setattr(recipe_module, "in_float32", lambda r, c: (kept.append(c), in_float32(r, c))[1])
            trained = train_classifier(recipe, data_of(draw_cells(), recipe))
        return trained, kept[0]

    def test_both_stages_were_trained(self, trained: Any) -> None:
        result = trained[0]
        assert list(result.histories) == ["head", "fine_tune"]
        assert [len(h) for h in result.histories.values()] == [1, 1]
        assert result.seconds > 0
        assert keras.config.dtype_policy().name == "float32"

    def test_the_last_layers_moved_and_no_other(self, trained: Any, recipe: Recipe) -> None:
        model = trained[0].model
        start = backbones.build_base("mobilenetv2", recipe.weights)
        now = model.get_layer("mobilenetv2")
        moved = []
        for before, after in zip(start.layers, now.layers, strict=True):
            pairs = list(zip(before.get_weights(), after.get_weights(), strict=True))
            if pairs:
                moved.append((before, not all(np.array_equal(a, b) for a, b in pairs)))
        last = {layer.name for layer in start.layers[-recipe.fine_tune_layers :]}
        for layer, has_moved in moved:
            is_norm = isinstance(layer, keras.layers.BatchNormalization)
            assert has_moved == (layer.name in last and not is_norm), layer.name

    def test_is_given_back_in_float32(self, trained: Any) -> None:
        result, mixed = trained
        assert mixed.get_layer("mobilenetv2").compute_dtype == "bfloat16"
        assert result.model.get_layer("mobilenetv2").compute_dtype == "float32"
        assert all(
            np.array_equal(a, b) for a, b in zip(mixed.get_weights(), result.model.get_weights(), strict=True)
        )

    def test_a_second_call_resumes_at_the_end(
        self, trained: Any, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both stages come back from their checkpoints, whole: nothing is computed again."""
        monkeypatch.setenv("HEMATOVISION_CACHE", str(folder / "cache"))
        monkeypatch.setattr(
            keras.Model, "predict_on_batch", lambda *_: pytest.fail("features computed again")
        )
        monkeypatch.setattr(keras.Model, "train_on_batch", lambda *_: pytest.fail("trained again"))
        again = train_classifier(recipe, data_of(draw_cells(), recipe))
        for a, b in zip(again.model.get_weights(), trained[0].model.get_weights(), strict=True):
            assert np.array_equal(a, b)
        for stage, history in trained[0].histories.items():
            assert again.histories[stage].to_dict("list") == history.to_dict("list")
        assert again.seconds == trained[0].seconds

    def test_is_repeatable(
        self, trained: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "another"))
        again = train_classifier(recipe, data_of(draw_cells(), recipe))
        for a, b in zip(again.model.get_weights(), trained[0].model.get_weights(), strict=True):
            assert np.array_equal(a, b)

    def test_saved_and_loaded(self, trained: Any, tmp_path: Path) -> None:
        model = trained[0].model
        save_model(model, tmp_path / "m.keras")
        images = draw_cells().read(np.arange(4)).astype(np.float32)
        assert np.array_equal(load_model(tmp_path / "m.keras")(images), model(images))
        assert not any("augmentation" in layer.name for layer in model.layers)
