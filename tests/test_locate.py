"""White cells are found in drawn discs, and in the annotated photographs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from hematovision.vision.field import Box
from hematovision.vision.image import read_image
from hematovision.vision.locate import background_colour, fill_mask, locate_cells, locate_main_cell
from hematovision.vision.matching import evaluate_boxes, is_found, match_boxes

BACKGROUND, RED_CELL = (207, 209, 205), (180, 158, 165)
CYTOPLASM, NUCLEUS, PLATELET = (190, 160, 198), (125, 95, 190), (150, 130, 195)

RGB = NDArray[np.uint8]


def smear(height: int = 480, width: int = 640, seed: int = 0, red: int = 25) -> RGB:
    """Draw a background with scattered red cells, 100 pixels wide, some of them overlapping."""
    rng = np.random.default_rng(seed)
    rgb = np.full((height, width, 3), BACKGROUND, np.uint8)
    for x, y in zip(rng.integers(0, width, red), rng.integers(0, height, red), strict=True):
        cv2.circle(rgb, (int(x), int(y)), 48, RED_CELL, -1, cv2.LINE_AA)
    return rgb


def white_cell(rgb: RGB, x: int, y: int, radius: int = 75, lobes: int = 2) -> Box:
    """Draw a white cell with a lobed nucleus; return its true box, cut at the picture's edge."""
    cv2.circle(rgb, (x, y), radius, CYTOPLASM, -1, cv2.LINE_AA)
    for k in range(lobes):
        angle = 2 * np.pi * k / lobes
        off = 0 if lobes == 1 else 0.42 * radius
        centre = (round(x + off * np.cos(angle)), round(y + off * np.sin(angle)))
        cv2.circle(rgb, centre, round((0.75 if lobes == 1 else 0.4) * radius), NUCLEUS, -1, cv2.LINE_AA)
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = max(0, x - radius), max(0, y - radius), min(width, x + radius), min(height, y + radius)
    return Box(x0, y0, x1 - x0, y1 - y0)


def outlines_agree(found: Box, truth: Box) -> bool:
    """Whether all four sides agree to 8 pixels: 4 of the rim that is added, the rest of the blur."""
    sides = [(b.x, b.y, b.x + b.width, b.y + b.height) for b in (found, truth)]
    return bool(np.abs(np.subtract(*sides)).max() <= 8)


