"""The white cells (and platelets), each with the morphology that the textbooks name.

One function a class, all alike: they take a generator and a radius in pixels and return a
`Drawing`. Concentrations are relative: a nucleus has about 1 of azure in the ``nuclear`` layer,
cytoplasm and granules are optical densities of a pale stain in the ``plasma`` layer; a laboratory
scales both. Morphology follows Bain, Blood Cells (5th ed.), chapter 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hematovision.data.smear.shapes import (
    Map,
    Mask,
    Points,
    depth,
    discs,
    erode,
    fill,
    outline,
    points_inside,
    rotate,
    soften,
    strand,
    texture,
)
from hematovision.data.smear.stains import AZURE, BLUE, EOSIN, HAEMOGLOBIN, STAINS

# Radius in pixels where red cells measure about 100: the annotated boxes of the public 640x480
# photographs (medians 215, 202, 245 and 155 pixels) are about a tenth wider than the cells in them.
RADII: dict[str, float] = {
    "neutrophil": 95.0,
    "eosinophil": 97.0,
    "monocyte": 109.0,
    "lymphocyte": 70.0,
    "basophil": 86.0,
    "erythroblast": 58.0,
    "ig": 106.0,
    "platelet": 22.0,
}


@dataclass
class Drawing:
    """One cell on a square patch, its centre in the middle.

    Attributes
    ----------
    nuclear, plasma : float32 arrays of shape (4, size, size)
        Concentrations of the stains in chromatin, and in cytoplasm and granules.
    clear : float32 array of shape (size, size)
        Share of the stain that is left, 1 but for vacuoles and the glints of granules.
    cell, nucleus : bool arrays of shape (size, size)
        The nucleus lies inside the cell.
    """

    nuclear: NDArray[np.float32]
    plasma: NDArray[np.float32]
    clear: Map
    cell: Mask
    nucleus: Mask


def draw_white(rng: np.random.Generator, label: str, radius: float) -> Drawing:
    """Draw one cell of a class.

    Parameters
    ----------
    rng : numpy.random.Generator
    label : str
        A name of `hematovision.classes`.
    radius : float
        Mean radius in pixels.
    """
    return _DRAWERS[label](rng, radius)


def _blank(cell: Mask, nucleus: Mask) -> Drawing:
    shape = cell.shape
    layers = np.zeros((2, STAINS, *shape), np.float32)
    return Drawing(layers[0], layers[1], np.ones(shape, np.float32), cell, nucleus)


def _patch(radius: float) -> tuple[tuple[int, int], Points]:
    size = 2 * int(np.ceil(radius * 1.5)) + 9
    return (size, size), np.array([size / 2.0, size / 2.0])


def _chromatin(
    rng: np.random.Generator,
    drawing: Drawing,
    density: float,
    contrast: float,
    scales: tuple[float, ...],
    blue: float = 0.0,
    edge: float = 1.2,
) -> None:
    """Fill the nucleus: thicker in the middle of each lobe, clumped by filtered noise."""
    inside = depth(drawing.nucleus)
    reach = max(float(inside.max()), 1.0)
    dome = 0.82 + 0.22 * np.sqrt(np.clip(inside / min(reach, 30.0), 0, 1))
    clumps = np.clip(1 + contrast * texture(rng, drawing.cell.shape, scales), 0.35, 1.6)
    body = soften(drawing.nucleus, edge) * dome * clumps * np.float32(density)
    drawing.nuclear[AZURE] += body * np.float32(1 - 0.5 * blue)
    drawing.nuclear[BLUE] += body * np.float32(blue)


def _cytoplasm(
    rng: np.random.Generator,
    drawing: Drawing,
    stain: int,
    amount: float,
    mottle: float,
    scales: tuple[float, ...],
    edge: float = 1.5,
) -> Map:
    """Fill the cell evenly with a stain, thinning out to the edge; return the layer."""
    inside = depth(drawing.cell)
    thickness = 0.7 + 0.3 * np.clip(inside / 14.0, 0, 1)
    grain = np.clip(1 + mottle * texture(rng, drawing.cell.shape, scales), 0.1, 2.5)
    layer = soften(drawing.cell, edge) * thickness * grain * np.float32(amount)
    drawing.plasma[stain] += layer
    return np.asarray(layer, np.float32)


def _lobes(
    rng: np.random.Generator,
    shape: tuple[int, int],
    middle: Points,
    radius: float,
    count: int,
    lobe: float,
    ring: float,
    span: float,
    bridge: float,
) -> Mask:
    """Return lobes strung along an arc and joined by bridges.

    ``lobe`` and ``ring`` are the radii of a lobe and of the arc, relative to the cell's; ``span``
    is the angle of the arc in radians; ``bridge`` the width of the joints relative to the lobes.
    """
    start, hand = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    angles = start + hand * (np.linspace(0, span, count) + rng.normal(0, 0.1, count))
    distance = radius * ring * rng.uniform(0.8, 1.15, count)
    centres = middle + np.stack([np.cos(angles), np.sin(angles)], 1) * distance[:, None]
    polygons = []
    for centre, angle in zip(centres, angles, strict=True):
        size = radius * lobe * rng.uniform(0.82, 1.18)
        along = angle + np.pi / 2 + rng.normal(0, 0.35)
        polygons.append(outline(rng, size, 0.09, rng.uniform(1.05, 1.6), along, modes=5) + centre)
    mask = fill(shape, *polygons)
    for a, b in itertools.pairwise(centres):
        between = (a + b) / 2 + (middle - (a + b) / 2) * rng.uniform(-0.35, 0.15)
        mask |= strand(shape, np.stack([a, between, b]), bridge * lobe * radius * rng.uniform(0.7, 1.4))
    return mask


def _band(
    rng: np.random.Generator,
    shape: tuple[int, int],
    middle: Points,
    radius: float,
    width: float,
    ring: float,
    span: float,
) -> Mask:
    """Return a horseshoe: a thick arc with rounded, uneven ends."""
    start = rng.uniform(0, 2 * np.pi)
    steps = np.linspace(0, span, 9)
    polygons = []
    swell = 1 + 0.18 * np.cos(steps / max(span, 1e-6) * 2 * np.pi * rng.uniform(0.7, 1.3) + rng.uniform(0, 6))
    for step, s in zip(steps, swell, strict=True):
        turn = start + step
        centre = middle + radius * ring * np.array([np.cos(turn), np.sin(turn) * 0.9])
        polygons.append(outline(rng, radius * width * s, 0.05, 1.1, modes=3, vertices=48) + centre)
    return fill(shape, *polygons)


def _neutrophil(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.035, rng.uniform(1.0, 1.25)) + middle)
    off = middle + rng.normal(0, 0.08, 2) * radius
    if rng.uniform() < 0.2:
        width, ring, span = rng.uniform(0.24, 0.33), rng.uniform(0.42, 0.52), rng.uniform(3.0, 5.0)
        nucleus = _band(rng, shape, off, radius, width, ring, span)
    else:
        count = int(rng.choice([2, 3, 4, 5], p=[0.10, 0.38, 0.35, 0.17]))
        lobe = {2: 0.45, 3: 0.395, 4: 0.345, 5: 0.305}[count] * rng.uniform(0.9, 1.12)
        span = {2: 2.5, 3: 3.7, 4: 4.5, 5: 5.1}[count] * rng.uniform(0.85, 1.08)
        ring, bridge = rng.uniform(0.49, 0.60), rng.uniform(0.12, 0.7)
        nucleus = _lobes(rng, shape, off, radius, count, lobe, ring, span, bridge)
    drawing = _blank(cell, nucleus & erode(cell, 3))
    _cytoplasm(rng, drawing, EOSIN, rng.uniform(0.035, 0.065), 0.2, (3.0, 7.0))
    _cytoplasm(rng, drawing, AZURE, rng.uniform(0.03, 0.065), 0.3, (2.5, 4.0, 14.0))
    _chromatin(rng, drawing, rng.uniform(0.9, 1.05), rng.uniform(0.09, 0.16), (5.5, 9.0, 13.0))
    _vacuoles(rng, drawing, rng.poisson(0.8), (2.0, 5.0), 0.6)
    return drawing


def _eosinophil(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.04, rng.uniform(1.0, 1.3)) + middle)
    off = middle + rng.normal(0, 0.13, 2) * radius
    count = int(rng.choice([2, 3], p=[0.75, 0.25]))
    lobe = (0.51 if count == 2 else 0.43) * rng.uniform(0.88, 1.12)
    span = (2.3 if count == 2 else 3.4) * rng.uniform(0.75, 1.3)
    nucleus = _lobes(
        rng, shape, off, radius, count, lobe, rng.uniform(0.5, 0.62), span, rng.uniform(0.2, 0.6)
    )
    drawing = _blank(cell, nucleus & erode(cell, 2))
    _cytoplasm(rng, drawing, EOSIN, rng.uniform(0.055, 0.09), 0.12, (6.0, 20.0))
    _cytoplasm(rng, drawing, AZURE, rng.uniform(0.02, 0.06), 0.3, (5.0, 20.0))
    _chromatin(
        rng,
        drawing,
        rng.uniform(0.82, 1.0),
        rng.uniform(0.07, 0.16),
        (4.5, 8.0, 16.0),
        blue=rng.uniform(0, 0.25),
    )
    _eosinophil_granules(rng, drawing, radius)
    return drawing


def _eosinophil_granules(rng: np.random.Generator, drawing: Drawing, radius: float) -> None:
    """Pack the cytoplasm with coarse, round, refractile granules; now and then the cell has burst."""
    shape, coarse = drawing.cell.shape, rng.uniform(0.2, 1.0)
    size = max(radius * rng.uniform(0.026, 0.04), 1.6)
    inside = erode(drawing.cell, 1) & ~erode(drawing.nucleus, 7)
    places = points_inside(rng, inside, int(0.7 * (radius / size) ** 2))
    if rng.uniform() < 0.08 and len(places):
        middle = np.array([shape[1], shape[0]]) / 2
        places = middle + (places - middle) * rng.uniform(0.9, 1.3, (len(places), 1))
    granules = discs(shape, places, rng.uniform(0.8, 1.25, len(places)) * size)
    body = soften(drawing.cell & ~drawing.nucleus, 2)
    drawing.plasma[EOSIN] += 0.06 * coarse * np.minimum(granules, 2.2) + 0.09 * (1 - coarse) * body
    glints = discs(shape, places[::4] - size * 0.3, np.full(len(places[::4]), size * 0.5))
    drawing.clear *= 1 - 0.35 * coarse * np.clip(glints, 0, 1)


def _lymphocyte(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    large = rng.uniform() < 0.25
    radius = radius * (1.12 if large else 1.0)
    stretch, angle = rng.uniform(1.0, 1.3), rng.uniform(0, 2 * np.pi)
    inner = radius * (rng.uniform(0.76, 0.86) if large else rng.uniform(0.87, 0.96))
    polygons = [outline(rng, radius, 0.045, stretch, angle) + middle]
    for _ in range(rng.poisson(1.4)):  # blebs and tags of cytoplasm
        turn = rng.uniform(0, 2 * np.pi)
        tip = middle + radius * rng.uniform(0.8, 1.02) * np.array([np.cos(turn), np.sin(turn)])
        polygons.append(outline(rng, radius * rng.uniform(0.1, 0.26), 0.15, rng.uniform(1, 2), turn) + tip)
    cell = fill(shape, *polygons)
    shift = rng.normal(0, 0.45, 2) * (radius - inner)
    nucleus = fill(
        shape, outline(rng, inner, 0.04, stretch * rng.uniform(0.92, 1.08), angle) + middle + shift
    )
    drawing = _blank(cell, nucleus & erode(cell, 2))
    _cytoplasm(rng, drawing, BLUE, rng.uniform(0.09, 0.18), 0.15, (5.0, 12.0), edge=2.2)
    _cytoplasm(rng, drawing, AZURE, rng.uniform(0.0, 0.06), 0.15, (5.0, 12.0), edge=2.2)
    density, blue = rng.uniform(0.85, 1.1), rng.uniform(0.0, 0.28)
    _chromatin(rng, drawing, density, 0.07, (8.0, 16.0, 30.0), blue=blue, edge=rng.uniform(1.5, 4.0))
    return drawing


def _monocyte(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    # folded, spread out between its neighbours: angular rather than scalloped
    rough, modes = rng.uniform(0.045, 0.09), int(rng.integers(5, 10))
    cell = fill(
        shape, outline(rng, radius, rough, rng.uniform(1.0, 1.35), modes=modes, vertices=160) + middle
    )
    off = middle + rng.normal(0, 0.13, 2) * radius
    kind = rng.uniform()
    if kind < 0.4:
        nucleus = _kidney(rng, shape, off, radius * rng.uniform(0.74, 0.90))
    elif kind < 0.55:
        width, ring = rng.uniform(0.36, 0.44), rng.uniform(0.34, 0.44)
        nucleus = _band(rng, shape, off, radius, width, ring, rng.uniform(2.2, 3.8))
    else:
        nucleus = fill(
            shape, outline(rng, radius * rng.uniform(0.72, 0.9), 0.10, rng.uniform(1.05, 1.5)) + off
        )
    drawing = _blank(cell, nucleus & erode(cell, 3))
    _cytoplasm(rng, drawing, BLUE, rng.uniform(0.035, 0.075), 0.25, (4.0, 9.0, 30.0), edge=2.0)
    _cytoplasm(rng, drawing, AZURE, rng.uniform(0.02, 0.06), 0.3, (3.0, 6.0, 12.0), edge=2.0)
    _cytoplasm(rng, drawing, EOSIN, rng.uniform(0.0, 0.03), 0.3, (3.0, 6.0), edge=2.0)
    _chromatin(rng, drawing, rng.uniform(0.66, 0.9), rng.uniform(0.09, 0.16), (5.0, 9.0, 18.0))
    _folds(rng, drawing)
    _vacuoles(rng, drawing, rng.poisson(rng.choice([3.0, 13.0])), (1.5, 7.0), 0.65)
    return drawing


def _kidney(rng: np.random.Generator, shape: tuple[int, int], middle: Points, radius: float) -> Mask:
    """Return a bean: an ellipse with a bay in one long side."""
    turn = rng.uniform(0, 2 * np.pi)
    body = outline(rng, radius, 0.05, rng.uniform(1.15, 1.45), turn) + middle
    bay = rotate(np.array([[0.0, radius * rng.uniform(0.85, 1.1)]]), turn)[0]
    notch = (
        outline(rng, radius * rng.uniform(0.35, 0.5), 0.08, rng.uniform(1.0, 1.5), turn + np.pi / 2)
        + middle
        + bay
    )
    return fill(shape, body) & ~fill(shape, notch)


def _folds(rng: np.random.Generator, drawing: Drawing) -> None:
    """Crease the nucleus with a few pale and dark lines."""
    for _ in range(rng.integers(1, 4)):
        ends = points_inside(rng, drawing.nucleus, 3)
        if len(ends) < 3:
            return
        crease = soften(strand(drawing.cell.shape, ends, 4), 2.5) * drawing.nucleus
        drawing.nuclear[AZURE] *= 1 + np.float32(rng.choice([-0.22, 0.15])) * crease


def _vacuoles(
    rng: np.random.Generator, drawing: Drawing, count: int, sizes: tuple[float, float], strength: float
) -> None:
    """Punch clear holes, sharp and round, over cytoplasm and nucleus."""
    places = points_inside(rng, erode(drawing.cell, 4), int(count))
    if len(places):
        holes = discs(drawing.cell.shape, places, rng.uniform(*sizes, len(places)))
        drawing.clear *= 1 - np.float32(strength) * np.clip(soften(holes, 0.8), 0, 1)


def _basophil(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.04, rng.uniform(1.0, 1.2)) + middle)
    off = middle + rng.normal(0, 0.06, 2) * radius
    count = int(rng.choice([2, 3]))
    nucleus = _lobes(rng, shape, off, radius, count, 0.42, 0.34, rng.uniform(2.0, 3.4), 0.9)
    drawing = _blank(cell, nucleus & erode(cell, 2))
    _cytoplasm(rng, drawing, AZURE, 0.11, 0.4, (4.0, 9.0))
    _cytoplasm(rng, drawing, BLUE, 0.015, 0.4, (4.0, 9.0))
    _chromatin(rng, drawing, 0.8, 0.12, (8.0, 16.0))
    size = max(radius * 0.042, 1.8)
    places = points_inside(rng, erode(cell, 1), int(rng.uniform(170, 330)))
    granules = discs(shape, places, rng.uniform(0.6, 1.5, len(places)) * size)
    drawing.nuclear[AZURE] += 0.55 * np.minimum(soften(granules, 0.7), 1.3)
    drawing.nuclear[BLUE] += 0.05 * np.minimum(granules, 1.3)
    return drawing


def _erythroblast(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.03, rng.uniform(1.0, 1.15)) + middle)
    ripeness = rng.uniform()
    inner = radius * (0.76 - 0.28 * ripeness)
    off = middle + rng.normal(0, 0.35, 2) * (radius - inner)
    nucleus = fill(shape, outline(rng, inner, 0.02, rng.uniform(1.0, 1.08)) + off)
    drawing = _blank(cell, nucleus & erode(cell, 2))
    _cytoplasm(rng, drawing, BLUE, 0.20 - 0.13 * ripeness, 0.15, (6.0, 14.0))
    _cytoplasm(rng, drawing, HAEMOGLOBIN, 0.04 + 0.09 * ripeness, 0.08, (10.0,))
    _chromatin(rng, drawing, 1.15 + 0.25 * ripeness, 0.16 - 0.1 * ripeness, (7.0, 12.0), blue=0.1)
    return drawing


def _ig(rng: np.random.Generator, radius: float) -> Drawing:
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.03, rng.uniform(1.0, 1.2)) + middle)
    off = middle + rng.normal(0, 0.12, 2) * radius
    inner = radius * rng.uniform(0.62, 0.76)
    if rng.uniform() < 0.5:
        nucleus = _kidney(rng, shape, off, inner * 1.06)
    else:
        nucleus = fill(shape, outline(rng, inner, 0.03, rng.uniform(1.0, 1.3)) + off)
    drawing = _blank(cell, nucleus & erode(cell, 3))
    _cytoplasm(rng, drawing, BLUE, rng.uniform(0.02, 0.10), 0.2, (6.0, 20.0))
    _cytoplasm(rng, drawing, EOSIN, 0.05, 0.2, (4.0, 9.0))
    _chromatin(rng, drawing, 0.86, 0.12, (5.0, 10.0))
    places = points_inside(rng, erode(cell, 2), int(rng.uniform(180, 420)))
    granules = discs(shape, places, rng.uniform(1.2, 2.4, len(places)))
    drawing.plasma[AZURE] += rng.uniform(0.10, 0.22) * np.minimum(granules, 2.0)
    return drawing


def _platelet(rng: np.random.Generator, radius: float) -> Drawing:
    radius = radius * rng.uniform(0.7, 1.3)
    shape, middle = _patch(radius)
    cell = fill(shape, outline(rng, radius, 0.09, rng.uniform(1.0, 1.4), modes=9) + middle)
    drawing = _blank(cell, np.zeros(shape, bool))
    _cytoplasm(rng, drawing, BLUE, rng.uniform(0.06, 0.12), 0.2, (4.0,))
    places = points_inside(rng, erode(cell, radius * 0.25), int(radius * 1.6))
    granules = discs(shape, places, rng.uniform(1.2, 2.4, len(places)))
    core = soften(erode(cell, radius * 0.3), radius * 0.15)
    drawing.plasma[AZURE] += 0.10 * np.minimum(granules, 2.5) + 0.10 * core
    return drawing


_DRAWERS: dict[str, Callable[[np.random.Generator, float], Drawing]] = {
    "neutrophil": _neutrophil,
    "eosinophil": _eosinophil,
    "monocyte": _monocyte,
    "lymphocyte": _lymphocyte,
    "basophil": _basophil,
    "erythroblast": _erythroblast,
    "ig": _ig,
    "platelet": _platelet,
}
