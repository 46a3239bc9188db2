"""Augmentation changes place and colour while training, stays in range, and is silent otherwise."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hematovision.learn import runtime
from hematovision.vision.augment import (
    CONTRAST,
    HUE_TURNS,
    SATURATION,
    build_augmentation,
    build_colour_jitter,
    build_focus_jitter,
)

keras = runtime.start(0)


@pytest.fixture(autouse=True)
def float32() -> None:
    keras.config.set_dtype_policy("float32")


def pictures(n: int = 4, size: int = 24) -> NDArray[np.float32]:
    """Return smooth pictures with no symmetry, 0 to 255."""
    y, x = np.mgrid[:size, :size] / size
    one = np.stack([200 * x, 160 * y + 20, 90 + 100 * x * y], -1)
    return np.stack([one + 3 * i for i in range(n)]).astype(np.float32)


def patches(n: int) -> NDArray[np.float32]:
    """Return flat pictures of the violet of a stained nucleus; no jitter of strength 1 clips it."""
    return np.tile(np.array([120, 80, 160], np.float32), (n, 4, 4, 1))


def run(layer: Any, images: NDArray[np.float32], training: bool = True) -> NDArray[np.float32]:
    return np.asarray(layer(images, training=training), np.float32)


def turned(image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return a picture and its three flips."""
    return [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]


class TestAll:
    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
    def test_nothing_happens_outside_training(self, strength: float) -> None:
        assert np.array_equal(run(build_augmentation(strength, 1), pictures(), training=False), pictures())

    def test_strength_zero_flips_and_does_nothing_else(self) -> None:
        images = pictures(40)
        seen = set()
        for before, after in zip(images, run(build_augmentation(0.0, 1), images), strict=True):
            matches = [i for i, flip in enumerate(turned(before)) if np.array_equal(flip, after)]
            assert len(matches) == 1
            seen.add(matches[0])
        assert seen == {0, 1, 2, 3}  # of 40 pictures each way is missed with probability 0.75^40 = 1e-5

    def test_strength_one_does_more(self) -> None:
        images = pictures(8)
        for before, after in zip(images, run(build_augmentation(1.0, 1), images), strict=True):
            assert min(np.abs(flip - after).mean() for flip in turned(before)) > 2

    @pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
    def test_shape_and_range_stay(self, strength: float) -> None:
        images = np.random.default_rng(0).choice([0, 255], (16, 20, 28, 3)).astype(np.float32)
        out = run(build_augmentation(strength, 1), images)
        assert out.shape == images.shape
        assert np.isfinite(out).all()
        assert out.min() >= 0
        assert out.max() <= 255

    def test_equal_seeds_give_equal_pictures(self) -> None:
        first, second, other = (run(build_augmentation(1.0, seed), pictures()) for seed in (7, 7, 8))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)

    def test_every_call_and_every_picture_is_another(self) -> None:
        layer = build_augmentation(1.0, 7)
        same = np.repeat(pictures(1), 3, axis=0)
        first, second = run(layer, same), run(layer, same)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first[0], first[1])

    def test_works_in_bfloat16(self) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        out = run(build_augmentation(1.0, 1), pictures())
        assert 0 <= out.min() <= out.max() <= 255
        assert out.std() > 10

    def test_no_fill_shows_at_the_borders(self) -> None:
        """Black corners would tell the network that a picture was turned."""
        flat = np.full((16, 24, 24, 3), 180, np.float32)
        geometric = keras.Sequential(build_augmentation(1.0, 3).layers[:-2])
        assert np.allclose(run(geometric, flat), 180, atol=0.01)  # interpolation of equal values


