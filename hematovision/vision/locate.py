"""Finding white cells in a field by their stain, without training.

Nuclei take up azure dyes, which absorb red light; haemoglobin and eosin let red light through and
absorb blue. In optical density relative to the background the difference of the two channels is
large in nuclei and near zero in red cells whatever their thickness, so that one threshold finds
white cells where brightness or hue alone would also find overlapping red cells.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.vision.field import RGB, Box

_Plane = NDArray[np.float32]
_Mask = NDArray[np.uint8]

_WORK_SIDE = 320
"""Longer side in pixels at which cells are sought: a white cell is still 60 to 130 pixels wide."""

_FILL_LEVEL = 20
"""Darkest channel value of real stain is above this; augmentation fills with black."""


def locate_cells(rgb: RGB) -> list[Box]:
    """Find the white cells of a field."""
    small, scale = _reduce(rgb)
    density, fill = _optical_density(small)
    red, green, blue = (cv2.GaussianBlur(density[..., i], (0, 0), 1.5) for i in range(3))
    azure = red - 0.5 * np.maximum(blue, 0)
    stain = green - blue
    nucleus = ((azure > 0.13) & (~fill)).astype(np.uint8)
    cell = (((azure > 0.08) | (stain > 0.16)) & (~fill)).astype(np.uint8)
    cell = cv2.morphologyEx(cell, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13)))
    cell |= nucleus
    cell = cv2.morphologyEx(cell, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9)))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(cell)
    nuclear = np.bincount(labels[nucleus > 0], minlength=count)
    boxes = []
    for i in range(1, count):
        x, y, w, h, _area = (int(v) for v in stats[i])
        if nuclear[i] < 500:
            continue
        boxes.append(_to_box(x, y, w, h, scale, rgb.shape[:2]))
    return sorted(boxes, key=lambda b: (b.x, b.y, b.width, b.height))


def locate_main_cell(rgb: RGB) -> Box | None:
    """Return the one white cell that a labelled image is about."""
    boxes = locate_cells(rgb)
    if not boxes:
        return None
    return max(boxes, key=lambda b: (b.area, -b.x))


def _reduce(rgb: RGB) -> tuple[RGB, float]:
    height, width = rgb.shape[:2]
    scale = _WORK_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), scale


def fill_mask(rgb: RGB) -> NDArray[np.bool_]:
    """Return where a picture is the black fill that augmentation leaves."""
    return np.asarray(rgb.max(axis=2) < _FILL_LEVEL)


def background_level(rgb: RGB) -> NDArray[np.uint8]:
    """Return the colour of the empty background, uint8 of shape (3,)."""
    brightness = rgb.sum(axis=2, dtype=np.int32)
    pixels = rgb[~fill_mask(rgb)]
    if not pixels.size:
        return np.full(3, 255, np.uint8)
    brightness = pixels.sum(axis=1, dtype=np.int32)
    bright = pixels[brightness >= np.percentile(brightness, 90)]
    return np.median(bright, axis=0).astype(np.uint8)


def _optical_density(rgb: RGB) -> tuple[_Plane, NDArray[np.bool_]]:
    fill = fill_mask(rgb)
    levels = np.arange(256, dtype=np.float32)
    tables = [np.log((float(b) + 1) / (levels + 1)).astype(np.float32) for b in background_level(rgb)]
    density = np.stack([t[rgb[..., i]] for i, t in enumerate(tables)], axis=2)
    density[fill] = 0
    return density, fill


def _to_box(x: int, y: int, w: int, h: int, scale: float, shape: tuple[int, int]) -> Box:
    height, width = shape
    x0, y0 = max(0, int(x / scale)), max(0, int(y / scale))
    x1, y1 = min(width, int((x + w) / scale + 0.999)), min(height, int((y + h) / scale + 0.999))
    cut = x0 == 0 or y0 == 0 or x1 == width or y1 == height
    return Box(x0, y0, x1 - x0, y1 - y0, "WBC", 0.9, cut)
