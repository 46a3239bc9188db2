"""Composing a field: where the cells lie, and what lies around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hematovision.data.smear import optics
from hematovision.data.smear.cells import RADII, Drawing, draw_white
from hematovision.data.smear.shapes import Map, Mask, depth, discs, fill, outline, soften, texture
from hematovision.data.smear.stains import AZURE, BLUE, EOSIN, HAEMOGLOBIN, STAINS, Laboratory
from hematovision.vision.field import RGB, Box

RED_RADIUS = 50.0  # pixels in a 640x480 photograph, as annotated there
_HIDES = 0.93  # share of the red cells' density that a white cell lying on them displaces


@dataclass
class Slide:
    """A field while it is drawn.

    Attributes
    ----------
    stains : float32 array of shape (4, height, width)
    light : float32 array of shape (height, width)
        Extra share of light: above 1 where something refracts, below 1 in shadows.
    instance : int32 array of shape (height, width)
        0, or the number from 1 of the white cell there.
    nucleus : bool array of shape (height, width)
    boxes : list of Box
    """

    stains: NDArray[np.float32]
    light: Map
    instance: NDArray[np.int32]
    nucleus: Mask
    boxes: list[Box]

    @property
    def shape(self) -> tuple[int, int]:
        """``(height, width)`` in pixels."""
        return self.light.shape[0], self.light.shape[1]


@dataclass(frozen=True)
class Smear:
    """How this part of the smear was spread: cells are wide and pale, or small and dense."""

    spread: float
    scale: float
    defocus: float
    red_radius: float
    pallor: float
    crowding: float


def smear_of(rng: np.random.Generator, lab: Laboratory, scale: float) -> Smear:
    """Return the local state of a smear; ``scale`` is 1 at the magnification of 640x480 fields."""
    return Smear(
        spread=float(np.clip(rng.normal(0.95, 0.12), 0.68, 1.14)),
        scale=scale,
        defocus=float(abs(rng.normal(0, 0.9)) if rng.uniform() < 0.9 else rng.uniform(2.0, 4.0)),
        red_radius=RED_RADIUS * scale * float(rng.normal(0.95, 0.06)),
        pallor=float(rng.uniform(0.25, 0.9)),
        crowding=lab.crowding * float(rng.uniform(0.6, 1.25)),
    )


def compose(
    rng: np.random.Generator,
    labels: Sequence[str],
    lab: Laboratory,
    shape: tuple[int, int],
    scale: float = 1.0,
    centred: bool = False,
) -> tuple[RGB, Slide]:
    """Draw a field and photograph it.

    Parameters
    ----------
    rng : numpy.random.Generator
    labels : sequence of str
        One white cell for each.
    lab : Laboratory
    shape : (height, width)
    scale : float
        Magnification; 1 is that of the 640x480 photographs.
    centred : bool
        Whether the first cell lies in the middle.

    Returns
    -------
    rgb : uint8 array of shape (height, width, 3)
        Before JPEG.
    slide : Slide
    """
    smear = smear_of(rng, lab, scale)
    slide = Slide(
        stains=np.zeros((STAINS, *shape), np.float32),
        light=optics.dust(rng, shape),
        instance=np.zeros(shape, np.int32),
        nucleus=np.zeros(shape, bool),
        boxes=[],
    )
    drawings = [
        draw_white(rng, label, RADII[label] * scale * smear.spread * rng.normal(1.0, 0.07))
        for label in labels
    ]
    centres = _place_white(rng, slide.shape, [_radius(d) for d in drawings], centred)
    _red_cells(rng, slide, smear, lab, centres, [_radius(d) for d in drawings])
    _platelets(rng, slide, smear, lab, centres, [_radius(d) for d in drawings])
    for number, (drawing, centre, label) in enumerate(zip(drawings, centres, labels, strict=True), start=1):
        _lay(slide, drawing, centre, lab, smear, number, label)
    slide.boxes[:0] = _white_boxes(slide, labels)
    _specks(rng, slide, scale)
    _haze(rng, slide)
    light = optics.transmit(slide.stains, lab) * slide.light[..., None]
    light = optics.focus(light * optics.illuminate(rng, shape, lab), lab, smear.defocus * scale)
    return optics.expose(rng, light, lab), slide


def _radius(drawing: Drawing) -> float:
    return float(np.sqrt(drawing.cell.sum() / np.pi))


def _place_white(
    rng: np.random.Generator, shape: tuple[int, int], radii: list[float], centred: bool
) -> list[tuple[int, int]]:
    """Return a centre for each white cell: some at the edge, some touching, none on another."""
    height, width = shape
    centres: list[tuple[int, int]] = []
    for i, radius in enumerate(radii):
        cut = rng.uniform() < 0.18
        inset = radius * (0.25 if cut else 1.04)
        touching = i > 0 and rng.uniform() < 0.45
        best, room = (width // 2, height // 2), -np.inf
        for _ in range(60):
            if centred and i == 0:
                x, y = width / 2, height / 2
            elif touching:
                turn = rng.uniform(0, 2 * np.pi)
                reach = (radius + radii[i - 1]) * rng.uniform(0.96, 1.06)
                x, y = centres[-1][0] + reach * np.cos(turn), centres[-1][1] + reach * np.sin(turn)
            else:
                x = rng.uniform(min(inset, width / 2), max(width - inset, width / 2))
                y = rng.uniform(min(inset, height / 2), max(height - inset, height / 2))
            gaps = [
                np.hypot(x - cx, y - cy) - 0.95 * (radius + r)
                for (cx, cy), r in zip(centres, radii, strict=False)
            ]
            # at least a quarter of the radius beyond the centre must be in the field
            edge = min(x, y, width - x, height - y) - 0.25 * radius
            clearance = min([*gaps, edge])
            if clearance > room:
                best, room = (round(x), round(y)), clearance
            if clearance >= 0:
                break
        centres.append(best)
    return centres


def _window(
    slide: Slide, centre: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Return the slices of the field and of a patch centred there, or None if they do not meet."""
    top, left = centre[1] - size[0] // 2, centre[0] - size[1] // 2
    height, width = slide.shape
    rows = slice(max(top, 0), min(top + size[0], height))
    columns = slice(max(left, 0), min(left + size[1], width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    inner = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    return (rows, columns), inner


def _lay(
    slide: Slide,
    drawing: Drawing,
    centre: tuple[int, int],
    lab: Laboratory,
    smear: Smear,
    number: int,
    label: str,
) -> None:
    """Lay a white cell on the field: it displaces what lay there and adds its own stain."""
    window = _window(slide, centre, drawing.cell.shape)
    if window is None:
        return
    outer, inner = window
    free = slide.instance[outer] == 0
    cover = soften(drawing.cell, 1.5)[inner] * (_HIDES if label != "platelet" else 0.3)
    # the same stuff in a smaller disc is denser; 1.3 lies between a sheet (0) and a drop (2)
    dense = np.float32(min(smear.spread**-1.3, 1.5))
    stuff = drawing.nuclear * np.float32(lab.nucleus) + drawing.plasma * np.float32(lab.cytoplasm)
    # chromatin lies in the cytoplasm, not on it
    stuff -= drawing.plasma * np.float32(0.5 * lab.cytoplasm) * soften(drawing.nucleus, 1.2)
    stuff *= drawing.clear * dense
    view = slide.stains[(slice(None), *outer)]
    view *= 1 - cover
    # where two white cells touch, the one that lies below shines through a little
    view += stuff[(slice(None), *inner)] * np.where(free, np.float32(1), np.float32(0.35))
    cell = drawing.cell[inner] & free
    slide.instance[outer][cell] = number
    slide.nucleus[outer] |= drawing.nucleus[inner] & cell


def _white_boxes(slide: Slide, labels: Sequence[str]) -> list[Box]:
    boxes = []
    for number, label in enumerate(labels, start=1):
        box = bounds(slide.instance == number, label)
        if box is not None:
            boxes.append(box)
    return boxes


def bounds(mask: Mask, label: str) -> Box | None:
    """Return the smallest box around a mask, ``cut`` if it touches the border; None if empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return None
    height, width = mask.shape
    left, right, top, bottom = int(columns[0]), int(columns[-1]), int(rows[0]), int(rows[-1])
    cut = left == 0 or top == 0 or right == width - 1 or bottom == height - 1
    return Box(left, top, right - left + 1, bottom - top + 1, label, 1.0, cut)


def _patch_bounds(slide: Slide, mask: Mask, centre: tuple[int, int], label: str) -> Box | None:
    """Return the box of a patch's mask in the field, cut off at the border."""
    window = _window(slide, centre, mask.shape)
    if window is None:
        return None
    (rows, columns), inner = window
    box = bounds(mask[inner], label)
    if box is None:
        return None
    height, width = slide.shape
    x, y = columns.start + box.x, rows.start + box.y
    cut = x == 0 or y == 0 or x + box.width == width or y + box.height == height
    return Box(x, y, box.width, box.height, label, 1.0, cut)


def _red_cells(
    rng: np.random.Generator,
    slide: Slide,
    smear: Smear,
    lab: Laboratory,
    centres: list[tuple[int, int]],
    radii: list[float],
) -> None:
    """Strew red cells, alone and in clumps; where they overlap, their densities add up."""
    height, width = slide.shape
    count = int(
        rng.poisson(27 * smear.crowding * height * width / (640 * 480) * (RED_RADIUS / smear.red_radius) ** 2)
    )
    clumping = rng.uniform(0.1, 0.75)
    placed: list[tuple[float, float]] = []
    for (cx, cy), r in zip(centres, radii, strict=True):  # red cells press against the white cell
        for turn in rng.uniform(0, 2 * np.pi) + np.arange(7) * rng.uniform(0.75, 0.9):
            if rng.uniform() < 0.42 * smear.crowding:
                reach = r + smear.red_radius * rng.uniform(0.62, 1.1)
                placed.append((cx + reach * np.cos(turn), cy + reach * np.sin(turn)))
    for x, y in placed:
        _red_cell(rng, slide, smear, lab, (round(x), round(y)))
    for _ in range(count):
        for _ in range(12):
            if placed and rng.uniform() < clumping:
                x, y = placed[int(rng.integers(len(placed)))]
                turn, reach = rng.uniform(0, 2 * np.pi), smear.red_radius * rng.uniform(1.0, 1.95)
                x, y = x + reach * np.cos(turn), y + reach * np.sin(turn)
            else:
                x, y = rng.uniform(-30, width + 30), rng.uniform(-30, height + 30)
            away = all(
                np.hypot(x - cx, y - cy) > r * 0.93 + 0.72 * smear.red_radius
                for (cx, cy), r in zip(centres, radii, strict=True)
            )
            # a monolayer: cells lie beside each other more often than on each other
            near = min((np.hypot(x - px, y - py) for px, py in placed), default=np.inf)
            if away and near > smear.red_radius * rng.choice([0.9, 1.75, 1.9]):
                break
        else:
            continue
        placed.append((x, y))
        _red_cell(rng, slide, smear, lab, (round(x), round(y)))


def _red_cell(
    rng: np.random.Generator, slide: Slide, smear: Smear, lab: Laboratory, centre: tuple[int, int]
) -> None:
    radius = smear.red_radius * float(np.clip(rng.normal(1.0, 0.07), 0.75, 1.25))
    size = 2 * int(np.ceil(radius * 1.5)) + 1
    elongation = 1 + abs(rng.normal(0, 0.14))
    cell = fill((size, size), outline(rng, radius, 0.03, elongation, modes=3) + size / 2)
    inside = depth(cell) / np.float32(radius)
    pallor = float(np.clip(rng.normal(smear.pallor, 0.15), 0.0, 0.95))
    width = rng.uniform(0.24, 0.36)
    # a biconcave disc: thickest at about two thirds of its radius, thin in the middle
    dip = 1 / (1 + np.exp(-(inside - (1 - 1.75 * width)) / 0.055))
    profile = soften(cell, 1.2) * (1 - pallor * dip) * (0.9 + 0.1 * np.clip(inside / 0.1, 0, 1))
    profile *= 1 + 0.04 * texture(rng, (size, size), (radius * 0.6,))
    box = _patch_bounds(slide, cell, centre, "RBC")
    window = _window(slide, centre, (size, size))
    if window is None:
        return
    outer, inner = window
    slide.stains[HAEMOGLOBIN][outer] += (lab.red * rng.normal(1.0, 0.07) * profile)[inner].astype(np.float32)
    rim = soften(cell, 3.0) - soften(cell, 1.2)
    slide.light[outer] *= 1 + 0.10 * np.clip(rim, 0, None)[inner]
    if box is not None:
        slide.boxes.append(box)


def _platelets(
    rng: np.random.Generator,
    slide: Slide,
    smear: Smear,
    lab: Laboratory,
    centres: list[tuple[int, int]],
    radii: list[float],
) -> None:
    """Add a few platelets, away from the white cells."""
    height, width = slide.shape
    for _ in range(rng.poisson(1.6)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if any(
            np.hypot(x - cx, y - cy) < r + 40 * smear.scale
            for (cx, cy), r in zip(centres, radii, strict=True)
        ):
            continue
        drawing = draw_white(rng, "platelet", RADII["platelet"] * 0.8 * smear.scale)
        centre = (round(x), round(y))
        window = _window(slide, centre, drawing.cell.shape)
        box = _patch_bounds(slide, drawing.cell, centre, "platelet")
        if window is None or box is None:
            continue
        outer, inner = window
        view = slide.stains[(slice(None), *outer)]
        view += (drawing.plasma * np.float32(lab.cytoplasm))[(slice(None), *inner)]
        slide.boxes.append(box)


def _specks(rng: np.random.Generator, slide: Slide, scale: float) -> None:
    """Add refractile rings (drying artefacts on red cells) and grains of stain."""
    height, width = slide.shape
    covered = slide.stains[HAEMOGLOBIN] > 0.03
    for _ in range(rng.poisson(rng.choice([1.0, 8.0], p=[0.6, 0.4]))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if not covered[int(y), int(x)] and rng.uniform() < 0.7:
            continue
        r = rng.uniform(2.5, 7.0) * scale
        centre = np.array([[x, y]])
        ring = discs(slide.shape, centre, np.array([r * 1.5])) - discs(slide.shape, centre, np.array([r]))
        slide.light *= (
            1 - 0.30 * ring + rng.uniform(0.15, 0.45) * discs(slide.shape, centre, np.array([r * 0.7]))
        )
    count = rng.poisson(2.5)
    places = np.stack([rng.uniform(0, width, count), rng.uniform(0, height, count)], 1)
    grains = discs(slide.shape, places, rng.uniform(1.0, 3.5, count) * scale)
    slide.stains[AZURE] += 0.25 * grains
    slide.stains[BLUE] += 0.15 * grains


def _haze(rng: np.random.Generator, slide: Slide) -> None:
    """Leave a trace of stained plasma between the cells."""
    veil = np.clip(0.5 + 0.5 * texture(rng, slide.shape, (160.0, 60.0)), 0, None)
    slide.stains[EOSIN] += np.float32(rng.uniform(0, 0.008)) * veil
    slide.stains[BLUE] += np.float32(rng.uniform(0, 0.015)) * veil
