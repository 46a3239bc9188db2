"""Finding white cells in a field by their stain, without training.

In optical density (Beer and Lambert) relative to the empty background, three things absorb light in
a Romanowsky-stained smear: haemoglobin, eosin and the azure dyes of nuclei. The red cells of the
picture itself tell how haemoglobin absorbs in red, green and blue. With that part taken away, as much
of it as the blue channel shows, red cells vanish whatever their thickness and overlap, and what is
left is

- in the red channel, azure: nuclei (and, weakly, blue cytoplasm);
- in the green channel, azure and eosin that is not in red cells: whole white cells, granules included.

A nucleus says that there is a white cell, the green remainder around it says how far it reaches.

The thresholds were chosen on the 364 annotated photographs of the Kaggle set (boxes alone, never
classes); the ranges for haemoglobin, the least density and the rules for splitting were widened until
they also fitted single-cell images of the Barcelona set and drawn fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.vision.field import RGB, Box

# Any, because OpenCV's stubs do not tell dtypes
_Plane = NDArray[Any]  # float32 of shape (height, width)
_Mask = NDArray[Any]  # uint8 of shape (height, width), 0 or 1

_WORK_SIDE = 320
"""Longer side in pixels at which cells are sought first. A 100x objective's field of 640 x 480 has red
cells of 40 to 50 pixels there and white cells of 60 to 130: small enough to be quick, large enough
to tell a platelet."""

_RED_RADIUS = 20.0
"""Radius in pixels of a red cell's mask at the working size; all other lengths follow from it
(a red cell is 7.5 micrometres wide in every smear, so that it is the ruler of the picture)."""

_RED_RADIUS_RANGE = (11.0, 34.0)
"""Measured radii inside this range keep the working size: the measure is good to a third only, as
clumps look wider and pale centres narrower; outside it the picture has another magnification."""

_NUCLEUS_LEVEL = 0.13
"""Azure density of a nucleus: the palest annotated ones have 0.18 in the mean, while 99 in 100 pixels of
red cells stay below 0.1 in every photograph."""

_CELL_LEVEL = 0.06
"""Stain density of cytoplasm: pale neutrophil cytoplasm reaches 0.1, while 95 in 100 pixels of empty
background stay below 0.04; the specks above are smaller than the opening that follows."""

_NUCLEUS_AREA = 0.66
"""Least nuclear area of a white cell, in areas of a red cell's mask. The smallest lymphocyte nuclei are
as large as a red cell; platelets, folds and slivers of cells at the edge of the field, which could
not be classified, stayed below 0.64 on the annotated photographs, annotated cells above 0.75."""

_FILL_LEVEL = 24
"""Channel value below which pixels are black fill: stain is never so dark in all three channels, while
99 in 100 pixels of JPEG-compressed fill stay below 14."""

_RINGING_LEVEL = 64
"""The same within 8 pixels of fill, a block of JPEG, where the sharp edge rings."""

_SMOOTHING = 1.5
"""Standard deviation in pixels of the smoothing: below the width of any rim, above JPEG's noise."""

_HAEMOGLOBIN = (0.6, 1.2)
"""Density of haemoglobin in red and in green per density in blue, where a picture has too few red cells
to measure: the middle of what the annotated photographs gave (0.3 to 0.8 and 0.9 to 1.5)."""

_HAEMOGLOBIN_RANGE = ((0.2, 1.3), (0.8, 2.0))
"""What is believed of a measurement: cameras and stains differ (the Barcelona set gives 1.1 and 1.6),
but beyond this something else than red cells was measured."""

_EXCESS = 0.2
"""Likewise, what green and blue absorb more than red in a red cell."""

_RED_SHARE = 0.02
"""Least share of red cells in the picture for measuring their colour."""

_RED_SHARE_FOR_SIZE = 0.05
"""The same for measuring their size, which takes several of them."""


_SPLIT_DISTANCE = 2.5
"""Least distance between the middles of two cells, in red radii: two touching lymphocytes are at 3, the
lobes of one nucleus at 2."""

