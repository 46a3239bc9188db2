"""Outlines, filled masks and smooth noise: what every drawn cell is made of."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n, 2) vertices, x then y, in pixels
Mask = NDArray[np.bool_]  # (height, width)
Map = NDArray[np.float32]  # (height, width)

_SUBPIXEL = 4  # bits after the point in OpenCV's fixed-point vertices


def outline(
    rng: np.random.Generator,
    radius: float,
    roughness: float = 0.05,
    elongation: float = 1.0,
    angle: float | None = None,
    modes: int = 7,
    vertices: int = 96,
) -> Points:
    """Return a closed, wobbling ellipse around the origin.

    Parameters
    ----------
    rng : numpy.random.Generator
    radius : float
        Radius in pixels of the circle of about the same area.
    roughness : float
        Relative amplitude of the wobble of the radius (low frequencies weigh most).
    elongation : float
        Long axis over short axis.
    angle : float, optional
        Direction of the long axis in radians; random if not given.
    modes : int
        Number of wobbles around the outline; more make it more ragged.
    vertices : int

    Returns
    -------
    float64 array of shape (vertices, 2)
    """
    theta = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    order = np.arange(2, 2 + modes)[:, None]
    amplitude = roughness * rng.normal(size=(modes, 1)) / np.sqrt(order - 1)
    wobble = (amplitude * np.cos(order * theta + rng.uniform(0, 2 * np.pi, (modes, 1)))).sum(axis=0)
    r = radius * np.maximum(1 + wobble, 0.3)
    points = np.stack([r * np.cos(theta) * np.sqrt(elongation), r * np.sin(theta) / np.sqrt(elongation)], 1)
    turn = rng.uniform(0, 2 * np.pi) if angle is None else angle
    return rotate(points, turn)


def rotate(points: Points, angle: float) -> Points:
    """Turn points about the origin by an angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def fill(shape: tuple[int, int], *polygons: Points) -> Mask:
    """Return the union of filled polygons as a mask of the given ``(height, width)``."""
    canvas = np.zeros(shape, np.uint8)
    for points in polygons:
        cv2.fillPoly(canvas, [np.round(points * 2**_SUBPIXEL).astype(np.int32)], 1, cv2.LINE_8, _SUBPIXEL)
    return canvas.astype(bool)


def strand(shape: tuple[int, int], points: Points, width: float) -> Mask:
    """Return an open line of the given width in pixels as a mask."""
    canvas = np.zeros(shape, np.uint8)
    fixed = np.round(points * 2**_SUBPIXEL).astype(np.int32)
    cv2.polylines(canvas, [fixed], False, 1, max(1, round(width)), cv2.LINE_8, _SUBPIXEL)
    return canvas.astype(bool)


def discs(shape: tuple[int, int], centres: Points, radii: NDArray[np.float64]) -> Map:
    """Return how many soft discs cover each pixel: granules, vacuoles, specks."""
    canvas = np.zeros(shape, np.float32)
    for (x, y), r in zip(centres, radii, strict=True):
        reach = int(np.ceil(r)) + 1
        left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
        right, bottom = min(int(x) + reach + 1, shape[1]), min(int(y) + reach + 1, shape[0])
        if right <= left or bottom <= top:
            continue
        dx = np.arange(left, right, dtype=np.float32) - np.float32(x)
        dy = np.arange(top, bottom, dtype=np.float32) - np.float32(y)
        distance = np.sqrt(dy[:, None] ** 2 + dx[None, :] ** 2)
        canvas[top:bottom, left:right] += np.clip(np.float32(r + 0.5) - distance, 0, 1)
    return canvas


def soften(mask: Mask | Map, sigma: float) -> Map:
    """Return the mask as floats with an edge blurred by ``sigma`` pixels."""
    values = np.asarray(mask, np.float32)
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma) if sigma > 0 else values, np.float32)


def depth(mask: Mask) -> Map:
    """Return the distance in pixels of each inside pixel from the edge of the mask."""
    return np.asarray(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3), np.float32)


def texture(rng: np.random.Generator, shape: tuple[int, int], scales: Sequence[float]) -> Map:
    """Return smooth noise of mean about 0 and standard deviation 1.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape : (height, width)
    scales : sequence of float
        Sizes in pixels of the grains that are mixed, in equal parts.
    """
    total = np.zeros(shape, np.float32)
    for scale in scales:
        grid = (max(int(np.ceil(shape[0] / scale)) + 2, 3), max(int(np.ceil(shape[1] / scale)) + 2, 3))
        coarse = rng.standard_normal(grid, dtype=np.float32)
        fine = cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
        total += fine
    return np.asarray(total / max(float(total.std()), 1e-6), np.float32)


def erode(mask: Mask, pixels: float) -> Mask:
    """Return the mask without its outermost ``pixels``."""
    return np.asarray(depth(mask) > pixels, bool)


def points_inside(rng: np.random.Generator, mask: Mask, count: int) -> Points:
    """Return random positions ``(x, y)`` inside a mask (none if the mask is empty)."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return np.zeros((0, 2))
    chosen = rng.integers(0, len(rows), count)
    return np.stack([columns[chosen], rows[chosen]], 1) + rng.uniform(-0.5, 0.5, (count, 2))
