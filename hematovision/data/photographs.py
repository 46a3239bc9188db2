"""The photograph behind every augmented copy, recovered by matching the pictures.

A copy is an affine image of its photograph (rotation, shift, shear, flips), with black fill where
nothing was, and brightness rescaled. Keypoints (SIFT: Lowe 2004) name the few photographs worth
trying and give the affine map by RANSAC; the photograph is then laid over the copy and the pixels
decide. The score is the share of the copy that
the photograph covers, times the correlation of the grey values there (zero-mean, so that brightness
and contrast do not matter). A true pair covers all and correlates above 0.98; a photograph of a
neighbouring or overlapping field covers a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.data.manifest import Manifest, check_manifest
from hematovision.errors import DataError, ImageError
from hematovision.files import content_key, write_text
from hematovision.vision.field import RGB
from hematovision.vision.image import read_image
from hematovision.vision.locate import fill_mask

VERSION = 2
"""Part of the cache's key: a change of the matching asks for a new number."""

SURE_SCORE = 0.9
"""Least score of a sure match. The best photographs of the 12,515 copies of the public set score at
least 0.975; photographs of other fields score at most 0.57, 999 in 1000 of them below 0.38."""

SURE_MARGIN = 0.01
"""Least lead over the second photograph. Fields that were photographed twice score up to 0.985 on
copies of each other, at least 0.013 behind the true one."""

SURE_INLIERS = 8
"""Keypoints that must agree on the map: three fix it by themselves and prove nothing."""

_TYPES: dict[Any, Any] = {
    "path": str,
    "source": str,
    "confidence": float,
    "inliers": int,
    "runner_up": str,
    "runner_up_confidence": float,
    "runner_up_inliers": int,
    "sure": bool,
}
SOURCE_COLUMNS = tuple(_TYPES)

_SIDE = 320  # longer side in pixels at which pixels are compared: the size of the public set's copies
_VOTERS = 60  # strongest keypoints of a picture that take part in choosing candidates
_SIMILAR = 32  # of 128 bits: nearer descriptors vote (true neighbours differ by 11 in the median)
_RATIO = 0.8  # of the distances to the nearest and second nearest descriptor (Lowe 2004)
_REACH = 3.0  # pixels by which a keypoint may miss the map
_AREA_RANGE = (0.6, 1.6)  # of the map; copies are turned, sheared and flipped, not enlarged
_LEAST_COVERAGE = 0.1
_CHUNK = 256  # copies between two writes: what a killed run loses at most
_UNREADABLE = ("unreadable", "truncated")
_COPIES = ("train", "test", "test_simple")

_Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Effort:
    """How hard a picture is looked at.

    Attributes
    ----------
    side : int
        Longer side in pixels at which keypoints are sought.
    keypoints : int
        Most keypoints kept, the strongest first.
    contrast : float
        Least contrast of a keypoint (OpenCV's ``contrastThreshold``).
    candidates : int
        Photographs compared pixel by pixel.
    """

    side: int
    keypoints: int
    contrast: float
    candidates: int


QUICK = Effort(side=224, keypoints=200, contrast=0.02, candidates=4)
THOROUGH = Effort(side=480, keypoints=1200, contrast=0.005, candidates=30)


@dataclass(frozen=True)
class View:
    """A picture as the matching sees it, 320 pixels wide or high.

    Attributes
    ----------
    grey : uint8 array of shape (height, width)
        The green channel, in which all stains show.
    valid : bool array of shape (height, width)
        False where a copy holds black fill.
    points : float32 array of shape (n, 2)
        ``(x, y)`` of the keypoints in pixels, the strongest first.
    descriptors : uint8 array of shape (n, 16)
        SIFT descriptors, a bit for each of the 128 numbers: whether it is above their median.
        Compared by Hamming distance: as good as floats here, smaller, and independent of threads.
    strongest : int array
        Rows of the keypoints that vote.
    upright : int
        Keypoints of the picture itself; those of its mirror image follow.
    """

    grey: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8]
    strongest: NDArray[np.intp]
    upright: int

    def unmirrored(self) -> View:
        """Return the view without the keypoints of the mirror image."""
        strongest = self.strongest[self.strongest < self.upright]
        points, descriptors = self.points[: self.upright], self.descriptors[: self.upright]
        return View(self.grey, self.valid, points, descriptors, strongest, self.upright)