_SPLIT_RADIUS = 0.8
"""Least radius of a cell that is told apart, in red radii: lobes of a nucleus reach two thirds."""

_SPLIT_NECK = 0.8
"""Two cells are told apart where the neck between them is narrower than this share of the smaller."""

_TRIM = 0.5
"""Appendages narrower than this share of the cell's inscribed circle are not part of it: platelets and
rims of red cells that touch it."""

_DENSITY_SHARE = 0.45
"""Least mean density of a nucleus in shares of the densest nucleus of the field, since all were in the
same bath: annotated pairs differ by a third at most, clumps of purplish red cells stay below 0.42."""

_LOBE_SHARE = 0.25
"""Pieces of nucleus of at least this share are lobes, and kept even where `_TRIM` would cut them off;
smaller ones outside the body are platelets."""

_RIM = 2
"""Pixels added on each side: smoothing and threshold lose that much of a pale outline."""

_PAD = int(2 * _RED_RADIUS)
"""Width of the mirror image at the edges of the picture: more than the radius of a cell."""


@dataclass(frozen=True)
class _Part:
    """One cell as found at the working size: its rectangle and what it was made of."""

    x: int
    y: int
    width: int
    height: int
    nucleus: int
    density: float
    cut: bool


def locate_cells(rgb: RGB) -> list[Box]:
    """Find the white cells of a field.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
        A field of a stained smear, of any size; black fill left by rotation or shift is ignored.

    Returns
    -------
    list of Box
        One around each whole cell (nucleus and cytoplasm), from left to right and then top to
        bottom, labelled ``"WBC"``; ``score`` grows with the size and the density of the nucleus,
        0 to 1, and ``cut`` tells cells that reach the edge of the picture or of the fill.
    """
    scale = _WORK_SIDE / max(rgb.shape[:2])
    stains = _separate_stains(_resize(rgb, scale))
    radius = _red_radius(stains)
    if radius is not None:
        # never beyond the picture's own resolution, nor so small that nothing is left
        scale = float(np.clip(scale * _RED_RADIUS / radius, 64 / max(rgb.shape[:2]), 1.0))
        stains = _separate_stains(_resize(rgb, scale))
    boxes = [_to_box(part, scale, rgb.shape) for part in _parts(stains)]
    return sorted(boxes, key=lambda b: (b.x, b.y, b.width, b.height))


def locate_main_cell(rgb: RGB) -> Box | None:
    """Return the one white cell that a labelled image is about, or None if none is found.

    The surest of the cells, a large one before a small, a central one before one at the edge, a
    whole one before one that is cut.
    """
    boxes = locate_cells(rgb)
    height, width = rgb.shape[:2]

    def weight(box: Box) -> tuple[float, int, int]:
        x, y = box.centre
        off = max(abs(x / width - 0.5), abs(y / height - 0.5))  # 0 in the middle, 0.5 at the edge
        return box.score * box.area**0.5 * (1 - off) * (0.7 if box.cut else 1.0), -box.x, -box.y

    return max(boxes, key=weight, default=None)


