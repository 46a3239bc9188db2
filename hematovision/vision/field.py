"""The values that travel: a box, a field of a smear, and a cell cut out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RGB = NDArray[np.uint8]  # uint8 array of shape (height, width, 3), sRGB


@dataclass(frozen=True)
class Box:
    """An axis-aligned rectangle in pixels: the columns ``x .. x + width - 1``, rows likewise.

    Attributes
    ----------
    x, y : int
        Left column and top row, from 0.
    width, height : int
        At least 1.
    label : str
        A class name, ``"WBC"`` for a white cell of unknown class, or any other object's name.
    score : float
        How sure the finder is, 0 to 1; 1 for annotations.
    cut : bool
        Whether the object is cut by the edge of the field.
    """

    x: int
    y: int
    width: int
    height: int
    label: str = "WBC"
    score: float = 1.0
    cut: bool = False

    @property
    def area(self) -> int:
        """Area in pixels."""
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        """``(x, y)`` of the middle, in pixels."""
        return self.x + self.width / 2, self.y + self.height / 2

    def intersection_over_union(self, other: Box) -> float:
        """Overlap with another box, 0 to 1."""
        w = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        h = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        if w <= 0 or h <= 0:
            return 0.0
        return w * h / (self.area + other.area - w * h)

    def contains(self, x: float, y: float) -> bool:
        """Whether the point lies inside."""
        return self.x <= x < self.x + self.width and self.y <= y < self.y + self.height


@dataclass(frozen=True)
class Field:
    """A field of a smear: an RGB picture and the boxes of what is in it.

    Attributes
    ----------
    rgb : uint8 array of shape (height, width, 3)
    boxes : tuple of Box
    name : str
        Where it comes from, for messages.
    masks : dict of str to bool or integer arrays of shape (height, width)
        Known only for drawn fields (for example ``"nucleus"`` and ``"cell"``).
    """

    rgb: RGB
    boxes: tuple[Box, ...] = ()
    name: str = ""
    masks: dict[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A white cell cut out of a field: a square RGB picture and where it came from."""

    rgb: RGB
    box: Box
    image: str = ""
