"""Cutting a cell out of a field as a square picture of fixed size."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.vision.field import RGB, Box, Cell
from hematovision.vision.locate import background_colour, fill_mask, locate_main_cell

SIZE = 224
"""Side of a crop in pixels: what the ImageNet backbones were trained at."""

MARGIN = 0.15
"""Share of the cell's longer side that is kept around it on each side, so that the whole outline
and a rim of background stay in the picture."""


def crop_cell(rgb: RGB, box: Box, size: int = SIZE, margin: float = MARGIN) -> RGB:
    """Cut out a square around a cell.

    The square is centred on the box; its side is ``max(width, height) * (1 + 2 * margin)``. What
    lies outside the picture, or in the black fill that augmentation by rotation and shift leaves
    at the borders, takes the field's background colour: otherwise the fill would tell which
    copies belong together.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
    box : Box
        May reach beyond the picture.
    size : int
        Side of the result in pixels.
    margin : float
        Share of the box's longer side added on each side, at least 0.

    Returns
    -------
    uint8 array of shape (size, size, 3)
        Averaged over areas when shrunk, interpolated linearly when enlarged.
    """
    background = background_colour(rgb)
    side = max(1, round(max(box.width, box.height) * (1 + 2 * margin)))
    centre_x, centre_y = box.centre
    left, top = round(centre_x - side / 2), round(centre_y - side / 2)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = background
    height, width = rgb.shape[:2]
    x0, x1 = max(0, left), min(width, left + side)
    y0, y1 = max(0, top), min(height, top + side)
    if x0 < x1 and y0 < y1:
        part = rgb[y0:y1, x0:x1].copy()
        part[fill_mask(rgb)[y0:y1, x0:x1]] = background
        square[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return scale_crop(square, size)


def crop_main_cell(rgb: RGB, size: int = SIZE, margin: float = MARGIN, image: str = "") -> Cell:
    """Locate the cell an image is about and cut it out.

    Where no cell is found the central square of the picture is taken, and the score of the
    returned box is 0.
    """
    box = locate_main_cell(rgb)
    if box is None:
        height, width = rgb.shape[:2]
        side = min(height, width)
        box = Box((width - side) // 2, (height - side) // 2, side, side, "WBC", 0.0, True)
        return Cell(crop_cell(rgb, box, size, 0.0), box, image)
    return Cell(crop_cell(rgb, box, size, margin), box, image)


def scale_crop(crop: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale a square crop to the size that a network sees, the same way for training and for use.

    Parameters
    ----------
    crop : uint8 array of shape (side, side, 3)
    size : int
        In pixels.

    Returns
    -------
    uint8 array of shape (size, size, 3)
        Averaged over areas when shrunk, interpolated linearly when enlarged.
    """
    if crop.shape[0] == size:
        return crop
    how = cv2.INTER_AREA if size < crop.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(crop, (size, size), interpolation=how), np.uint8)
