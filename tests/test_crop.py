"""Crops are square, centred, and show nothing of what lies outside the picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from hematovision.vision.crop import crop_cell, crop_main_cell
from hematovision.vision.field import Box
from hematovision.vision.image import read_image
from hematovision.vision.locate import background_colour

BACKGROUND = np.array([207, 209, 205], np.uint8)


def field(height: int = 240, width: int = 320) -> NDArray[np.uint8]:
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[:] = BACKGROUND
    return rgb


def with_cell(rgb: NDArray[np.uint8], x: int, y: int, radius: int = 40) -> Box:
    cv2.circle(rgb, (x, y), radius, (190, 160, 198), -1)
    cv2.circle(rgb, (x, y), radius * 3 // 4, (110, 80, 180), -1)
    return Box(x - radius, y - radius, 2 * radius + 1, 2 * radius + 1)


@pytest.mark.parametrize("size", [16, 64, 96, 224])
def test_the_box_fills_the_documented_share(size: int) -> None:
    rgb = field()
    box = with_cell(rgb, 160, 120)
    crop = crop_cell(rgb, box, size=size, margin=0.25)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    inside = np.flatnonzero((crop != BACKGROUND).any(axis=2).any(axis=0))
    share = (inside[-1] - inside[0] + 1) / size
    assert share == pytest.approx(1 / 1.5, abs=2.5 / size)  # one pixel of interpolation on either side
    assert inside[0] + inside[-1] == pytest.approx(size - 1, abs=2)  # in the middle


def test_a_long_box_gives_a_square_by_its_longer_side() -> None:
    rgb = field()
    rgb[:, 100:140] = (255, 0, 0)
    crop = crop_cell(rgb, Box(100, 80, 40, 80), size=80, margin=0)
    red = (crop == (255, 0, 0)).all(axis=2)
    assert red.any(axis=0).sum() == 40
    assert red.any(axis=1).all()


def test_same_size_copies_pixels() -> None:
    rgb = np.random.default_rng(0).integers(60, 256, (100, 100, 3), np.uint8)
    assert np.array_equal(crop_cell(rgb, Box(20, 30, 40, 40), size=40, margin=0), rgb[30:70, 20:60])


@pytest.mark.parametrize(
    "box",
    [
        Box(0, 0, 1, 1),
        Box(319, 239, 1, 1),
        Box(-50, -50, 100, 100),
        Box(300, 200, 100, 100),
        Box(1000, 1000, 20, 20),
        Box(-900, 5, 30, 30),
        Box(-100, -100, 1000, 1000),
        Box(0, 0, 320, 1),
    ],
)
@pytest.mark.parametrize("margin", [0.0, 0.15, 2.0])
def test_boxes_at_and_beyond_the_edges(box: Box, margin: float) -> None:
    crop = crop_cell(field(), box, size=32, margin=margin)
    assert crop.shape == (32, 32, 3)
    assert (crop == BACKGROUND).all()  # outside looks like inside


@pytest.mark.parametrize("seed", range(30))
def test_random_boxes_keep_their_middle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rgb = field()
    x, y = int(rng.integers(0, 320)), int(rng.integers(0, 240))
    half = int(rng.integers(3, 60))
    rgb[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = (255, 0, 0)
    crop = crop_cell(rgb, Box(x - half, y - half, 2 * half + 1, 2 * half + 1), size=97, margin=0.1)
    assert crop[48, 48, 0] > crop[48, 48, 1] + 100


def test_the_input_is_not_changed() -> None:
    rgb = field()
    rgb[:, :80] = 0
    before = rgb.copy()
    crop_cell(rgb, Box(60, 60, 60, 60))
    crop_main_cell(rgb)
    assert np.array_equal(rgb, before)


def test_fill_of_an_augmented_copy_takes_the_background_colour() -> None:
    rgb = field()
    box = with_cell(rgb, 160, 120)
    rgb[:, :100] = 0
    crop = crop_cell(rgb, box, size=128, margin=0.5)
    assert crop.min() > 60  # the darkest is the nucleus
    assert (crop[:, :10] == BACKGROUND).all()


def test_background_is_robust_to_cells_and_fill() -> None:
    rgb = field()
    for x in range(30, 320, 60):
        with_cell(rgb, x, 120)
    rgb[180:] = 0
    assert np.array_equal(background_colour(rgb), BACKGROUND)
    assert background_colour(np.zeros((20, 20, 3), np.uint8)).tolist() == [255, 255, 255]


def test_the_main_cell_is_located_and_cropped() -> None:
    rgb = field()
    truth = with_cell(rgb, 200, 110)
    cell = crop_main_cell(rgb, size=64, margin=0.15, image="one.png")
    assert cell.box.intersection_over_union(truth) > 0.8  # as in the tests of the locator
    assert cell.box.score > 0
    assert cell.image == "one.png"
    assert np.array_equal(cell.rgb, crop_cell(rgb, cell.box, 64, 0.15))


@pytest.mark.parametrize("shape", [(240, 320), (320, 240), (17, 17)])
def test_without_a_cell_the_central_square_is_taken(shape: tuple[int, int]) -> None:
    rgb = field(*shape)
    cell = crop_main_cell(rgb, size=48)
    assert cell.box.score == 0
    assert cell.box.width == cell.box.height == min(shape)
    assert cell.box.centre == pytest.approx((shape[1] / 2, shape[0] / 2), abs=0.5)
    assert cell.rgb.shape == (48, 48, 3)


def test_crops_are_reproducible() -> None:
    rgb = field()
    with_cell(rgb, 120, 90)
    assert crop_main_cell(rgb).rgb.tobytes() == crop_main_cell(rgb).rgb.tobytes()


@pytest.mark.data
def test_crops_of_augmented_copies_show_no_fill(real_data: Path) -> None:
    folder = real_data / "blood-cells" / "dataset2-master" / "dataset2-master" / "images" / "TRAIN"
    paths = sorted(folder.rglob("*.jpeg"))
    chosen = [paths[i] for i in np.random.default_rng(1).permutation(len(paths))[:100]]
    black = [(crop_main_cell(read_image(path)).rgb.max(axis=2) < 50).mean() for path in chosen]
    assert max(black) < 0.001  # 50 pixels of 224 x 224: dirt on the slide is as dark