@dataclass(frozen=True)
class Match:
    """How well one picture lies on another.

    Attributes
    ----------
    inliers : int
        Keypoints that agree on the map.
    correlation : float
        Of the grey values where both have pixels, -1 to 1.
    coverage : float
        Share of the first picture's valid pixels that the second covers, 0 to 1.
    matrix : float64 array of shape (2, 3) or None
        Takes pixels of the second picture to pixels of the first, in views.
    side : int
        Longer side of a view in pixels.
    """

    inliers: int = 0
    correlation: float = 0.0
    coverage: float = 0.0
    matrix: _Matrix | None = None
    side: int = _SIDE

    @property
    def score(self) -> float:
        """Coverage times correlation, 0 to 1."""
        return max(0.0, self.correlation) * self.coverage


def view_picture(rgb: RGB, effort: Effort = QUICK, mirrored: bool = False) -> View:
    """Reduce a picture to what matching needs.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
    effort : Effort
    mirrored : bool
        Whether the keypoints of the mirror image are added (at their place in the picture itself):
        SIFT descriptors know turning but not flipping.
    """
    small = _scaled(rgb, _SIDE)
    grey = np.ascontiguousarray(small[..., 1])
    valid = ~fill_mask(small)
    # a keypoint whose surroundings reach into the fill describes the fill
    inner = cv2.erode(valid.astype(np.uint8), np.ones((9, 9), np.uint8), borderValue=1)
    looked_at = grey if effort.side == _SIDE else _scaled(rgb, effort.side)[..., 1]
    mask = cv2.resize(inner, looked_at.shape[::-1], interpolation=cv2.INTER_NEAREST)
    faces = [_keypoints(looked_at, mask, effort, flip=False)]
    if mirrored:
        faces.append(_keypoints(looked_at, mask, effort, flip=True))
    scale = looked_at.shape[1] / grey.shape[1]
    points = (np.concatenate([p for p, _ in faces]) + 0.5) / scale - 0.5
    ranks = np.concatenate([np.arange(len(p)) for p, _ in faces])
    descriptors = np.concatenate([d for _, d in faces])
    strongest = np.flatnonzero(ranks < _VOTERS)
    return View(grey, valid, points.astype(np.float32), descriptors, strongest, len(faces[0][0]))


def _scaled(rgb: RGB, side: int) -> RGB:
    height, width = rgb.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return rgb
    return np.asarray(
        cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), np.uint8
    )