class TestColourJitter:
    def hsv(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.array([colorsys.rgb_to_hsv(*(image[0, 0] / 255)) for image in images.astype(float)])

    def test_leaves_the_place_alone(self) -> None:
        images = np.tile(pictures(1), (6, 1, 1, 1))
        # one matrix and one offset a picture: an affine map of the pixels reproduces it
        for after in run(build_colour_jitter(0.5, 1), images):
            inside = ((after > 1) & (after < 254)).all(axis=-1)  # where nothing was clipped
            pixels = np.column_stack([images[0][inside], np.ones(int(inside.sum()))])
            matrix, *_ = np.linalg.lstsq(pixels, after[inside], rcond=None)
            assert np.abs(pixels @ matrix - after[inside]).max() < 0.05

    def test_changes_hue_saturation_and_brightness_measurably(self) -> None:
        images = patches(200)
        before, after = self.hsv(images[:1])[0], self.hsv(run(build_colour_jitter(1.0, 2), images))
        hue = (after[:, 0] - before[0] + 0.5) % 1 - 0.5
        # uniform from -0.06 to 0.06 turns has a standard deviation of 0.035; gain adds to it
        assert 0.025 < hue.std() < 0.07
        assert after[:, 1].std() > 0.05
        assert after[:, 2].std() > 0.05

    def test_grows_with_strength(self) -> None:
        images = patches(200)
        changes = [np.abs(run(build_colour_jitter(s, 2), images) - images).mean() for s in (0.01, 0.5, 1, 2)]
        assert changes == sorted(changes)
        assert changes[0] < 0.5  # the two colour matrices are each other's inverse to 0.3 %
        assert changes[2] > 8

    def test_grey_stays_grey_but_for_gain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hue and saturation turn and stretch colours about the grey axis."""
        for amount in ("GAIN", "BRIGHTNESS", "CONTRAST"):
            monkeypatch.setattr(f"hematovision.vision.augment.{amount}", 0.0)
        grey = np.full((50, 2, 2, 3), 128, np.float32)
        # the rounded matrices move grey by at most their rounding, 0.001 x 128 x 2
        assert np.abs(run(build_colour_jitter(1.0, 2), grey) - grey).max() < 0.3
        coloured = self.hsv(run(build_colour_jitter(1.0, 2), patches(200)))
        saturation = np.log(coloured[:, 1] / self.hsv(patches(1))[0, 1])
        assert saturation.std() == pytest.approx(SATURATION / 3**0.5, rel=0.4)
        assert np.ptp(coloured[:, 0]) == pytest.approx(2 * HUE_TURNS, rel=0.4)

    def test_contrast_scales_the_distance_from_white(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for amount in ("GAIN", "BRIGHTNESS", "SATURATION", "HUE_TURNS"):
            monkeypatch.setattr(f"hematovision.vision.augment.{amount}", 0.0)
        images = np.full((200, 1, 2, 3), 255, np.float32)
        images[:, 0, 1] = 155
        out = run(build_colour_jitter(1.0, 2), images)
        assert np.abs(out[:, 0, 0] - 255).max() < 1.0  # white stays, but for the matrices' rounding
        factor = (255 - out[:, 0, 1, 0]) / 100
        assert np.log(factor).min() == pytest.approx(-CONTRAST, rel=0.1)
        assert np.log(factor).max() == pytest.approx(CONTRAST, rel=0.1)

    def test_pictures_of_one_batch_change_differently(self) -> None:
        out = run(build_colour_jitter(1.0, 2), patches(5))
        assert len({tuple(image[0, 0]) for image in out}) == 5

    def test_is_saved_and_loaded(self, tmp_path: Path) -> None:
        model = keras.Sequential([keras.Input((4, 4, 3)), build_colour_jitter(0.7, 5)])
        model.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras", compile=False)
        assert again.layers[-1].get_config()["strength"] == 0.7
        assert np.array_equal(run(again, patches(2)), run(build_colour_jitter(0.7, 5), patches(2)))


class TestFocusJitter:
    def edge(self, n: int) -> NDArray[np.float32]:
        images = np.full((n, 64, 64, 3), 200, np.float32)
        images[:, :, 32:] = 100
        return images

    def test_softens_and_sharpens_edges_and_leaves_the_rest(self) -> None:
        out = run(build_focus_jitter(1.0, 3), self.edge(100))
        step = out[:, 32, 31, 0] - out[:, 32, 32, 0]
        assert step.min() < 80  # softer: the edge is spread over its neighbours
        assert step.max() > 105  # sharper: it overshoots
        assert np.allclose(out[:, :, :20], 200, atol=0.01)

    def test_nothing_happens_outside_training(self) -> None:
        layer, images = build_focus_jitter(1.0, 3), self.edge(2)
        assert np.array_equal(np.array(layer(images, training=False)), images)

    def test_is_saved_and_loaded(self, tmp_path: Path) -> None:
        model = keras.Sequential([keras.Input((64, 64, 3)), build_focus_jitter(0.7, 5)])
        model.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras", compile=False)
        assert np.array_equal(run(again, self.edge(2)), run(build_focus_jitter(0.7, 5), self.edge(2)))
