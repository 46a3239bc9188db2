"""Class activation maps add up to the logits, tell of the weights, and survive the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from hematovision.errors import DataError
from hematovision.learn import runtime
from hematovision.learn.backbones import build_base, build_classifier, build_head
from hematovision.learn.explanation import (
    attention_inside,
    build_cam_model,
    cam_overlay,
    central_box,
    explain_images,
    randomisation_check,
    randomise_weights,
)
from hematovision.learn.recipe import load_model, save_model
from hematovision.quiet import silence

keras = runtime.start(0)
SIZE, CLASSES = 64, 3


@pytest.fixture(autouse=True)
def float32() -> None:
    keras.config.set_dtype_policy("float32")


def build(backbone: str = "mobilenetv2") -> Any:
    base = build_base(backbone, "none", seed=1)
    _fit_batch_norm(base)
    head = build_head(base.output_shape[-1], CLASSES, 0.2, seed=1)
    bias = head.layers[-1].bias
    bias.assign(np.linspace(-1, 1, CLASSES))
    return build_classifier(backbone, base, head, SIZE, frozen_batch_norm=True)


def _fit_batch_norm(base: Any) -> None:
    """Let batch normalisation know its inputs: otherwise an untrained network gives all but nothing."""
    norms = [layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    base(np.random.default_rng(5).normal(0, 0.6, (8, SIZE, SIZE, 3)).astype(np.float32), training=bool(norms))


@pytest.fixture(scope="module")
def classifier() -> Any:
    keras.config.set_dtype_policy("float32")
    return build()


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


def logits_from(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    return maps.mean(axis=(1, 2)) + np.linspace(-1, 1, CLASSES)


class TestMaps:
    @pytest.mark.parametrize("backbone", ["mobilenetv2", "vgg16"])
    def test_their_mean_and_the_bias_are_the_logits(self, images: NDArray[np.uint8], backbone: str) -> None:
        classifier = build(backbone)
        said, maps = build_cam_model(classifier).predict_on_batch(images.astype(np.float32))
        assert maps.shape == (5, SIZE // 32, SIZE // 32, CLASSES)
        assert maps.dtype == np.float32
        assert np.ptp(maps) > 0.1
        np.testing.assert_allclose(said, classifier.predict_on_batch(images.astype(np.float32)), atol=1e-6)
        powers = np.exp(logits_from(maps))
        # float32 sums in another order
        np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), said, atol=1e-5)

    def test_a_place_shows_what_was_put_there(self) -> None:
        images = keras.Input((8, 8, 3))
        base = keras.Sequential([keras.Input((None, None, 3)), keras.layers.AveragePooling2D(4)])
        pooled = keras.layers.GlobalAveragePooling2D(name="features")(base(images))
        head = build_head(3, 2, 0.5, seed=0)
        head.layers[-1].set_weights([np.array([[1, 0], [0, 2], [0, 0]], np.float32), np.zeros(2, np.float32)])
        model = build_cam_model(keras.Model(images, head(pooled)))
        picture = np.zeros((1, 8, 8, 3), np.float32)
        picture[0, :4, 4:, 0], picture[0, 4:, :4, 1] = 5, 7
        maps = model.predict_on_batch(picture)[1][0]
        np.testing.assert_allclose(maps[:, :, 0], [[0, 5], [0, 0]])
        np.testing.assert_allclose(maps[:, :, 1], [[0, 0], [14, 0]])

    def test_a_saved_classifier_has_the_same_maps(
        self, classifier: Any, images: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        save_model(classifier, tmp_path / "model.keras")
        read = build_cam_model(load_model(tmp_path / "model.keras"))
        expected = explain_images(build_cam_model(classifier), images)[1]
        np.testing.assert_allclose(explain_images(read, images)[1], expected, atol=1e-6)

    def test_a_network_in_half_precision_gives_float32(self, images: NDArray[np.uint8]) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        said, maps = build_cam_model(build()).predict_on_batch(images.astype(np.float32))
        assert (said.dtype, maps.dtype) == (np.float32, np.float32)
        powers = np.exp(logits_from(maps))
        np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), said, atol=1e-5)

    def test_another_head_is_refused(self) -> None:
        images = keras.Input((8, 8, 3), name="image")
        largest = keras.layers.GlobalMaxPooling2D(name="features")(images)
        average = keras.layers.GlobalAveragePooling2D(name="features")(images)
        deep = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2, "softmax")])
        models = [
            keras.Model(images, build_head(3, 2, 0.1, seed=0)(largest), name="other"),
            keras.Model(images, deep(average), name="other"),
            keras.Model(images, average, name="other"),
        ]
        for model in models:
            with pytest.raises(DataError, match="other has no class activation maps: use a model whose head"):
                build_cam_model(model)


def test_litert_agrees_with_keras_in_both_outputs(
    classifier: Any, images: NDArray[np.uint8], tmp_path: Path
) -> None:
    model = build_cam_model(classifier)
    with silence():
        model.export(str(tmp_path / "cam.tflite"), format="litert", verbose=False)
        run = Interpreter(str(tmp_path / "cam.tflite")).get_signature_runner()
    said, maps = model.predict_on_batch(images.astype(np.float32))
    assert np.ptp(maps) > 0.1
    for i, image in enumerate(images.astype(np.float32)):
        found = run(**{next(iter(run.get_input_details())): image[None]})
        np.testing.assert_allclose(found["output_0"], said[i : i + 1], atol=1e-4)
        np.testing.assert_allclose(found["output_1"], maps[i : i + 1], atol=1e-4)


class TestExplain:
    def test_the_named_class_unless_another_is_asked_for(
        self, classifier: Any, images: NDArray[np.uint8]
    ) -> None:
        model = build_cam_model(classifier)
        many = np.concatenate([images] * 8)[:37]  # more than one batch, and not a multiple of it
        every = model.predict_on_batch(many.astype(np.float32))[1]
        said, maps = explain_images(model, many)
        rows = np.arange(37)
        np.testing.assert_allclose(maps, every[rows, :, :, said.argmax(axis=1)], atol=1e-5)
        asked = rows % CLASSES
        np.testing.assert_allclose(explain_images(model, many, asked)[1], every[rows, :, :, asked], atol=1e-5)


class TestOverlay:
    def test_only_what_speaks_for_the_class_is_coloured(self) -> None:
        rgb = np.full((40, 60, 3), 200, np.uint8)
        cam = np.full((4, 6), -1.0, np.float32)
        cam[0, 5] = 3.0
        out = cam_overlay(rgb, cam)
        assert out.shape == rgb.shape
        assert out.dtype == np.uint8
        changed = (out != rgb).any(axis=2)
        assert changed[:5, -5:].all()
        assert not changed[20:].any()
        assert not changed[:, :40].any()
        assert (rgb == 200).all()

    def test_scale_does_not_matter_and_nothing_positive_changes_nothing(self) -> None:
        rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        cam = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
        # rounding to a level of 256
        assert np.abs(cam_overlay(rgb, cam).astype(int) - cam_overlay(rgb, 8 * cam)).max() <= 1
        assert np.array_equal(cam_overlay(rgb, -np.abs(cam)), rgb)


class TestInside:
    def test_shares_of_positive_mass(self) -> None:
        left = np.zeros((40, 40), np.bool_)
        left[:, :20] = True
        assert attention_inside(np.ones((4, 4), np.float32), left) == pytest.approx(left.mean())
        cam = np.zeros((4, 4), np.float32)
        cam[:, 0], cam[:, 3] = 3, 1
        assert attention_inside(cam, left) == pytest.approx(0.75)
        cam[:, 3] = -100
        assert attention_inside(cam, left) == pytest.approx(1.0)
        assert np.isnan(attention_inside(-np.ones((4, 4), np.float32), left))

    def test_the_cells_box_in_its_crop(self) -> None:
        inside = central_box(130, 0.15)
        assert inside[15:115, 15:115].all()
        assert inside.sum() == 100 * 100
        assert central_box(7, 0.0).all()


def spots(n: int, labels: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
    """Return grey pictures with a red (class 0) or green (class 1) square and a blue one."""
    rng = np.random.default_rng(3)
    pictures = rng.normal(120, 10, (n, 32, 32, 3))
    for i, picture in enumerate(pictures):
        colours = [(0 if labels is None else labels[i]), 2]
        for x, y, colour in zip(rng.integers(0, 24, 2), rng.integers(0, 24, 2), colours, strict=True):
            picture[y : y + 8, x : x + 8] = np.eye(3)[colour] * 200
    return pictures.astype(np.float32)


def small_network() -> Any:
    """Return an untrained network for `spots`."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((32, 32, 3), name="image")
    base = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Rescaling(1 / 128, -1.0),
            layers.Conv2D(8, 1, activation="relu"),
            layers.AveragePooling2D(4),
            layers.Conv2D(8, 1, activation="relu"),
        ]
    )
    pooled = layers.GlobalAveragePooling2D(name="features")(base(images))
    return keras.Model(images, build_head(8, 2, 0.0, seed=0)(pooled))