def _keypoints(
    grey: NDArray[np.uint8], mask: NDArray[Any], effort: Effort, flip: bool
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return places and descriptors, the strongest first."""
    if flip:
        grey, mask = np.ascontiguousarray(grey[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    # without the precise upscale keypoints lie a quarter of a pixel off, the other way in a mirror image
    sift = cv2.SIFT.create(
        nfeatures=effort.keypoints, contrastThreshold=effort.contrast, enable_precise_upscale=True
    )
    found, raw = sift.detectAndCompute(np.ascontiguousarray(grey), mask)
    if raw is None or not len(found):
        return np.zeros((0, 2), np.float32), np.zeros((0, 16), np.uint8)
    points = np.array([k.pt for k in found], np.float32)
    keys = np.array([(k.response, k.angle) for k in found])
    # the detector's order depends on its threads
    order = np.lexsort((keys[:, 1], points[:, 1], points[:, 0], -keys[:, 0]))[: effort.keypoints]
    points = points[order]
    if flip:
        points[:, 0] = grey.shape[1] - 1 - points[:, 0]
    ordered = raw[order]
    return points, np.packbits(ordered > np.median(ordered, axis=1, keepdims=True), axis=1)


def match_views(copy: View, photograph: View) -> Match:
    """Lay a photograph over a picture and compare them.

    Parameters
    ----------
    copy : View
        Without mirrored keypoints.
    photograph : View
        With or without.
    """
    ours, theirs = _tentative(copy.descriptors, photograph.descriptors)
    if len(ours) < 4:
        return Match()
    matrix, agreed = cv2.estimateAffine2D(
        photograph.points[theirs],
        copy.points[ours],
        method=cv2.RANSAC,
        ransacReprojThreshold=_REACH,
        maxIters=1000,
        confidence=0.999,
    )
    if matrix is None or not _AREA_RANGE[0] < abs(np.linalg.det(matrix[:, :2])) < _AREA_RANGE[1]:
        return Match()
    affine = np.asarray(matrix, np.float64)
    return Match(int(agreed.sum()), *_compare_pixels(copy, photograph, affine), affine)


def _tentative(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows of descriptors whose nearest neighbour is much nearer than the second nearest."""
    if len(ours) < 1 or len(theirs) < 2:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    distance, nearest = cv2.batchDistance(ours, theirs, cv2.CV_32S, normType=cv2.NORM_HAMMING, K=2)
    good = distance[:, 0] < _RATIO * distance[:, 1]
    return np.flatnonzero(good), nearest[good, 0].astype(np.intp)


def _compare_pixels(copy: View, photograph: View, matrix: _Matrix) -> tuple[float, float]:
    """Return correlation and coverage of the photograph, warped onto the copy."""
    size = copy.grey.shape[::-1]
    warped = cv2.warpAffine(photograph.grey, matrix, size, flags=cv2.INTER_LINEAR)
    there = cv2.warpAffine(photograph.valid.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST) > 0
    both = there & copy.valid
    coverage = float(both.sum() / max(1, copy.valid.sum()))
    if coverage < _LEAST_COVERAGE:
        return 0.0, coverage
    # copies are made by taking pixels without interpolation: smoothing forgives half a pixel
    return correlate(_smooth(copy.grey)[both], _smooth(warped)[both]), coverage


def _smooth(grey: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), 1.0), np.float32)


