"""Who trains, who chooses and who judges: splits by photograph, and the proof that sides share nothing.

The unit is the *group*: all images of one photograph, and of every photograph that is its
near-duplicate (`hematovision.data.audit.linked_groups`). What a row's status means for a split:

========================= =====================================================================
``ok``                    used
``duplicate``             used; its group keeps it on the side of the image it repeats
``unsure``                its photograph is not known for certain: kept in the official test side,
                          which is as its authors made it, and left out of everything else
``conflict``              same picture, two labels: likewise
``unreadable`` ``truncated`` ``unlabelled``  never used
========================= =====================================================================

Every split is a function of its arguments alone, whatever the order of the manifest's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from hematovision.data.manifest import Manifest
from hematovision.errors import DataError
from hematovision.files import explain_os_error, write_text

SIDES = ("train", "validation", "test")
COLUMNS = ("name", "leaky", "side", "path", "note")

_USED = ("ok", "duplicate")
_USED_IN_OFFICIAL_TEST = ("ok", "duplicate", "unsure", "conflict")
_POOLED = ("train", "test", "")
_VALIDATION, _TEST, _FOLDS, _SUBSET = 1, 2, 3, 4  # separate streams of random numbers

LEAK_NOTE = (
    "split by image, as is usual for this set: copies of one photograph stand on both sides, "
    "so that scores measure memory; for demonstration only"
)


@dataclass(frozen=True)
class Split:
    """Three sides of a set, as paths of its manifest.

    Attributes
    ----------
    name : str
        ``official``, ``grouped``, ``grouped-1-of-5``, ``random``, ...
    train, validation, test : tuple of str
        Paths, sorted; no path is on two sides.
    extra : dict of str to tuple of str
        Further views of the test side, such as ``test_simple``: the photographs themselves.
    leaky : bool
        Whether one photograph may stand on two sides. A leaky split's scores must be labelled.
    note : str
        What was left out and why, in a sentence; shown wherever the split is.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    leaky: bool = False
    note: str = ""

    def sides(self) -> dict[str, tuple[str, ...]]:
        """Return all sides by name: train, validation, test, then the extra ones."""
        return {"train": self.train, "validation": self.validation, "test": self.test, **self.extra}

    def to_frame(self) -> pd.DataFrame:
        """Return one row a path with the columns `COLUMNS`; the note stands in the first row alone."""
        rows = [
            (self.name, self.leaky, side, path, "") for side, paths in self.sides().items() for path in paths
        ]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        if len(frame):
            frame.loc[0, "note"] = self.note
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, what: str = "the split") -> Split:
        """Return the split that `to_frame` wrote.

        Parameters
        ----------
        frame : DataFrame
        what : str
            What messages call it.

        Raises
        ------
        DataError
            If the columns are not `COLUMNS`, a side is empty, or the rows speak of several splits.
        """
        if list(frame.columns) != list(COLUMNS):
            raise DataError(f"{what} does not have the columns {', '.join(COLUMNS)}", "write it again")
        sides = {
            str(name): tuple(rows["path"].astype(str)) for name, rows in frame.groupby("side", sort=False)
        }
        for side in SIDES:
            if side not in sides:
                raise DataError(f"{what} has no {side} side", "write it again")
        if len(frame[["name", "leaky"]].drop_duplicates()) != 1:
            raise DataError(f"{what} holds rows of several splits", "write it again")
        first = frame.iloc[0]
        return cls(
            name=str(first["name"]),
            train=sides.pop("train"),
            validation=sides.pop("validation"),
            test=sides.pop("test"),
            extra=sides,
            leaky=str(first["leaky"]) == "True",
            note=str(first["note"]),
        )


def write_split(split: Split, path: Path | str) -> None:
    """Write a split as CSV, atomically."""
    write_text(path, split.to_frame().to_csv(index=False))