def spot_finder() -> Any:
    """Return a small network that was trained to tell a red square from a green one."""
    model = small_network()
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy", metrics=["accuracy"])
    labels = np.arange(64) % 2
    model.fit(spots(64, labels), labels, epochs=40, batch_size=16, verbose=0)
    assert model.evaluate(spots(64, labels), labels, verbose=0)[1] == 1.0
    return model


class TestRandomisation:
    def test_nothing_learned_is_left_and_the_model_stays(self) -> None:
        model, images = build_cam_model(small_network()), spots(5)
        before = model.get_weights()
        other = randomise_weights(model, seed=1)
        for a, b, c in zip(before, other.get_weights(), model.get_weights(), strict=True):
            assert np.array_equal(a, c)
            assert np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None))
            assert a.ndim < 2 or not np.array_equal(a, b)
        again, third = randomise_weights(model, seed=1), randomise_weights(model, seed=2)
        maps = [explain_images(m, images)[1] for m in (other, again, third)]
        assert np.array_equal(maps[0], maps[1])
        assert not np.allclose(maps[0], maps[2])

    def test_maps_of_a_trained_model_change(self) -> None:
        model, pictures = build_cam_model(spot_finder()), spots(40)
        check = randomisation_check(model, pictures)
        assert list(check) == ["randomised", "mirrored"]
        assert len(check) == 40
        # every step of this network looks at one place or at whole blocks, so that a mirror changes nothing
        assert check["mirrored"].min() > 0.99
        # shuffled networks still see squares, each with a liking of its own: five of them average to little
        assert abs(check["randomised"].mean()) < 0.5
        again = randomisation_check(model, pictures[:3], seed=0)
        pd.testing.assert_frame_equal(again, check[:3], atol=1e-3)  # batches of other sizes
        assert not np.allclose(
            randomisation_check(model, pictures[:3], seed=1)["randomised"], again["randomised"]
        )

    def test_maps_that_show_the_picture_alone_are_found_out(self) -> None:
        images = keras.Input((32, 32, 3), name="image")
        base = keras.Sequential([keras.Input((None, None, 3)), keras.layers.AveragePooling2D(4)])
        pooled = keras.layers.GlobalAveragePooling2D(name="features")(base(images))
        head = build_head(3, 2, 0.5, seed=0)
        # whatever is shuffled, every weight is the same
        head.layers[-1].set_weights([np.ones((3, 2), np.float32), np.zeros(2, np.float32)])
        check = randomisation_check(build_cam_model(keras.Model(images, head(pooled))), spots(5))
        np.testing.assert_allclose(check.to_numpy(), 1, atol=1e-3)
