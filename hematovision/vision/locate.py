"""Finding white cells in a field by their stain, without training.

In optical density (Beer and Lambert) relative to the empty background, three things absorb light in
a Romanowsky-stained smear: haemoglobin, eosin and the azure dyes of nuclei. The red cells of the
picture itself tell how haemoglobin absorbs in red, green and blue. With that part taken away, as much
of it as the blue channel shows, red cells vanish whatever their thickness and overlap, and what is
left is

- in the red channel, azure: nuclei (and, weakly, blue cytoplasm);
- in the green channel, azure and eosin that is not in red cells: whole white cells, granules included.

A nucleus says that there is a white cell, the green remainder around it says how far it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.vision.field import RGB, Box

_Plane = NDArray[np.float32]
_Mask = NDArray[np.uint8]

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
"""Azure density of a nucleus: pale out-of-focus nuclei reach 0.2, red cells stay below 0.05."""

_CELL_LEVEL = 0.06
"""Stain density of cytoplasm: pale neutrophil cytoplasm reaches 0.1, background noise stays below 0.03
after smoothing."""

_NUCLEUS_AREA = 0.66
"""Least nuclear area of a white cell, in areas of a red cell's mask. The smallest lymphocyte nuclei are
as large as a red cell, platelets a fifth of it, giant platelets a third; a cell that shows less
of its nucleus at the edge of the field could not be classified."""

_FILL_LEVEL = 24
"""Channel value below which pixels are black fill: stain is never so dark in all three channels, while
JPEG noise lifts fill to about 15."""

_HAEMOGLOBIN = (0.6, 1.2)
"""Density of haemoglobin in red and in green per density in blue, where a picture has no red cells to
measure: the middle of what 364 photographs of one laboratory gave (0.3 to 0.8 and 0.9 to 1.5)."""


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
    stains = _Stains.of(_resize(rgb, scale))
    radius = _red_radius(stains)
    low, high = _RED_RADIUS_RANGE
    if radius is not None and not low <= radius <= high:
        # never beyond the picture's own resolution, nor so small that nothing is left
        wanted = float(np.clip(scale * _RED_RADIUS / radius, 64 / max(rgb.shape[:2]), 1.0))
        if abs(wanted / scale - 1) > 0.1:
            scale = wanted
            stains = _Stains.of(_resize(rgb, scale))
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
    brightest = cv2.max(cv2.max(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    black = (brightest < _FILL_LEVEL).astype(np.uint8)
    if not black.any():
        return np.zeros(black.shape, np.bool_)
    black = cv2.morphologyEx(black, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels = cv2.connectedComponents(black)
    outside = np.zeros(count, np.uint8)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = 1
    outside[0] = 0
    return np.asarray(cv2.dilate(outside[labels], np.ones((5, 5), np.uint8)) > 0)


def background_level(rgb: RGB) -> NDArray[np.uint8]:
    """Return the colour of the empty background: the median of the brightest tenth of the pixels.

    Returns
    -------
    uint8 array of shape (3,)
        White where the picture is nothing but fill.
    """
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
    """Densities at the working size, each float32 of shape (height, width)."""

    azure: _Plane
    stain: _Plane
    red_cells: _Mask
    fill: NDArray[np.bool_]

    @classmethod
    def of(cls, rgb: RGB) -> _Stains:
        fill = fill_mask(rgb)
        levels = np.arange(256, dtype=np.float32)
        planes = []
        for i, level in enumerate(background_level(rgb)):
            table = np.log((float(level) + 1) / (levels + 1)).astype(np.float32)
            plane = cv2.LUT(np.ascontiguousarray(rgb[..., i]), table)
            plane[fill] = 0
            planes.append(cv2.GaussianBlur(plane, (0, 0), 1.5))
        red, green, blue = planes
        # pixels that can only be haemoglobin: blue absorbed, red hardly
        haemoglobin = (blue > 0.1) & (red - 0.5 * blue < 0.1) & (red < green) & ~fill
        in_red, in_green = _HAEMOGLOBIN
        if haemoglobin.sum() > 0.02 * haemoglobin.size:
            haemoglobin &= blue > 0.7 * np.median(blue[haemoglobin])
            in_red = float(np.clip(np.median(red[haemoglobin] / blue[haemoglobin]), 0.2, 1.0))
            in_green = float(np.clip(np.median(green[haemoglobin] / blue[haemoglobin]), 0.8, 2.0))
        blue = np.maximum(blue, 0)
        # the sum over the channels of what exceeds red: uneven light, which is grey, cancels out
        excess = green + blue - 2 * red
        typical = float(np.median(excess[haemoglobin])) if haemoglobin.any() else 0.2
        azure = red - in_red * blue
        red_cells = ((excess > 0.5 * typical) & (azure < _NUCLEUS_LEVEL)).astype(np.uint8)
        return cls(azure, green - in_green * blue, red_cells, fill)


def _red_radius(stains: _Stains) -> float | None:
    """Measure the radius of the red cells' masks in pixels; None if there are too few."""
    if stains.red_cells.mean() < 0.05:
        return None
    solid = _fill_holes(stains.red_cells, 700)
    inside = cv2.distanceTransform(solid, cv2.DIST_L2, 3)
    return float(np.percentile(inside[solid > 0], 90))


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