def finished(rgb: RGB) -> RGB:
    """Add the blur of the optics and the noise of the sensor."""
    noise = np.random.default_rng(9).normal(0, 2, rgb.shape)
    return (cv2.GaussianBlur(rgb, (0, 0), 1.5) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("lobes", [1, 2, 3, 4])
@pytest.mark.parametrize("radius", [50, 75, 100])
def test_the_whole_cell_is_found_not_its_lobes(lobes: int, radius: int) -> None:
    rgb = smear()
    truth = white_cell(rgb, 300, 250, radius, lobes)
    (found,) = locate_cells(finished(rgb))
    assert outlines_agree(found, truth)
    assert not found.cut
    assert found.label == "WBC"
    assert 0 < found.score <= 1


def test_cells_are_sorted_and_reproducible() -> None:
    rgb = smear()
    truth = [white_cell(rgb, *at) for at in ((520, 100), (110, 360), (110, 110), (500, 370))]
    rgb = finished(rgb)
    found = locate_cells(rgb)
    assert len(match_boxes(found, truth)) == 4
    assert found == sorted(found, key=lambda b: (b.x, b.y))
    assert locate_cells(rgb) == found


@pytest.mark.parametrize("angle", range(0, 360, 45))
def test_touching_cells_are_told_apart(angle: int) -> None:
    rgb = smear(red=0)
    dx, dy = round(140 * np.cos(np.radians(angle))), round(140 * np.sin(np.radians(angle)))
    truth = [
        white_cell(rgb, 320 - dx // 2, 240 - dy // 2, 70, 1),
        white_cell(rgb, 320 + dx // 2, 240 + dy // 2, 70, 1),
    ]
    found = locate_cells(finished(rgb))
    assert len(found) == len(match_boxes(found, truth)) == 2


@pytest.mark.parametrize(("x", "y"), [(10, 240), (630, 240), (320, 10), (320, 470), (20, 20)])
def test_cells_cut_by_the_edge_are_found_and_marked(x: int, y: int) -> None:
    rgb = smear()
    truth = white_cell(rgb, x, y, 85, 1)
    (found,) = locate_cells(finished(rgb))
    assert is_found(found, truth)
    assert found.cut


@pytest.mark.parametrize("seed", range(5))
def test_red_cells_alone_are_not_taken_for_white_ones(seed: int) -> None:
    assert locate_cells(finished(smear(seed=seed, red=60))) == []


def test_platelets_are_passed_over() -> None:
    rgb = smear()
    for x in (60, 200, 420, 600):
        cv2.circle(rgb, (x, 60), 20, PLATELET, -1, cv2.LINE_AA)
    truth = white_cell(rgb, 320, 260)
    cv2.circle(rgb, (320 - 75 - 18, 260), 18, PLATELET, -1, cv2.LINE_AA)  # one that touches the cell
    (found,) = locate_cells(finished(rgb))
    # the platelet is 36 pixels wide: a stub of it may stay, a third beside the usual rim does not
    assert found.intersection_over_union(truth) > 0.8
    assert found.x > truth.x - 12


@pytest.mark.parametrize("angle", [-20, -8, 12, 20])
def test_black_fill_is_neither_nucleus_nor_background(angle: int) -> None:
    rgb = smear()
    white_cell(rgb, 320, 240)
    turn = cv2.getRotationMatrix2D((320, 240), angle, 1.0)
    turn[:, 2] += (40, -30)
    turned = cv2.warpAffine(finished(rgb), turn, (640, 480), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0))
    (found,) = locate_cells(turned)
    assert is_found(found, Box(320 + 40 - 75, 240 - 30 - 75, 150, 150))
    assert not found.cut
    assert np.abs(background_colour(turned).astype(int) - BACKGROUND).max() <= 5  # noise of the sensor
    assert fill_mask(turned).mean() > 0.05


def test_a_cell_cut_by_the_fill_is_marked() -> None:
    rgb = smear()
    white_cell(rgb, 320, 240)
    rgb = finished(rgb)
    rgb[:, :290] = 0
    (found,) = locate_cells(rgb)
    assert found.cut
    assert abs(found.x - 290) < 10  # the box ends at the fill, to the rim that is ignored


def test_dark_specks_inside_are_not_fill() -> None:
    rgb = smear(red=0)
    cv2.circle(rgb, (320, 240), 30, (5, 5, 5), -1)
    assert not fill_mask(rgb).any()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_size_in_pixels_does_not_matter(factor: float) -> None:
    rgb = smear()
    truth = [white_cell(rgb, 150, 150), white_cell(rgb, 480, 330, 60, 1)]
    size = (round(640 * factor), round(480 * factor))
    found = locate_cells(cv2.resize(finished(rgb), size, interpolation=cv2.INTER_AREA))
    scaled = [Box(*(round(v * factor) for v in (b.x, b.y, b.width, b.height))) for b in truth]
    assert len(found) == len(match_boxes(found, scaled)) == 2


def test_red_cells_tell_the_magnification() -> None:
    """A field four times as large, with the same cells, still yields each of them."""
    rgb = smear(1920, 2560, red=400)
    truth = [white_cell(rgb, x, y) for x in (300, 1200, 2200) for y in (300, 1000, 1700)]
    found = locate_cells(finished(rgb))
    assert len(found) == len(match_boxes(found, truth)) == 9


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(16, 16), (480, 640), (16, 900)])
def test_a_flat_picture_holds_no_cell(value: int, shape: tuple[int, int]) -> None:
    rgb = np.full((*shape, 3), value, np.uint8)
    assert locate_cells(rgb) == []
    assert locate_main_cell(rgb) is None


def test_noise_raises_nothing() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    for box in locate_cells(rgb):
        assert 0 <= box.x < box.x + box.width <= 160
        assert 0 <= box.y < box.y + box.height <= 120


def test_views_with_any_strides_are_taken() -> None:
    rgb = smear()
    white_cell(rgb, 300, 250)
    rgb = finished(rgb)
    assert locate_cells(np.asfortranarray(rgb)) == locate_cells(rgb)
    assert len(locate_cells(rgb[:, ::-1])) == 1


