"""What is wrong with a set: files, duplicates, labels, balance, photographs, and the leak.

Nothing is corrected here. An audit counts and lists; `hematovision.data.splits` acts on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from hematovision.data.manifest import Manifest
from hematovision.data.photographs import (
    Effort,
    Gallery,
    Match,
    View,
    correlate,
    match_views,
    single_threaded_opencv,
    view_picture,
)
from hematovision.errors import DataError
from hematovision.files import atomic_path, content_key, write_text
from hematovision.vision.field import RGB
from hematovision.vision.image import read_image
from hematovision.vision.locate import fill_mask, locate_main_cell

if TYPE_CHECKING:
    from hematovision.data.catalog import ImageSet

VERSION = 3
"""Part of the caches' keys: a change of what is compared asks for a new number."""

SAME_CORRELATION = 0.75
"""Least correlation of two photographs where they overlap. Among all pairs tried of the 367 photographs
of the public set, those above 0.8 show the same place by eye and all others stay below 0.51."""

SAME_INLIERS = 5
"""Keypoints that must agree on how two photographs lie: three fix it; the pixels are the proof."""

SAME_OVERLAP = 0.15
"""Least share of a photograph that the other must show again; smaller strips cannot be judged."""

SAME_THUMBNAIL = 0.99
"""Least correlation of two whole pictures, reduced to 32 pixels, in sets too large for keypoints."""

KEYPOINT_LIMIT = 1000
"""Most pictures that are compared by keypoints, which finds shifted and turned ones too; the work
grows with the square."""

PAIR_COLUMNS = (
    "source_a",
    "source_b",
    "path_a",
    "path_b",
    "label_a",
    "label_b",
    "similarity",
    "overlap",
    "same_cell",
)
TWIN_COLUMNS = ("test_path", "nearest_train_path", "distance", "same_photograph")

_EFFORT = Effort(side=320, keypoints=500, contrast=0.01, candidates=12)  # a strip holds few keypoints
_THUMBNAIL = 32  # pixels a side
_COARSE = 16  # pixels a side of the grey thumbnail that is tried first
_BLOCK = 1024  # thumbnails compared with all others at a time: bounds memory
_UNREADABLE = ("unreadable", "truncated")
_CHUNK = 256  # images described between two writes
_TWIN_SIDE = 160  # pixels; colour shares do not depend on detail
_TWIN_BINS = (12, 12, 8)  # of the densities in red, green and blue
_BACKGROUND = 95  # percentile of each channel that is taken for the empty background
_TWIN_DENSITY = 1.5  # optical density at which the last bin ends; nuclei reach 1.2

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Audit:
    """What an audit found; every table is small enough to be shown.

    Attributes
    ----------
    name : str
    counts : DataFrame
        ``split, label, status, images``.
    sizes : DataFrame
        ``split, width, height, images`` of the decodable images.
    undecodable : DataFrame
        ``path, status``: unreadable and truncated files.
    duplicates : DataFrame
        ``sha256, path, label, split``: files with the same bytes as another one.
    near_duplicates : DataFrame
        See `near_duplicates`.
    conflicts : DataFrame
        The pairs, of identical files and of near-duplicates, that show the same cell under two labels:
        ``path_a, path_b, label_a, label_b, similarity``.
    balance : DataFrame
        ``label, images, share, photographs, groups`` of the images that train or judge (not the
        photographs behind copies); groups are photographs that share nothing.
    photographs : DataFrame
        ``split, label, photographs, groups, copies_least, copies_median, copies_most``.
    copies : DataFrame
        ``source, label, split, group, copies``: one row a photograph and side.
    unsure : DataFrame
        ``path, label, split, source`` of images whose photograph is not certain.
    crossing : DataFrame
        Near-duplicate photographs with one on the side ``train`` and the other on the side ``test`` or
        ``test_simple`` of the set's authors: ``train_source, test_source, similarity, overlap, same_cell``;
        a photograph that is on both sides itself is listed with itself.
    groups : Series
        See `linked_groups`.
    """

    name: str
    counts: pd.DataFrame
    sizes: pd.DataFrame
    undecodable: pd.DataFrame
    duplicates: pd.DataFrame
    near_duplicates: pd.DataFrame
    conflicts: pd.DataFrame
    balance: pd.DataFrame
    photographs: pd.DataFrame
    copies: pd.DataFrame
    unsure: pd.DataFrame
    crossing: pd.DataFrame
    groups: pd.Series

    def findings(self) -> pd.DataFrame:
        """Return the audit in a few lines: ``finding, count``."""
        used = self.counts[~self.counts["status"].isin(_UNREADABLE)]
        rows = {
            "images that decode": int(used["images"].sum()),
            "files that cannot be read": int((self.undecodable["status"] == "unreadable").sum()),
            "files that are cut short": int((self.undecodable["status"] == "truncated").sum()),
            "files with the bytes of another": len(self.duplicates),
            "pairs of near-duplicates": len(self.near_duplicates),
            "of these, of the same cell": int(self.near_duplicates["same_cell"].sum()),
            "cells with two labels": len(self.conflicts),
            "photographs": int(self.copies["source"].nunique()),
            "groups of photographs that share nothing": int(self.copies["group"].nunique()),
            "images whose photograph is unsure": len(self.unsure),
            "near-duplicates across the official sides": len(self.crossing),
        }
        return pd.DataFrame({"finding": list(rows), "count": list(rows.values())})