_SPLIT_DISTANCE = 2.9
"""Least distance between the middles of two cells, in red radii: two touching lymphocytes are at 3, the
lobes of one nucleus at 2."""

_SHED_DISTANCE = 1.5
"""The same where one of the two has no nucleus and is a red cell that was taken for cytoplasm."""

_NUCLEAR_SHARE = 0.1
"""Least share of nucleus in the middle of a white cell."""

_SPLIT_NECK = 0.8
"""Two cells are told apart where the neck between them is narrower than this share of the smaller."""

_TRIM = 0.5
"""Appendages narrower than this share of the cell's inscribed circle are not part of it: platelets and
rims of red cells that touch it."""

_LOBE_SHARE = 0.1
"""Pieces of nucleus of at least this share are lobes, and kept."""

_RIM = 2
"""Pixels added on each side: smoothing and threshold lose that much of a pale outline."""

_PAD = int(2 * _RED_RADIUS)


def _parts(stains: _Stains) -> list[_Part]:
    """Find the white cells at the working size."""
    nucleus = (stains.azure > _NUCLEUS_LEVEL).astype(np.uint8)
    cell = (stains.stain > _CELL_LEVEL).astype(np.uint8) | nucleus
    cell = _fill_holes(cell, 100)  # grain of the chromatin and small vacuoles
    # opening cuts off the coloured fringes of red cells, which are a few pixels wide
    cell = cv2.morphologyEx(cell, cv2.MORPH_OPEN, _disc(13)) | nucleus
    cell = cv2.morphologyEx(cell, cv2.MORPH_CLOSE, _disc(9))
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
        mask = (labels[window] == i).astype(np.uint8)
        for piece in _split(mask, nucleus[window]):
            whole = np.zeros_like(cell)
            whole[window] = _trim(piece, nucleus[window])
            part = _measure(whole[_PAD:-_PAD, _PAD:-_PAD], nucleus[_PAD:-_PAD, _PAD:-_PAD], stains)
            if part is not None and part.nucleus >= least:
                parts.append(part)
    return parts


def _pad(mask: _Mask, border: int) -> _Mask:
    padded: Any = cv2.copyMakeBorder(mask, _PAD, _PAD, _PAD, _PAD, border, value=0)
    return padded  # type: ignore[no-any-return]


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
    cut = cut or bool(stains.fill[y0:y1, x0:x1].any())
    return _Part(x0, y0, x1 - x0, y1 - y0, int(np.count_nonzero(inside)), density, cut)