def correlate(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the correlation of two equally long sets of grey values, -1 to 1; 0 if one is constant."""
    x, y = (np.asarray(v, np.float64).ravel() - float(np.mean(v)) for v in (a, b))
    # sums, not dot products: those start the linear algebra library's threads under ours
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


class Gallery:
    """Photographs ready to be matched against, their keypoints computed once.

    Parameters
    ----------
    names : sequence of str
        One for each view.
    views : sequence of View
        With mirrored keypoints.

    Notes
    -----
    Holds about 0.2 MB a photograph.
    """

    def __init__(self, names: Sequence[str], views: Sequence[View]) -> None:
        self.names = list(names)
        self.views = list(views)
        blocks = [view.descriptors[view.strongest] for view in self.views]
        self._voters = np.concatenate(blocks) if blocks else np.zeros((0, 16), np.uint8)
        self._owners = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])

    def candidates(self, view: View, count: int, without: int | None = None) -> list[int]:
        """Return the numbers of the photographs that share most keypoints with a picture.

        Parameters
        ----------
        view : View
        count : int
            Most numbers returned.
        without : int, optional
            A photograph that takes no part: the picture itself.
        """
        votes = np.zeros(len(self.views))
        ours = view.descriptors[view.strongest]
        others = self._owners != (-1 if without is None else without)
        voters, owners = self._voters[others], self._owners[others]
        if len(ours) and len(voters):
            distance, nearest = cv2.batchDistance(ours, voters, cv2.CV_32S, normType=cv2.NORM_HAMMING, K=1)
            np.add.at(votes, owners[nearest.ravel()], np.clip(_SIMILAR - distance.ravel(), 0, None))
        order = [int(i) for i in np.argsort(-votes, kind="stable")]
        return [i for i in order if i != without][:count]

    def best(self, view: View, count: int) -> list[tuple[str, Match]]:
        """Return the candidates and how they match, the best first."""
        found = [(self.names[i], match_views(view, self.views[i])) for i in self.candidates(view, count)]
        return sorted(found, key=lambda item: (-item[1].score, -item[1].inliers, item[0]))


def recover_sources(
    copies: Manifest,
    photographs: Manifest,
    root: Path,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
) -> pd.DataFrame:
    """Find the photograph that each copy was made from.

    Parameters
    ----------
    copies : Manifest
        Rows to be explained. Each is compared with the photographs of its own label.
    photographs : Manifest
        Rows with a label; ``source`` names the photograph (its path, where that is empty).
    root : Path
        The folder that paths are relative to.
    cache : Path or None
        Results go to ``cache/photographs/<key>/`` in chunks, so that a killed run goes on and a
        second call returns at once. None keeps nothing.
    progress : callable, optional
        Called with the number of copies done and the total.
    workers : int
        Threads. The result does not depend on it.

    Returns
    -------
    DataFrame
        One row a copy, in order of `copies`: ``path``; ``source``, the best photograph; its
        ``confidence``, the score of `Match` (0 to 1); ``inliers``; ``runner_up``, the second
        photograph, with ``runner_up_confidence`` and ``runner_up_inliers``; ``sure``: the score is
        at least `SURE_SCORE`, ahead of the second by at least `SURE_MARGIN`, and rests on at least
        `SURE_INLIERS` keypoints. A copy that can't be decoded or has no candidate gets ``""`` and 0.
    """
    photographs = photographs[(photographs["label"] != "") & ~photographs["status"].isin(_UNREADABLE)]
    # the same file twice would be its own rival
    photographs = photographs.sort_values("path").drop_duplicates(["label", "sha256"])
    key = content_key(
        VERSION,
        [QUICK, THOROUGH, SURE_SCORE, SURE_MARGIN, SURE_INLIERS],
        copies[["path", "label", "sha256"]].to_csv(index=False),
        photographs[["path", "label", "source", "sha256"]].to_csv(index=False),
    )
    run = _Run(
        _Matcher(photographs, Path(root)), None if cache is None else Path(cache) / "photographs" / key
    )
    with single_threaded_opencv(), ThreadPoolExecutor(max(1, workers)) as pool:
        found = run.explain(copies, QUICK, "quick", pool, progress)
        doubtful = copies[~found["sure"].to_numpy(bool)]
        again = run.explain(doubtful, THOROUGH, "thorough", pool, None)
    found = found.set_index("path")
    found.update(again.set_index("path"))
    return found.reset_index().astype(_TYPES)


def assign_sources(
    manifest: Manifest,
    root: Path,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
) -> Manifest:
    """Fill in the photograph behind every copy of a set that comes with its photographs.

    Parameters
    ----------
    manifest : Manifest
        Rows of the sides ``train``, ``test`` and ``test_simple`` are explained by the labelled rows
        of the side ``photograph``. Without such rows the manifest is returned as it is.
    root, cache, progress, workers
        As for `recover_sources`.

    Returns
    -------
    Manifest
        With ``source`` replaced by the best photograph's. Rows with status ``ok`` that are not sure
        get the status ``unsure``.
    """
    manifest = check_manifest(manifest)
    is_photograph = manifest["split"] == "photograph"
    if not is_photograph.any():
        return manifest
    unnamed = is_photograph & (manifest["source"] == "")
    manifest.loc[unnamed, "source"] = manifest.loc[unnamed, "path"]
    is_copy = manifest["split"].isin(_COPIES) & ~manifest["status"].isin(_UNREADABLE)
    found = recover_sources(manifest[is_copy], manifest[is_photograph], root, cache, progress, workers)
    by_path = found.set_index("path")
    manifest.loc[is_copy, "source"] = manifest.loc[is_copy, "path"].map(by_path["source"]).fillna("")
    unsure = set(found.loc[~found["sure"], "path"])
    manifest.loc[manifest["path"].isin(unsure) & (manifest["status"] == "ok"), "status"] = "unsure"
    return check_manifest(manifest)


class _Matcher:
    """Explains copies, one at a time, from the photographs of their label."""

    def __init__(self, photographs: pd.DataFrame, root: Path) -> None:
        self._photographs = photographs
        self._root = root
        self._galleries: dict[tuple[str, Effort], Gallery] = {}

    def prepare(self, labels: pd.Series, effort: Effort, pool: ThreadPoolExecutor) -> None:
        """Compute the keypoints of the photographs of these labels, if not yet done."""
        for label in sorted(set(labels)):
            if (label, effort) in self._galleries:
                continue
            rows = self._photographs[self._photographs["label"] == label]
            names = rows["source"].where(rows["source"] != "", rows["path"])
            views = pool.map(lambda path: self._view(path, effort, mirrored=True), rows["path"])
            pairs = [(name, view) for name, view in zip(names, views, strict=True) if view is not None]
            self._galleries[label, effort] = Gallery([n for n, _ in pairs], [v for _, v in pairs])

    def explain(self, path: str, label: str, effort: Effort) -> tuple[Any, ...]:
        """Return one row of `SOURCE_COLUMNS`."""
        view = self._view(path, effort, mirrored=False)
        ranked = self._galleries[label, effort].best(view, effort.candidates) if view is not None else []
        (first, a), (second, b) = [*ranked, ("", Match()), ("", Match())][:2]
        enough = a.score >= SURE_SCORE and a.inliers >= SURE_INLIERS
        sure = enough and a.score - b.score >= SURE_MARGIN
        return path, first, round(a.score, 6), a.inliers, second, round(b.score, 6), b.inliers, sure

    def _view(self, path: str, effort: Effort, mirrored: bool) -> View | None:
        try:
            return view_picture(read_image(self._root / path, name=path), effort, mirrored)
        except ImageError:
            return None


class _Run:
    """Works through copies in chunks, each written to disk when done."""

    def __init__(self, matcher: _Matcher, folder: Path | None) -> None:
        self._matcher = matcher
        self._folder = folder

    def explain(
        self,
        copies: pd.DataFrame,
        effort: Effort,
        name: str,
        pool: ThreadPoolExecutor,
        progress: Callable[[int, int], None] | None,
    ) -> pd.DataFrame:
        """Return one row a copy, from disk where it is there."""
        chunks = [pd.DataFrame(columns=list(SOURCE_COLUMNS)).astype(_TYPES)]
        for start in range(0, len(copies), _CHUNK):
            rows = copies.iloc[start : start + _CHUNK]
            file = None if self._folder is None else self._folder / f"{name}-{start:06d}.csv"
            if file is not None and file.is_file():
                chunks.append(_read_chunk(file))
                continue
            self._matcher.prepare(rows["label"], effort, pool)
            found = pool.map(self._matcher.explain, rows["path"], rows["label"], repeat(effort))
            chunks.append(pd.DataFrame(list(found), columns=list(SOURCE_COLUMNS)).astype(_TYPES))
            if file is not None:
                write_text(file, chunks[-1].to_csv(index=False))
            if progress is not None:
                progress(start + len(rows), len(copies))
        return pd.concat(chunks, ignore_index=True)


def _read_chunk(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file, keep_default_na=False, dtype=_TYPES)[list(SOURCE_COLUMNS)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error})", "remove it and run again") from error


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own under ours, inside a ``with`` block."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