def read_split(path: Path | str) -> Split:
    """Read the CSV that `write_split` wrote.

    Raises
    ------
    DataError
        If the file is no split.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except ValueError as error:
        raise DataError(f"{path} is not a readable split ({error})", "write it again") from error
    return Split.from_frame(frame, str(path))


def official_split(
    manifest: Manifest, groups: pd.Series, validation_fraction: float = 0.2, seed: int = 0
) -> Split:
    """Return the split of the set's authors, with validation taken from TRAIN by photograph.

    Parameters
    ----------
    manifest : Manifest
    groups : Series
        Path to group.
    validation_fraction : float
        Share of TRAIN's photographs of each class that go to validation; at least one of each.
    seed : int

    Returns
    -------
    Split
        TEST is whole, images whose photograph is unsure included. TRAIN images that are unsure, in
        conflict, or of a group that reaches into TEST or TEST_SIMPLE are left out and counted in
        the note. ``extra["test_simple"]`` holds the un-augmented test photographs where there are any.

    Raises
    ------
    DataError
        If the set has no official sides, or a class has fewer than two photographs in TRAIN.
    """
    rows = _with_groups(manifest, groups)
    test, simple = (_of(rows, side, _USED_IN_OFFICIAL_TEST) for side in ("test", "test_simple"))
    given = rows[(rows["split"] == "train") & rows["status"].isin(_USED_IN_OFFICIAL_TEST)]
    if given.empty or test.empty:
        raise DataError("the set has no official train and test sides", "use the grouped split")
    sure = _of(rows, "train", _USED)
    linked = sure["group"].isin({*test["group"], *simple["group"]})
    train, validation = _part(sure[~linked], validation_fraction, _generator(seed, _VALIDATION))
    counts = given["status"].value_counts()
    note = "TRAIN to TEST as its authors split it, validation from TRAIN by photograph" + _left_out(
        {
            "whose photograph is unsure": int(counts.get("unsure", 0)),
            "with two labels": int(counts.get("conflict", 0)),
            "that look like a test photograph": int(linked.sum()),
        }
    )
    extra = {"test_simple": _paths(simple)} if len(simple) else {}
    return Split("official", _paths(train), _paths(validation), _paths(test), extra, note=note)


def grouped_split(
    manifest: Manifest,
    groups: pd.Series,
    seed: int = 0,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.2,
) -> Split:
    """Return a split by photograph of all that the set holds, official sides pooled.

    Parameters
    ----------
    manifest : Manifest
    groups : Series
        Path to group.
    seed : int
    test_fraction : float
        Share of the photographs of each class on the test side; at least one of each.
    validation_fraction : float
        Share of the remaining photographs of each class; at least one of each.

    Raises
    ------
    DataError
        If a class has too few photographs.
    """
    pool, left_out = _pool(manifest, groups)
    rest, test = _part(pool, test_fraction, _generator(seed, _TEST))
    train, validation = _part(rest, validation_fraction, _generator(seed, _VALIDATION))
    note = f"{test_fraction:.0%} of the photographs of each class are the test side" + left_out
    return Split("grouped", _paths(train), _paths(validation), _paths(test), note=note)


def grouped_folds(
    manifest: Manifest, groups: pd.Series, k: int = 5, seed: int = 0, validation_fraction: float = 0.2
) -> list[Split]:
    """Return ``k`` splits by photograph; every usable image is on the test side of exactly one.

    The photographs of each class are dealt to the folds in turn, so that folds differ by at most
    one photograph a class.

    Raises
    ------
    DataError
        If a class has fewer than ``k`` photographs, or ``k`` is below 2.
    """
    if k < 2:
        raise DataError(f"{k} folds are no cross-validation", "ask for at least 2")
    pool, left_out = _pool(manifest, groups)
    fold_of: dict[str, int] = {}
    position = 0
    for label, names in _shuffled_groups(pool, _generator(seed, _FOLDS)):
        if len(names) < k:
            raise DataError(f"{label} has {len(names)} photographs", f"too few for {k} folds; ask for fewer")
        for name in names:
            fold_of[name] = position % k
            position += 1
    folds = pool["group"].map(fold_of)
    splits = []
    for i in range(k):
        rest, test = pool[folds != i], pool[folds == i]
        train, validation = _part(rest, validation_fraction, _generator(seed, _VALIDATION, i))
        note = f"fold {i + 1} of {k} by photograph" + left_out
        name = f"grouped-{i + 1}-of-{k}"
        splits.append(Split(name, _paths(train), _paths(validation), _paths(test), note=note))
    return splits


def random_split(
    manifest: Manifest, seed: int = 0, test_fraction: float = 0.2, validation_fraction: float = 0.2
) -> Split:
    """Return the split by image that most published scores of augmented sets rest on.

    It is here to show the leak. Each class is split on its own. Images whose photograph is unsure
    are left out, so that scores compare with those of the grouped split on the same images.

    Returns
    -------
    Split
        ``leaky`` is True: even where every image is its own photograph nothing keeps near-duplicates
        apart.
    """
    alone = pd.Series(manifest["path"].to_numpy(), index=manifest["path"])
    pool, left_out = _pool(manifest, alone)
    rest, test = _part(pool, test_fraction, _generator(seed, _TEST))
    train, validation = _part(rest, validation_fraction, _generator(seed, _VALIDATION))
    copied = (pool["source"] != "") & pool["source"].duplicated(keep=False)
    note = LEAK_NOTE if copied.any() else "split by image: near-duplicates may stand on both sides"
    return Split("random", _paths(train), _paths(validation), _paths(test), leaky=True, note=note + left_out)


def learning_subset(
    split: Split, manifest: Manifest, groups: pd.Series, photographs: int, seed: int = 0
) -> Split:
    """Return the split with the training images of some photographs alone, for learning curves.

    The subsets of one seed are nested: that of 20 photographs holds that of 10. They keep the
    proportions of the classes, and the first photographs are one of each class.

    Parameters
    ----------
    split : Split
    manifest : Manifest
    groups : Series
        Path to group.
    photographs : int
        Groups to keep; at least the number of classes, at most what the training side has.
    seed : int

    Raises
    ------
    DataError
        If there are not so many, or fewer than classes are asked for.
    """
    rows = _with_groups(manifest, groups)
    train = rows[rows["path"].isin(split.train)]
    firsts: list[tuple[float, str]] = []
    others: list[tuple[float, str]] = []
    for _, names in _shuffled_groups(train, _generator(seed, _SUBSET)):
        firsts.append((0.0, names[0]))
        # evenly spaced ranks: any prefix of the merged list has the proportions of the whole
        others += [((i + 0.5) / len(names), name) for i, name in enumerate(names) if i]
    order = [name for _, name in firsts + sorted(others)]
    if not len(firsts) <= photographs <= len(order):
        raise DataError(
            f"{photographs} training photographs cannot be had",
            f"ask for {len(firsts)} to {len(order)}, one of each class at least",
        )
    kept = train[train["group"].isin(order[:photographs])]
    note = f"{split.note}; {photographs} of {len(order)} training photographs"
    return replace(split, name=f"{split.name}-{photographs}", train=_paths(kept), note=note)


def summarise_split(split: Split, manifest: Manifest, groups: pd.Series) -> pd.DataFrame:
    """Count images and photographs of every side and class.

    Returns
    -------
    DataFrame
        ``side, label, images, photographs``; photographs are groups, the effective n.
    """
    rows = _with_groups(manifest, groups).set_index("path")
    tables = []
    for side, paths in split.sides().items():
        counts = rows.loc[list(paths)].groupby("label")["group"].agg(["size", "nunique"]).reset_index()
        counts.insert(0, "side", side)
        tables.append(counts.set_axis(["side", "label", "images", "photographs"], axis=1))
    return pd.concat(tables, ignore_index=True)


def prove_disjoint(split: Split, manifest: Manifest, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Count what any two sides share; raise if they share anything.

    The extra sides show the same photographs as the test side by design and are compared with
    train and validation alone.

    Parameters
    ----------
    split : Split
    manifest : Manifest
    pairs : DataFrame, optional
        Near-duplicates as `hematovision.data.audit.near_duplicates` returns them (``source_a,
        source_b, path_a, path_b``); photographs and single images alike.

    Returns
    -------
    DataFrame
        One row for each pair of sides: ``split, side_a, side_b, images_a, images_b, shared_images,
        shared_photographs, shared_hashes, shared_near_duplicates, unsure`` (images of either side
        whose photograph is the likeliest one and not certain).

    Raises
    ------
    DataError
        Naming the first offender, unless ``split.leaky``; or if a path is not in the manifest.
    """
    rows = manifest.set_index("path")
    sides = {name: _look_up(rows, paths, split.name) for name, paths in split.sides().items()}
    table = []
    for (name_a, a), (name_b, b) in combinations(sides.items(), 2):
        if name_a not in ("train", "validation") and name_b in split.extra:
            continue
        shared = {
            "shared_images": set(a.index) & set(b.index),
            "shared_photographs": _sources(a) & _sources(b),
            "shared_hashes": set(a["sha256"]) & set(b["sha256"]) - {""},
            "shared_near_duplicates": set(_crossing(pairs, a, b)),
        }
        if not split.leaky:
            _refuse_shared(split.name, name_a, name_b, a, b, shared)
        unsure = int((a["status"] == "unsure").sum() + (b["status"] == "unsure").sum())
        table.append(
            {
                "split": split.name,
                "side_a": name_a,
                "side_b": name_b,
                "images_a": len(a),
                "images_b": len(b),
                **{what: len(found) for what, found in shared.items()},
                "unsure": unsure,
            }
        )
    return pd.DataFrame(table)