def _split(mask: _Mask, nucleus: _Mask) -> list[_Mask]:
    """Split touching cells at the necks of their mask; return one mask a cell."""
    depth = cv2.GaussianBlur(cv2.distanceTransform(mask, cv2.DIST_L2, 5), (0, 0), 1.5)
    near = int(_RED_RADIUS)
    peaks = (depth == cv2.dilate(depth, _disc(2 * near + 1))) & (depth > 0.6 * _RED_RADIUS)
    rows, columns = np.nonzero(peaks)
    chosen: list[tuple[int, int]] = []
    for k in np.argsort(-depth[rows, columns], kind="stable"):
        point = (int(rows[k]), int(columns[k]))
        if all(_apart(depth, nucleus, point, other) for other in chosen):
            chosen.append(point)
    if len(chosen) < 2:
        return [mask]
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    reach = np.stack([np.hypot(y - r, x - c) - depth[r, c] for r, c in chosen])
    nearest = reach.argmin(axis=0)
    return [((nearest == k) & (mask > 0)).astype(np.uint8) for k in range(len(chosen))]


def _apart(depth: _Plane, nucleus: _Mask, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two peaks of the depth map are two cells, or a cell and something that it touches."""
    distance = float(np.hypot(a[0] - b[0], a[1] - b[1]))
    both = min(_nuclear_share(nucleus, p, float(depth[p])) for p in (a, b)) > _NUCLEAR_SHARE
    if distance < (_SPLIT_DISTANCE if both else _SHED_DISTANCE) * _RED_RADIUS:
        return False
    steps = np.linspace(0, 1, int(distance) + 1)
    rows = np.rint(a[0] + steps * (b[0] - a[0])).astype(int)
    columns = np.rint(a[1] + steps * (b[1] - a[1])).astype(int)
    neck = depth[rows, columns].min()
    return bool(neck < _SPLIT_NECK * min(depth[a], depth[b]))


def _nuclear_share(nucleus: _Mask, point: tuple[int, int], radius: float) -> float:
    """Share of nucleus in the square inscribed in the circle around a peak."""
    half = max(1, int(radius * 0.7))
    r, c = point
    return float(nucleus[max(0, r - half) : r + half + 1, max(0, c - half) : c + half + 1].mean())


def _trim(piece: _Mask, nucleus: _Mask) -> _Mask:
    """Cut off appendages of a cell, but no lobe of its nucleus."""
    depth = cv2.distanceTransform(piece, cv2.DIST_L2, 5)
    reach = _TRIM * float(depth.max())
    core = (depth > reach).astype(np.uint8)
    body = ((cv2.distanceTransform(1 - core, cv2.DIST_L2, 5) <= reach) & (piece > 0)).astype(np.uint8)
    count, labels = cv2.connectedComponents(nucleus & piece)
    sizes = np.bincount(labels.ravel(), minlength=count)
    sizes[0] = 0
    lobes = np.flatnonzero(sizes >= _LOBE_SHARE * sizes.sum())
    return body | (np.isin(labels, lobes) & (labels > 0)).astype(np.uint8)


def _disc(diameter: int) -> _Mask:
    disc: Any = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))
    return disc  # type: ignore[no-any-return]


def _resize(rgb: RGB, scale: float) -> RGB:
    height, width = rgb.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized: Any = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return resized  # type: ignore[no-any-return]


def _to_box(part: _Part, scale: float, shape: tuple[int, ...]) -> Box:
    height, width = shape[:2]
    x0, y0 = max(0, int(part.x / scale)), max(0, int(part.y / scale))
    x1 = min(width, int(np.ceil((part.x + part.width) / scale)))
    y1 = min(height, int(np.ceil((part.y + part.height) / scale)))
    full = np.pi * _RED_RADIUS**2
    score = min(1.0, part.nucleus / full) * min(1.0, part.density / (2 * _NUCLEUS_LEVEL))
    return Box(x0, y0, x1 - x0, y1 - y0, "WBC", round(score, 4), part.cut)