def audit_set(
    image_set: ImageSet, cache: Path | None = None, progress: Progress | None = None, workers: int = 2
) -> Audit:
    """Audit a loaded set.

    Parameters
    ----------
    image_set : ImageSet
        With the photographs already assigned, where the set has copies.
    cache : Path, optional
        Keeps the near-duplicates.
    progress : callable, optional
        Called with (done, total) pictures while near-duplicates are sought.
    workers : int
        Threads; the result does not depend on it.
    """
    manifest = image_set.manifest
    pairs = near_duplicates(manifest, image_set.root, cache, progress, workers)
    groups = linked_groups(manifest, pairs)
    decodable = manifest[~manifest["status"].isin(_UNREADABLE)]
    used = _used(decodable, groups)
    undecodable = manifest.loc[manifest["status"].isin(_UNREADABLE), ["path", "status"]]
    repeated = decodable["sha256"].duplicated(keep=False) & (decodable["sha256"] != "")
    duplicates = decodable.loc[repeated, ["sha256", "path", "label", "split"]].sort_values(["sha256", "path"])
    unsure = manifest.loc[manifest["status"] == "unsure", ["path", "label", "split", "source"]]
    return Audit(
        name=image_set.name,
        counts=_count(manifest, ["split", "label", "status"]),
        sizes=_count(decodable, ["split", "width", "height"]),
        undecodable=undecodable.reset_index(drop=True),
        duplicates=duplicates.reset_index(drop=True),
        near_duplicates=pairs,
        conflicts=_conflicts(duplicates, pairs),
        balance=_balance(used),
        photographs=_photographs(used),
        copies=_count(used, ["source", "label", "split", "group"], "copies"),
        unsure=unsure.reset_index(drop=True),
        crossing=_crossing(used, pairs),
        groups=groups,
    )