def test_the_main_cell_is_the_whole_central_one() -> None:
    rgb = smear()
    truth = white_cell(rgb, 330, 230, 70)
    white_cell(rgb, 630, 60, 100)
    assert len(locate_cells(finished(rgb))) == 2
    main = locate_main_cell(finished(rgb))
    assert main is not None
    assert is_found(main, truth)


def test_a_pair_counts_by_overlap_or_by_centre_and_area() -> None:
    truth = Box(100, 100, 100, 100)
    assert is_found(Box(110, 110, 100, 100), truth)
    assert is_found(Box(120, 120, 72, 72), truth)  # centre inside, area 0.52
    assert not is_found(Box(120, 120, 60, 60), truth)  # centre inside, area 0.36
    assert not is_found(Box(170, 170, 100, 100), truth)  # centre outside


def test_matching_is_one_to_one_and_as_large_as_possible() -> None:
    truth = [Box(0, 0, 100, 100), Box(45, 0, 100, 100)]
    # the first found box fits both and overlaps the second best; the other fits the second alone
    found = [Box(20, 0, 100, 100), Box(50, 0, 100, 100)]
    assert match_boxes(found, truth) == [(0, 0), (1, 1)]
    assert match_boxes([truth[0], truth[0]], truth[:1]) in ([(0, 0)], [(1, 0)])
    assert match_boxes([], truth) == match_boxes(found, []) == []


def test_evaluation_lists_misses_and_surplus() -> None:
    a, b, c = Box(0, 0, 50, 50), Box(200, 0, 50, 50), Box(0, 300, 50, 50)
    result = evaluate_boxes([("one", [a, c], [a, b]), ("two", [], []), ("three", [b], [b])])
    assert (result.annotated, result.found, result.matched) == (3, 3, 2)
    assert result.recall == result.precision == pytest.approx(2 / 3)
    assert result.missed == {"one": (b,)}
    assert result.surplus == {"one": (c,)}
    assert np.isnan(evaluate_boxes([]).recall)


def annotated_photographs(root: Path) -> Iterator[tuple[RGB, str, list[Box]]]:
    """Yield the annotated photographs one at a time, with the boxes named WBC."""
    folder = root / "blood-cells" / "dataset-master" / "dataset-master"
    for path in sorted((folder / "Annotations").glob("*.xml")):
        boxes = []
        for item in ET.parse(path).getroot().findall("object"):
            if item.findtext("name") == "WBC":
                sides = (item.findtext(f"bndbox/{k}", "") for k in ("xmin", "ymin", "xmax", "ymax"))
                x0, y0, x1, y1 = (int(float(side)) for side in sides)
                boxes.append(Box(x0, y0, x1 - x0, y1 - y0))
        yield read_image(folder / "JPEGImages" / f"{path.stem}.jpg"), path.stem, boxes


@pytest.mark.data
def test_annotated_photographs(real_data: Path) -> None:
    result = evaluate_boxes(
        (name, locate_cells(rgb), truth) for rgb, name, truth in annotated_photographs(real_data)
    )
    assert result.annotated == 372
    # the bars of the project; the one miss is an annotated platelet, and what is found too much are
    # white cells that the annotators left out
    assert result.recall >= 0.99
    assert result.precision >= 0.97


@pytest.mark.data
def test_augmented_copies_keep_their_cell(real_data: Path) -> None:
    folder = real_data / "blood-cells" / "dataset2-master" / "dataset2-master" / "images" / "TRAIN"
    paths = sorted(folder.rglob("*.jpeg"))
    chosen = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:200]]
    counts = np.array([len(locate_cells(read_image(path))) for path in chosen])
    # shifts push a few cells out of the picture altogether; 1 of 500 was counted by eye
    assert (counts >= 1).mean() >= 0.98
    assert (counts == 1).mean() >= 0.95


@pytest.mark.data
def test_single_cell_images_of_another_laboratory(real_data: Path) -> None:
    paths = sorted(p for p in (real_data / "pbc").rglob("*.jpg") if p.parent.name != "platelet")
    chosen = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:100]]
    hits = 0
    for path in chosen:
        rgb = read_image(path)
        box = locate_main_cell(rgb)
        hits += box is not None and box.contains(rgb.shape[1] / 2, rgb.shape[0] / 2)
    assert hits >= 97  # one in 210 was missed when counted; they are centred on their cell
