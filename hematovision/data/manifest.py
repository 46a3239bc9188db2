"""The table of images: one row a file, one checked schema for every data set.

Columns
-------
path : str
    Relative to the data folder, with forward slashes; no machine's path is ever stored.
dataset : str
    Name in the catalogue.
label : str
    A class name of `hematovision.classes`, or ``""`` where the image has none or several.
source : str
    The photograph an image comes from: the unit by which splits are made and intervals clustered.
    Images of one photograph share it; ``""`` where it is not known.
split : str
    The side given by the set's authors: ``train``, ``test``, ``test_simple``, ``photograph`` or
    ``""``.
sha256 : str
    Of the file's bytes.
width, height : int64
    In pixels after EXIF orientation; 0 if the file can't be decoded.
status : str
    ``ok``; ``unsure`` (the photograph behind it could not be told with confidence); ``duplicate``
    (same bytes as an earlier row); ``conflict`` (same picture, two labels); ``unreadable``,
    ``truncated`` (not decodable); ``unlabelled`` (no label or several).
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hematovision.classes import EIGHT
from hematovision.errors import DataError
from hematovision.files import atomic_path, content_key

COLUMNS = ("path", "dataset", "label", "source", "split", "sha256", "width", "height", "status")
STATUSES = ("ok", "unsure", "duplicate", "conflict", "unreadable", "truncated", "unlabelled")
SPLITS = ("train", "test", "test_simple", "photograph", "")
_INTEGERS = ("width", "height")

Manifest = pd.DataFrame
"""A frame that has passed `check_manifest`."""


def check_manifest(frame: pd.DataFrame, name: str = "the manifest") -> Manifest:
    """Return the frame with columns in order and of the right type, rows sorted by path.

    Raises
    ------
    DataError
        If columns are missing or unknown, a path appears twice, or a value is out of its domain.
    """
    missing = [c for c in COLUMNS if c not in frame.columns]
    extra = [c for c in frame.columns if c not in COLUMNS]
    if missing or extra:
        raise DataError(
            f"{name} has the wrong columns (missing {missing or 'none'}, unknown {extra or 'none'})",
            f"it must have exactly {', '.join(COLUMNS)}",
        )
    frame = frame.loc[:, list(COLUMNS)].copy()
    for column in COLUMNS:
        if column in _INTEGERS:
            numbers = pd.to_numeric(frame[column], errors="coerce")
            # no edge of a picture that can be decoded comes near the upper end
            if not (numbers.between(0, 2**31) & (numbers % 1 == 0)).all():
                raise DataError(
                    f"{name}: column {column} holds a value that is no whole number", "give pixels, from 0 on"
                )
            frame[column] = numbers.astype("int64")
        else:
            frame[column] = frame[column].fillna("").astype(str)
    twice = frame["path"][frame["path"].duplicated()]
    if len(twice):
        raise DataError(f"{name}: {twice.iloc[0]} is listed twice", "remove one of the rows")
    for column, domain in (("status", STATUSES), ("split", SPLITS), ("label", (*EIGHT, ""))):
        bad = frame.loc[~frame[column].isin(domain), column]
        if len(bad):
            raise DataError(f"{name}: '{bad.iloc[0]}' is no {column}", f"use one of {', '.join(domain)}")
    return frame.sort_values("path", ignore_index=True)


def read_manifest(path: Path | str) -> Manifest:
    """Read a manifest from CSV and check it."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable manifest ({error})", "write it again") from error
    return check_manifest(frame, str(path))


def write_manifest(manifest: Manifest, path: Path | str) -> None:
    """Write a manifest as CSV, atomically."""
    with atomic_path(path) as temporary:
        check_manifest(manifest, str(path)).to_csv(temporary, index=False)


def manifest_key(manifest: Manifest) -> str:
    """Return a key of the images' content, labels, photographs and sides, 16 hexadecimal digits."""
    columns = ["path", "label", "source", "split", "sha256", "status"]
    return content_key(manifest.loc[:, columns].to_csv(index=False))
