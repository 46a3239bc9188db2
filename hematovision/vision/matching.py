"""Comparing found boxes with annotated ones, one to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from hematovision.vision.field import Box

IOU_FOUND = 0.5
"""Overlap from which a found box stands for the annotated one (Everingham 2010, PASCAL VOC)."""

AREA_FACTOR = 2.0
"""Largest ratio of areas when only the centre is inside: annotated margins differ that much."""


def is_found(found: Box, truth: Box) -> bool:
    """Whether a found box stands for an annotated one.

    It does at an intersection over union of at least `IOU_FOUND`, or when its centre lies inside
    the annotated box and the areas differ by at most `AREA_FACTOR`.
    """
    if found.intersection_over_union(truth) >= IOU_FOUND:
        return True
    ratio = found.area / truth.area
    return truth.contains(*found.centre) and 1 / AREA_FACTOR <= ratio <= AREA_FACTOR


def match_boxes(found: Sequence[Box], truth: Sequence[Box]) -> list[tuple[int, int]]:
    """Pair found boxes with annotated ones, each used at most once.

    Parameters
    ----------
    found, truth : sequence of Box

    Returns
    -------
    list of (int, int)
        Indices into `found` and `truth`, by `found`. The number of pairs is the largest possible,
        and among those their summed overlap is (the assignment problem, Kuhn 1955).
    """
    if not found or not truth:
        return []
    # a pair is worth 1 and its overlap a little more: the sum of overlaps cannot outweigh a pair
    small = 1.0 / (1 + min(len(found), len(truth)))
    worth = np.array(
        [[1 + small * f.intersection_over_union(t) if is_found(f, t) else 0.0 for t in truth] for f in found]
    )
    rows, columns = linear_sum_assignment(worth, maximize=True)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if worth[r, c] > 0]


@dataclass(frozen=True)
class Located:
    """How well a finder did on a set of annotated fields.

    Attributes
    ----------
    annotated, found, matched : int
        Numbers of boxes.
    missed : dict of str to tuple of Box
        The annotated boxes that no found box stands for, by field; fields without any are left out.
    surplus : dict of str to tuple of Box
        The found boxes that stand for no annotated one, likewise.
    """

    annotated: int
    found: int
    matched: int
    missed: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    surplus: dict[str, tuple[Box, ...]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        """Share of the annotated boxes that were found; not a number if there are none."""
        return self.matched / self.annotated if self.annotated else float("nan")

    @property
    def precision(self) -> float:
        """Share of the found boxes that are annotated; not a number if there are none."""
        return self.matched / self.found if self.found else float("nan")

    def to_dict(self) -> dict[str, float]:
        """Return the numbers for JSON."""
        names = ("annotated", "found", "matched", "recall", "precision")
        return {name: getattr(self, name) for name in names}


def evaluate_boxes(fields: Iterable[tuple[str, Sequence[Box], Sequence[Box]]]) -> Located:
    """Score a finder over annotated fields.

    Parameters
    ----------
    fields : iterable of (name, found, truth)
        One item a field, consumed one at a time.
    """
    annotated = found_total = matched = 0
    missed: dict[str, tuple[Box, ...]] = {}
    surplus: dict[str, tuple[Box, ...]] = {}
    for name, found, truth in fields:
        pairs = match_boxes(found, truth)
        annotated, found_total, matched = (
            annotated + len(truth),
            found_total + len(found),
            matched + len(pairs),
        )
        used_found, used_truth = {f for f, _ in pairs}, {t for _, t in pairs}
        if left := tuple(t for i, t in enumerate(truth) if i not in used_truth):
            missed[name] = left
        if left := tuple(f for i, f in enumerate(found) if i not in used_found):
            surplus[name] = left
    return Located(annotated, found_total, matched, missed, surplus)