def near_duplicates(
    manifest: Manifest,
    root: Path,
    cache: Path | None = None,
    progress: Progress | None = None,
    workers: int = 2,
) -> pd.DataFrame:
    """Find photographs that show the same place of a smear, whole or in part.

    In a set with photographs (side ``photograph``) those are compared, as copies follow from them;
    else all images. Up to `KEYPOINT_LIMIT` pictures are matched by keypoints and confirmed pixel by
    pixel, which finds shifted, turned, flipped and partly overlapping ones; in larger sets only
    pictures that are the same as a whole are found, by thumbnails.

    Parameters
    ----------
    manifest : Manifest
    root : Path
        The folder that paths are relative to.
    cache : Path, optional
        The result is kept in ``cache/near_duplicates/<key>.csv``.
    progress : callable, optional
        Called with (done, total) pictures.
    workers : int
        Threads; the result does not depend on it.

    Returns
    -------
    DataFrame
        One row a pair with ``path_a < path_b``: ``source_a, source_b`` (the path where a source is
        not known), ``path_a, path_b, label_a, label_b``, ``similarity`` (correlation where they
        overlap, 0 to 1), ``overlap`` (share of the picture shown by both, 0 to 1) and ``same_cell``
        (whether the main white cell of one lies on that of the other).
    """
    rows = _compared(manifest)
    columns = ["path", "source", "label", "sha256"]
    key = content_key(
        VERSION,
        [SAME_CORRELATION, SAME_INLIERS, SAME_OVERLAP, SAME_THUMBNAIL],
        rows[columns].to_csv(index=False),
    )
    file = None if cache is None else Path(cache) / "near_duplicates" / f"{key}.csv"
    if file is not None and file.is_file():
        return _read_pairs(file)
    find = _find_by_keypoints if len(rows) <= KEYPOINT_LIMIT else _find_by_thumbnails
    with single_threaded_opencv(), ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(find(rows["path"].tolist(), Path(root), pool, progress))
    names = rows["source"].where(rows["source"] != "", rows["path"]).tolist()
    paths, labels = rows["path"].tolist(), rows["label"].tolist()
    table = [
        (names[a], names[b], paths[a], paths[b], labels[a], labels[b], round(s, 6), round(o, 6), same)
        for a, b, s, o, same in sorted(found)
        if names[a] != names[b]
    ]
    pairs = pd.DataFrame(table, columns=list(PAIR_COLUMNS)).astype(_PAIR_TYPES)
    if file is not None:
        write_text(file, pairs.to_csv(index=False))
    return pairs


_PAIR_TYPES = {
    **dict.fromkeys(PAIR_COLUMNS[:6], str),
    "similarity": float,
    "overlap": float,
    "same_cell": bool,
}
_Found = tuple[int, int, float, float, bool]  # two rows, similarity, overlap, same cell


def _read_pairs(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file, keep_default_na=False, dtype=_PAIR_TYPES)[list(PAIR_COLUMNS)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error})", "remove it and run again") from error


def _compared(manifest: Manifest) -> pd.DataFrame:
    """Return the rows whose pictures are compared, one for each content, sorted by path."""
    rows = manifest[~manifest["status"].isin(_UNREADABLE)]
    photographs = rows[rows["split"] == "photograph"]
    rows = photographs if len(photographs) else rows
    return rows.sort_values("path", ignore_index=True).drop_duplicates("sha256", ignore_index=True)