def fill_mask(rgb: RGB) -> NDArray[np.bool_]:
    """Return where a picture is the black fill that augmentation by rotation or shift leaves.

    Black that reaches the picture's edge, and a rim of two pixels in which it is blended with
    the picture.

    Returns
    -------
    bool array of shape (height, width)
    """
    rgb = np.ascontiguousarray(rgb)
    brightest = cv2.max(cv2.max(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    black = (brightest < _FILL_LEVEL).astype(np.uint8)
    if not black.any():
        return np.zeros(black.shape, np.bool_)
    solid = cv2.morphologyEx(black, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels = cv2.connectedComponents(solid)
    outside = np.zeros(count, np.uint8)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = 1
    outside[0] = 0
    fill = outside[labels]
    if not fill.any():
        return np.zeros(fill.shape, np.bool_)
    near = np.asarray(cv2.dilate(fill, np.ones((17, 17), np.uint8)), np.uint8)
    ringing = near & np.asarray(brightest < _RINGING_LEVEL, np.uint8)
    return np.asarray(cv2.dilate(fill | ringing, np.ones((5, 5), np.uint8)) > 0)


def background_colour(rgb: RGB) -> NDArray[np.uint8]:
    """Return the colour of the empty background: the median of the brightest tenth of the pixels.

    Returns
    -------
    uint8 array of shape (3,)
        White where the picture is nothing but fill.
    """
    rgb = np.ascontiguousarray(rgb)
    valid = (~fill_mask(rgb)).astype(np.uint8)
    brightness = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    limit = _quantile(brightness, valid, 0.9)
    bright = valid & (brightness >= limit)
    return np.array([_quantile(rgb[..., i], bright, 0.5) for i in range(3)], np.uint8)


def _quantile(plane: _Mask, mask: _Mask, share: float) -> int:
    """Return a quantile of the masked pixels by their histogram; 255 where the mask is empty."""
    counts = cv2.calcHist([plane], [0], mask, [256], [0, 256]).ravel().cumsum()
    return int(np.searchsorted(counts, share * counts[-1])) if counts[-1] else 255


@dataclass(frozen=True)
class _Stains:
    """What is stained with what, at the working size.

    Attributes
    ----------
    azure, stain : float32 arrays of shape (height, width)
        Optical density in red and in green that haemoglobin does not account for.
    red_cells : uint8 array of shape (height, width)
        1 in red cells.
    fill : bool array of shape (height, width)
    """

    azure: _Plane
    stain: _Plane
    red_cells: _Mask
    fill: NDArray[np.bool_]


def _separate_stains(rgb: RGB) -> _Stains:
    fill = fill_mask(rgb)
    red, green, blue = _optical_density(rgb, fill)
    in_red, in_green, typical = _measure_haemoglobin(red, green, blue, fill)
    haemoglobin = np.maximum(blue, 0)
    azure = red - in_red * haemoglobin
    red_cells = (_excess(red, green, blue) > 0.5 * typical) & (azure < _NUCLEUS_LEVEL)
    return _Stains(azure, green - in_green * haemoglobin, red_cells.astype(np.uint8), fill)


def _optical_density(rgb: RGB, fill: NDArray[np.bool_]) -> list[_Plane]:
    """Return the density of each channel relative to the background, smoothed; 0 in fill."""
    levels = np.arange(256, dtype=np.float32)
    planes: list[_Plane] = []
    for channel, level in enumerate(background_colour(rgb)):
        table = np.log((float(level) + 1) / (levels + 1)).astype(np.float32)
        plane = np.asarray(cv2.LUT(np.ascontiguousarray(rgb[..., channel]), table))
        plane[fill] = 0
        planes.append(np.asarray(cv2.GaussianBlur(plane, (0, 0), _SMOOTHING)))
    return planes


def _excess(red: _Plane, green: _Plane, blue: _Plane) -> _Plane:
    """Return what green and blue absorb more than red: large in red cells, and uneven light, which is
    grey, cancels out."""
    return green + blue - 2 * red


def _measure_haemoglobin(
    red: _Plane, green: _Plane, blue: _Plane, fill: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Measure how the red cells of the picture absorb.

    Returns
    -------
    in_red, in_green : float
        Density in red and green per density in blue.
    typical : float
        Their typical `_excess`.
    """
    # every second row and column: medians of a quarter of the pixels are as good
    red, green, blue = (plane[::2, ::2] for plane in (red, green, blue))
    # blue absorbed, and red not much: neither nuclei, nor background, nor dirt
    cells = (blue > 0.1) & (blue > 0.4 * green) & (red < 0.85 * green) & (red < 0.3) & ~fill[::2, ::2]
    if np.count_nonzero(cells) < _RED_SHARE * cells.size:
        return (*_HAEMOGLOBIN, _EXCESS)
    cells &= blue > 0.7 * np.median(blue[cells])  # without the pale centres
    r, g, b = red[cells], green[cells], blue[cells]
    in_red = float(np.clip(np.median(r / b), *_HAEMOGLOBIN_RANGE[0]))
    in_green = float(np.clip(np.median(g / b), *_HAEMOGLOBIN_RANGE[1]))
    return in_red, in_green, float(np.median(_excess(r, g, b)))


def _red_radius(stains: _Stains) -> float | None:
    """Measure the radius of the red cells' masks in pixels, where it is clearly not the usual one.

    Clumps look like larger cells and folds like smaller ones, so that two measures must agree before
    cells are called large: the depth that a tenth of the mask exceeds, and the median depth of its
    local maxima.
    """
    if stains.red_cells.mean() < _RED_SHARE_FOR_SIZE:
        return None
    solid = _fill_holes(stains.red_cells, 700)
    depth = cv2.distanceTransform(solid, cv2.DIST_L2, 3)
    radius = float(np.percentile(depth[solid > 0], 90))
    if radius < _RED_RADIUS_RANGE[0]:
        return radius
    if radius > _RED_RADIUS_RANGE[1]:
        depth = cv2.GaussianBlur(depth, (0, 0), 1.0)
        peaks = depth[(depth == cv2.dilate(depth, _disc(15))) & (depth > 4)]
        if np.median(peaks) > 0.8 * _RED_RADIUS_RANGE[1]:
            return radius
    return None


def _fill_holes(mask: _Mask, largest: float) -> _Mask:
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return mask
    holes = [
        c for c, node in zip(contours, tree[0], strict=True) if node[3] >= 0 and cv2.contourArea(c) < largest
    ]
    filled = mask.copy()
    cv2.drawContours(filled, holes, -1, 1, -1)
    return filled


def _parts(stains: _Stains) -> list[_Part]:
    """Find the white cells at the working size."""
    nucleus = (stains.azure > _NUCLEUS_LEVEL).astype(np.uint8)
    cell: _Mask = (stains.stain > _CELL_LEVEL).astype(np.uint8) | nucleus
    cell = _fill_holes(cell, 100)  # grain of the chromatin and small vacuoles
    # opening cuts off the coloured fringes of red cells, which are a few pixels wide
    cell = np.asarray(cv2.morphologyEx(cell, cv2.MORPH_OPEN, _disc(13)), np.uint8) | nucleus
    cell = np.asarray(cv2.morphologyEx(cell, cv2.MORPH_CLOSE, _disc(9)), np.uint8)
    cell[stains.fill > 0] = 0
    # beyond the picture's edge a cell goes on: its mirror image keeps distances from ending there
    cell = _pad(cell, cv2.BORDER_REFLECT)
    nucleus = _pad(nucleus, cv2.BORDER_CONSTANT)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(cell)
    nuclear = np.bincount(labels[nucleus > 0], minlength=count)
    least = _NUCLEUS_AREA * np.pi * _RED_RADIUS**2
    parts = []
    for i in np.flatnonzero(nuclear >= least):
        if i == 0:
            continue
        x, y, w, h = (int(v) for v in stats[i, :4])
        # a rim of background, so that distances are measured to the outline on all sides
        window = np.s_[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1]
        mask = _fill_holes((labels[window] == i).astype(np.uint8), np.inf)
        for piece in _split(mask):
            whole = np.zeros_like(cell)
            whole[window] = _trim(piece, nucleus[window])
            part = _measure(whole[_PAD:-_PAD, _PAD:-_PAD], nucleus[_PAD:-_PAD, _PAD:-_PAD], stains)
            if part is not None and part.nucleus >= least:
                parts.append(part)
    densest = max((p.density for p in parts), default=0.0)
    return [p for p in parts if p.density >= _DENSITY_SHARE * densest]


def _pad(mask: _Mask, border: int) -> _Mask:
    return np.asarray(cv2.copyMakeBorder(mask, _PAD, _PAD, _PAD, _PAD, border, value=0))


def _measure(cell: _Mask, nucleus: _Mask, stains: _Stains) -> _Part | None:
    x, y, w, h = cv2.boundingRect(cell)
    window = np.s_[y : y + h, x : x + w]
    inside = (cell[window] & nucleus[window]) > 0
    if not inside.any():
        return None
    density = float(stains.azure[window][inside].mean())
    height, width = cell.shape
    x0, y0, x1, y1 = x - _RIM, y - _RIM, x + w + _RIM, y + h + _RIM
    cut = x0 <= 0 or y0 <= 0 or x1 >= width or y1 >= height
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(width, x1), min(height, y1)
    around = np.s_[y0:y1, x0:x1]
    reached = np.asarray(cv2.dilate(cell[around], _disc(2 * _RIM + 1))) > 0
    cut = cut or bool((reached & stains.fill[around]).any())
    return _Part(x0, y0, x1 - x0, y1 - y0, int(np.count_nonzero(inside)), density, cut)


def _split(mask: _Mask) -> list[_Mask]:
    """Split touching cells at the necks of their mask; return one mask a cell."""
    depth = cv2.GaussianBlur(cv2.distanceTransform(mask, cv2.DIST_L2, 5), (0, 0), 1.5)
    near = int(_RED_RADIUS)
    peaks = (depth == cv2.dilate(depth, _disc(2 * near + 1))) & (depth > 0.6 * _RED_RADIUS)
    rows, columns = np.nonzero(peaks)
    chosen: list[tuple[int, int]] = []
    for k in np.argsort(-depth[rows, columns], kind="stable"):
        point = (int(rows[k]), int(columns[k]))
        if all(_apart(depth, point, other) for other in chosen):
            chosen.append(point)
    if len(chosen) < 2:
        return [mask]
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    reach = np.stack([np.hypot(y - r, x - c) - depth[r, c] for r, c in chosen])
    nearest = reach.argmin(axis=0)
    return [((nearest == k) & (mask > 0)).astype(np.uint8) for k in range(len(chosen))]


def _apart(depth: _Plane, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two peaks of the depth map are two cells, not two lobes of one."""
    distance = float(np.hypot(a[0] - b[0], a[1] - b[1]))
    if min(depth[a], depth[b]) < _SPLIT_RADIUS * _RED_RADIUS or distance < _SPLIT_DISTANCE * _RED_RADIUS:
        return False
    steps = np.linspace(0, 1, int(distance) + 1)
    rows = np.rint(a[0] + steps * (b[0] - a[0])).astype(int)
    columns = np.rint(a[1] + steps * (b[1] - a[1])).astype(int)
    neck = depth[rows, columns].min()
    return bool(neck < _SPLIT_NECK * min(depth[a], depth[b]))


def _trim(piece: _Mask, nucleus: _Mask) -> _Mask:
    """Cut off appendages of a cell, but no lobe of its nucleus."""
    depth = cv2.distanceTransform(piece, cv2.DIST_L2, 5)
    reach = _TRIM * float(depth.max())
    core = (depth > reach).astype(np.uint8)
    body = ((cv2.distanceTransform(1 - core, cv2.DIST_L2, 5) <= reach) & (piece > 0)).astype(np.uint8)
    lobe: _Mask = nucleus & piece
    count, labels = cv2.connectedComponents(lobe)
    sizes = np.bincount(labels.ravel(), minlength=count)
    sizes[0] = 0
    lobes = np.flatnonzero(sizes >= _LOBE_SHARE * sizes.sum())
    return body | (np.isin(labels, lobes) & (labels > 0)).astype(np.uint8)


def _disc(diameter: int) -> _Mask:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter)))


def _resize(rgb: RGB, scale: float) -> RGB:
    height, width = rgb.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(rgb), size, interpolation=how), np.uint8)


def _to_box(part: _Part, scale: float, shape: tuple[int, ...]) -> Box:
    height, width = shape[:2]
    x0, y0 = max(0, int(part.x / scale)), max(0, int(part.y / scale))
    x1 = min(width, int(np.ceil((part.x + part.width) / scale)))
    y1 = min(height, int(np.ceil((part.y + part.height) / scale)))
    full = np.pi * _RED_RADIUS**2
    score = min(1.0, part.nucleus / full) * min(1.0, part.density / (2 * _NUCLEUS_LEVEL))
    return Box(x0, y0, x1 - x0, y1 - y0, "WBC", round(score, 4), part.cut)
