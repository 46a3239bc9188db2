"""The public image set with the photograph behind every copy, for tests on real data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pandas as pd

from hematovision.config import cache_folder
from hematovision.data import photographs
from hematovision.data.catalog import ImageSet, load_set
from hematovision.data.manifest import check_manifest

_SAMPLED = 29  # copies of each class and side: 232, and the 71 of TEST_SIMPLE


class _NotKeptError(Exception):
    """A picture would have to be looked at: the cache doesn't hold the whole recovery."""


def load_recovered(data: Path) -> tuple[ImageSet, bool]:
    """Return the set and whether it is whole.

    Whole where the cache holds the recovery (minutes to compute), else all photographs with a
    seeded sample of about 300 copies.
    """
    try:
        with mock.patch.object(photographs, "view_picture", side_effect=_NotKeptError):
            return load_set("blood-cells", data), True
    except _NotKeptError:
        return _load_sample(data), False


def _load_sample(data: Path) -> ImageSet:
    image_set = load_set("blood-cells", data, sources=False)
    manifest = image_set.manifest
    copies = manifest[manifest["split"].isin(["train", "test"])]
    sampled = copies.groupby(["split", "label"]).sample(_SAMPLED, random_state=0)
    others = manifest[manifest["split"].isin(["test_simple", "photograph"])]
    part = check_manifest(pd.concat([sampled, others]))
    found = photographs.assign_sources(part, data, cache_folder())
    return dataclasses.replace(image_set, manifest=found)