def _find_by_keypoints(
    paths: list[str], root: Path, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[_Found]:
    """Yield the pairs that show the same place."""

    def view_of(path: str) -> View:
        return view_picture(read_image(root / path, name=path), _EFFORT, mirrored=True)

    views = list(pool.map(view_of, paths))
    gallery = Gallery(paths, views)

    def rivals(i: int) -> list[tuple[int, Match]]:
        view = views[i].unmirrored()
        return [
            (j, match_views(view, views[j])) for j in gallery.candidates(view, _EFFORT.candidates, without=i)
        ]

    best: dict[tuple[int, int], tuple[int, int, Match]] = {}
    for i, found in enumerate(pool.map(rivals, range(len(paths)))):
        for j, match in found:
            pair = (min(i, j), max(i, j))
            if _same_place(match) and (pair not in best or match.correlation > best[pair][2].correlation):
                best[pair] = (i, j, match)
        if progress is not None:
            progress(i + 1, len(paths))
    for pair, (i, j, match) in best.items():
        yield *pair, match.correlation, match.coverage, _same_cell(root / paths[i], root / paths[j], match)


def _same_place(match: Match) -> bool:
    agreed = match.inliers >= SAME_INLIERS and match.coverage >= SAME_OVERLAP
    return agreed and match.correlation >= SAME_CORRELATION


def _same_cell(here: Path, there: Path, match: Match) -> bool:
    """Whether the main cell of the second picture, mapped onto the first, lies on its main cell."""
    boxes = []
    scales = []
    for path in (here, there):
        rgb = read_image(path)
        box = locate_main_cell(rgb)
        if box is None:
            return False
        boxes.append(box)
        scales.append(match.side / max(rgb.shape[:2]))
    if match.matrix is None:
        return False
    x, y = (v * scales[1] for v in boxes[1].centre)
    mapped = match.matrix @ np.array([x, y, 1.0])
    return boxes[0].contains(mapped[0] / scales[0], mapped[1] / scales[0])


def _find_by_thumbnails(
    paths: list[str], root: Path, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[_Found]:
    """Yield the pairs that are the same picture as a whole, whatever their size and brightness."""
    thumbnails = _scratch((len(paths), _THUMBNAIL, _THUMBNAIL, 3), np.uint8)
    step = _THUMBNAIL // _COARSE
    unit = np.empty((len(paths), _COARSE * _COARSE), np.float32)
    read = pool.map(lambda path: _thumbnail(read_image(root / path, name=path)), paths)
    for i, thumbnail in enumerate(read):
        thumbnails[i] = thumbnail
        unit[i] = thumbnail.reshape(_COARSE, step, _COARSE, step, 3).mean(axis=(1, 3, 4)).reshape(-1)
        if progress is not None:
            progress(i + 1, len(paths))
    unit -= unit.mean(axis=1, keepdims=True)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    for start in range(0, len(paths), _BLOCK):
        similar = unit[start : start + _BLOCK] @ unit[start:].T
        for a, b in np.argwhere(similar > SAME_THUMBNAIL - 0.01) + start:
            if a < b:
                similarity = correlate(thumbnails[a], thumbnails[b])
                if similarity >= SAME_THUMBNAIL:
                    yield int(a), int(b), similarity, 1.0, True


def _scratch(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array that lies in a nameless file: what grows with the images stays out of memory."""
    with tempfile.TemporaryFile() as handle:
        return np.memmap(handle, dtype, "w+", shape=shape)


def _thumbnail(rgb: RGB) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(rgb, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA), np.uint8)


def linked_groups(manifest: Manifest, pairs: pd.DataFrame | None = None) -> pd.Series:
    """Link what must stay on one side: the unit of splits and of clustered intervals.

    Images of one photograph, of photographs that are near-duplicates, and files of the same bytes
    are linked, and what is linked to the same is linked.

    Parameters
    ----------
    manifest : Manifest
    pairs : DataFrame, optional
        From `near_duplicates`.

    Returns
    -------
    Series
        Index ``path``, values ``group``: the first of the linked photographs by name, or the path of
        an image without a known photograph.
    """
    names = manifest["source"].where(manifest["source"] != "", manifest["path"])
    links = _Links(names)
    if pairs is not None:
        for a, b in zip(pairs["source_a"], pairs["source_b"], strict=True):
            links.join(str(a), str(b))
    hashed = manifest["sha256"] != ""
    for _, same in names[hashed].groupby(manifest["sha256"]):
        for other in same.iloc[1:]:
            links.join(str(same.iloc[0]), str(other))
    groups = [links.first(name) for name in names]
    return pd.Series(groups, index=pd.Index(manifest["path"], name="path"), name="group", dtype=str)


class _Links:
    """Disjoint sets of names (union-find); a set is called by its first name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}

    def first(self, name: str) -> str:
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def join(self, a: str, b: str) -> None:
        for name in (a, b):
            self._parent.setdefault(name, name)
        low, high = sorted((self.first(a), self.first(b)))
        self._parent[high] = low


def nearest_twins(
    image_set: ImageSet,
    train_paths: Sequence[str],
    test_paths: Sequence[str],
    sample: int = 300,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    workers: int = 2,
) -> pd.DataFrame:
    """Find the training image that looks most like each test image: in a leaky split, its twin.

    Pictures are compared by the joint shares of their optical densities in red, green and blue
    (relative to the empty background, fill left out), which turning, flipping, shifting and
    brightening leave as they are. Nothing is learned. The distance is Hellinger's: 0 for equal
    shares, 1 for shares with nothing in common.

    Parameters
    ----------
    image_set : ImageSet
    train_paths, test_paths : sequence of str
        Paths of the manifest.
    sample : int
        Test images looked up, drawn without replacement; all, if there are not more.
    seed : int
    cache : Path, optional
        Keeps the descriptors of the whole set in ``cache/twins/``, in chunks: a killed run goes on, and
        the next split of the same set is answered at once.
    progress : callable, optional
        Called with (done, total) pictures.
    workers : int
        Threads; the result does not depend on it.

    Returns
    -------
    DataFrame
        ``test_path, nearest_train_path, distance, same_photograph``, by test path. The share of
        ``same_photograph`` is the share of the leak.
    """
    if not len(train_paths) or not len(test_paths):
        raise DataError("twins need images on both sides", "give training and test paths")
    chosen = sorted(test_paths)
    if sample < len(chosen):
        rng = np.random.default_rng(seed)
        chosen = [chosen[i] for i in sorted(rng.choice(len(chosen), sample, replace=False))]
    train = sorted(train_paths)
    rows = image_set.manifest.set_index("path")
    # with a cache the whole set is described once, whatever split asks next
    wanted = {*chosen, *train} if cache is None else {*chosen, *train, *_twin_candidates(image_set.manifest)}
    describer = _Describer(image_set.root, rows["sha256"], cache, workers)
    described = describer.describe(sorted(wanted), progress)
    places = {path: i for i, path in enumerate(sorted(wanted))}
    ours = described[[places[path] for path in chosen]].astype(np.float32)
    nearest = np.zeros(len(chosen), np.int64)
    likeness = np.full(len(chosen), -np.inf, np.float32)
    for start in range(0, len(train), _BLOCK):
        block = described[[places[path] for path in train[start : start + _BLOCK]]].astype(np.float32)
        alike = ours @ block.T
        best = alike.argmax(axis=1)
        value = alike[np.arange(len(chosen)), best]
        better = value > likeness
        nearest[better], likeness[better] = start + best[better], value[better]
    distances = np.sqrt(np.clip(1.0 - likeness, 0.0, 1.0))
    sources = rows["source"]
    table = []
    for path, place, distance in zip(chosen, nearest, distances, strict=True):
        twin = train[int(place)]
        same = sources[path] != "" and sources[path] == sources[twin]
        table.append((path, twin, float(distance), bool(same)))
    return pd.DataFrame(table, columns=list(TWIN_COLUMNS))


def colour_shares(rgb: RGB) -> NDArray[np.float32]:
    """Return the square roots of the shares of a picture's colours, blind to turning and brightness.

    Returns
    -------
    float32 array of shape (1152,)
        A unit vector; zeros where the picture is nothing but fill.
    """
    scale = _TWIN_SIDE / max(rgb.shape[:2])
    if scale < 1:
        rgb = np.asarray(cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    pixels = rgb[~fill_mask(rgb)].astype(np.float32)
    if not len(pixels):
        return np.zeros(int(np.prod(_TWIN_BINS)), np.float32)
    background = np.percentile(pixels, _BACKGROUND, axis=0).astype(np.float32)
    density = np.log((background + 1) / (pixels + 1))
    bins = np.asarray(_TWIN_BINS)
    place = np.clip(density / _TWIN_DENSITY * bins, 0, bins - 1).astype(np.int64)
    flat = np.ravel_multi_index((place[:, 0], place[:, 1], place[:, 2]), _TWIN_BINS)
    counts = np.bincount(flat, minlength=int(bins.prod())).astype(np.float32)
    return np.sqrt(counts / max(1.0, float(counts.sum()))).astype(np.float32)


def _twin_candidates(manifest: Manifest) -> list[str]:
    """Return the paths that splits are made of."""
    usable = manifest[~manifest["status"].isin(_UNREADABLE) & manifest["split"].isin(["train", "test", ""])]
    return usable["path"].tolist()


class _Describer:
    """Colour shares of images, kept on disk in chunks by content, so that a killed run goes on."""

    def __init__(self, root: Path, hashes: pd.Series, cache: Path | None, workers: int) -> None:
        self._root = root
        self._hashes = hashes
        self._folder = None if cache is None else Path(cache) / "twins"
        self._workers = workers

    def describe(self, paths: list[str], progress: Progress | None) -> NDArray[np.float16]:
        """Return one row a path."""
        out = _scratch((len(paths), int(np.prod(_TWIN_BINS))), np.float16)
        with single_threaded_opencv(), ThreadPoolExecutor(max(1, self._workers)) as pool:
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                out[start : start + len(chunk)] = self._chunk(chunk, pool)
                if progress is not None:
                    progress(start + len(chunk), len(paths))
        return out

    def _chunk(self, paths: list[str], pool: ThreadPoolExecutor) -> NDArray[np.float16]:
        key = content_key(VERSION, _TWIN_SIDE, _TWIN_BINS, _TWIN_DENSITY, list(self._hashes[paths]))
        file = None if self._folder is None else self._folder / f"{key}.npy"
        if file is not None and file.is_file():
            try:
                return np.asarray(np.load(file), np.float16)
            except (OSError, ValueError) as error:
                raise DataError(f"{file} is damaged ({error})", "remove it and run again") from error
        described = np.stack(list(pool.map(self._one, paths))).astype(np.float16)
        if file is not None:
            with atomic_path(file) as temporary:
                np.save(temporary, described)
        return described

    def _one(self, path: str) -> NDArray[np.float32]:
        return colour_shares(read_image(self._root / path, name=path))


def _count(rows: pd.DataFrame, by: list[str], name: str = "images") -> pd.DataFrame:
    return rows.groupby(by).size().reset_index(name=name)


def _used(decodable: pd.DataFrame, groups: pd.Series) -> pd.DataFrame:
    """Return the labelled images that train or judge, with source and group of each."""
    rows = decodable[decodable["label"] != ""]
    copies = rows[rows["split"] != "photograph"]
    rows = copies if len(copies) else rows
    source = rows["source"].where(rows["source"] != "", rows["path"])
    return rows.assign(source=source, group=groups.reindex(rows["path"]).to_numpy())


def _balance(used: pd.DataFrame) -> pd.DataFrame:
    table = used.groupby("label").agg(
        images=("path", "size"), photographs=("source", "nunique"), groups=("group", "nunique")
    )
    table.insert(1, "share", table["images"] / table["images"].sum())
    return table.reset_index()


def _photographs(used: pd.DataFrame) -> pd.DataFrame:
    each = used.groupby(["split", "label", "source"]).agg(copies=("path", "size"), group=("group", "first"))
    table = each.groupby(["split", "label"]).agg(
        photographs=("copies", "size"),
        groups=("group", "nunique"),
        copies_least=("copies", "min"),
        copies_median=("copies", "median"),
        copies_most=("copies", "max"),
    )
    return table.reset_index()


def _conflicts(duplicates: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    columns = ["path_a", "path_b", "label_a", "label_b", "similarity"]
    files = [list(zip(same["path"], same["label"], strict=True)) for _, same in duplicates.groupby("sha256")]
    identical = [
        (path_a, path_b, label_a, label_b, 1.0)
        for same in files
        for (path_a, label_a), (path_b, label_b) in combinations(same, 2)
        if label_a != label_b
    ]
    alike = pairs[pairs["same_cell"] & (pairs["label_a"] != pairs["label_b"])]
    alike = alike[(alike["label_a"] != "") & (alike["label_b"] != "")]
    return pd.concat([pd.DataFrame(identical, columns=columns), alike[columns]], ignore_index=True)


def _crossing(used: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the photographs that the official sides have in common, or nearly."""
    train = set(used.loc[used["split"] == "train", "source"])
    test = set(used.loc[used["split"].isin(["test", "test_simple"]), "source"])
    columns = ["train_source", "test_source", "similarity", "overlap", "same_cell"]
    both = pd.DataFrame([(name, name, 1.0, 1.0, True) for name in sorted(train & test)], columns=columns)
    tables = [both]
    for train_side, test_side in (("source_a", "source_b"), ("source_b", "source_a")):
        found = pairs[pairs[train_side].isin(train) & pairs[test_side].isin(test)]
        tables.append(found[[train_side, test_side, *columns[2:]]].set_axis(columns, axis=1))
    return pd.concat([table for table in tables if len(table)] or [both], ignore_index=True)