def _refuse_shared(
    name: str, side_a: str, side_b: str, a: pd.DataFrame, b: pd.DataFrame, shared: dict[str, set[str]]
) -> None:
    column = {"shared_photographs": "source", "shared_hashes": "sha256"}
    for what, found in shared.items():
        if not found:
            continue
        first = min(found)
        if what in column:
            examples = [_first_path(side, column[what], first) for side in (a, b)]
            first = f"{first} ({examples[0]} and {examples[1]})"
        kind = what.removeprefix("shared_").replace("_", "-").rstrip("s").replace("hashe", "hash")
        raise DataError(
            f"split '{name}': {side_a} and {side_b} share the {kind} {first}",
            f"{len(found)} in all; split by linked groups",
        )


def _first_path(side: pd.DataFrame, column: str, value: str) -> str:
    return str(side.index[side[column] == value].min())


def _look_up(rows: pd.DataFrame, paths: tuple[str, ...], name: str) -> pd.DataFrame:
    missing = [path for path in paths if path not in rows.index]
    if missing:
        raise DataError(f"split '{name}' names {missing[0]}", "which the manifest does not; split again")
    return rows.loc[list(paths)]


def _sources(rows: pd.DataFrame) -> set[str]:
    return set(rows["source"]) - {""}


def _crossing(pairs: pd.DataFrame | None, a: pd.DataFrame, b: pd.DataFrame) -> Iterator[str]:
    """Yield the near-duplicates that have one member on each side, by photograph or by image."""
    if pairs is None or pairs.empty:
        return
    in_a, in_b = ({*side.index, *_sources(side)} for side in (a, b))
    for left, right in (("source_a", "source_b"), ("path_a", "path_b")):
        for one, two in zip(pairs[left].astype(str), pairs[right].astype(str), strict=True):
            if one != two and ((one in in_a and two in in_b) or (two in in_a and one in in_b)):
                yield f"{one} and {two}"


def _with_groups(manifest: Manifest, groups: pd.Series) -> pd.DataFrame:
    """Return the labelled rows, sorted by path, with their group."""
    rows = manifest[manifest["label"] != ""].sort_values("path", ignore_index=True)
    found = groups.reindex(rows["path"])
    if found.isna().any():
        raise DataError(f"{found.index[found.isna()][0]} has no group", "link the groups of this manifest")
    return rows.assign(group=found.to_numpy())


def _of(rows: pd.DataFrame, side: str, statuses: tuple[str, ...]) -> pd.DataFrame:
    return rows[(rows["split"] == side) & rows["status"].isin(statuses)]


def _pool(manifest: Manifest, groups: pd.Series) -> tuple[pd.DataFrame, str]:
    """Return the rows that splits of the whole set are made of, and what was left out."""
    rows = _with_groups(manifest, groups)
    given = rows[rows["split"].isin(_POOLED)]
    pool = given[given["status"].isin(_USED)]
    if pool.empty:
        raise DataError("no usable labelled image is left to split", "check the data folder")
    counts = given["status"].value_counts()
    left_out = {
        "whose photograph is unsure": counts.get("unsure", 0),
        "with two labels": counts.get("conflict", 0),
    }
    return pool, _left_out({why: int(n) for why, n in left_out.items()})


def _left_out(reasons: dict[str, int]) -> str:
    parts = [f"{n} images {why}" for why, n in reasons.items() if n]
    return f"; left out: {', '.join(parts)}" if parts else ""


def _part(rows: pd.DataFrame, fraction: float, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Take a share of each class's groups away; both parts keep at least one group of each."""
    if not 0 < fraction < 1:
        raise DataError(f"a side cannot hold {fraction:g} of the photographs", "use a share between 0 and 1")
    taken: list[str] = []
    for label, names in _shuffled_groups(rows, rng):
        if len(names) < 2:
            raise DataError(
                f"{label} has only one photograph to split", "each class needs one for every side"
            )
        taken += names[: min(max(1, round(fraction * len(names))), len(names) - 1)]
    away = rows["group"].isin(taken)
    return rows[~away], rows[away]


def _shuffled_groups(rows: pd.DataFrame, rng: np.random.Generator) -> Iterator[tuple[str, list[str]]]:
    """Yield each class and its groups in random order; a group belongs to its most frequent class."""
    counts = rows.groupby(["group", "label"]).size().reset_index(name="images")
    counts = counts.sort_values(["group", "images", "label"], ascending=[True, False, True])
    main = counts.drop_duplicates("group")
    for label in sorted(set(rows["label"])):
        names = sorted(main.loc[main["label"] == label, "group"])
        yield label, [names[i] for i in rng.permutation(len(names))]


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, *stream])


def _paths(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(sorted(_as_text(rows["path"])))


def _as_text(values: Iterable[object]) -> Iterator[str]:
    return (str(value) for value in values)
