"""Which image sets exist, where they come from, and how one is loaded.

To add a set, write one reader (``read(data, root) -> Reading``) and one row of `CATALOG`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hematovision.classes import EIGHT, FOUR
from hematovision.config import cache_folder, data_folder
from hematovision.data import blood_cells, folder, lesson, pbc, synthetic
from hematovision.data.manifest import Manifest, check_manifest, read_manifest, write_manifest
from hematovision.data.photographs import assign_sources
from hematovision.data.scan import (
    Progress,
    Reading,
    fingerprint,
    inspect_images,
    mark_duplicates,
    share_sources,
)
from hematovision.errors import DataError, HematoVisionError
from hematovision.files import atomic_path, check_writable, content_key, read_json, sha256_file, write_json
from hematovision.vision import image
from hematovision.vision.field import Box

_VERSION = 1  # of what is done with a reading: hashing, decoding, marking duplicates
_KNOWN = Path(__file__).resolve().parent / "known"

Reader = Callable[[Path, Path], Reading]


@dataclass(frozen=True)
class DataSet:
    """One row of the catalogue.

    Attributes
    ----------
    name : str
        As given to ``--data`` commands and profiles.
    title, description : str
    classes : tuple of str
        The classes a study of the set is about, in the order of `hematovision.classes`.
    licence, citation, url : str
        Empty for a user's own images.
    kaggle : str
        Handle for `fetch`; empty where there is nothing to download.
    roots : tuple of str
        Where the set may lie in the data folder; the first that is there, with the entries named in
        ``signs``, is taken.
    signs : tuple of str
        Entries that a root must hold one of; empty if any folder will do.
    known : Path or None
        The list of known files that `fetch` checks against.
    images : int
        Images in the whole set; 0 if not known beforehand.
    counts : mapping of str to int
        Images by side, or by class where the authors made no sides.
    size : int
        Bytes on disk, about, for the whole set.
    read : callable or None
        The reader; None for the drawn set.
    version : int
        Of the reader: names the cached manifest.
    copies : bool
        Whether the set holds augmented copies whose photographs have to be recovered.
    """

    name: str
    title: str
    description: str
    classes: tuple[str, ...]
    licence: str = ""
    citation: str = ""
    url: str = ""
    kaggle: str = ""
    roots: tuple[str, ...] = (".",)
    signs: tuple[str, ...] = ()
    known: Path | None = None
    images: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    read: Reader | None = None
    version: int = 1
    copies: bool = False


CATALOG: dict[str, DataSet] = {
    row.name: row
    for row in (
        DataSet(
            name="blood-cells",
            title="Blood Cell Images (BCCD)",
            description=(
                "367 photographs of stained smears with boxes and labels, and 12,444 augmented copies "
                "of 348 of them in four classes"
            ),
            classes=FOUR,
            licence="MIT",
            citation="Shenggan, BCCD Dataset; Mooney, Blood Cell Images, Kaggle 2018",
            url="https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
            kaggle="paultimothymooney/blood-cells",
            roots=("blood-cells",),
            known=_KNOWN / "blood-cells.csv.gz",
            images=12_882,
            counts={"train": 9_957, "test": 2_487, "test_simple": 71, "photograph": 367},
            size=114_000_000,
            read=blood_cells.read,
            version=blood_cells.VERSION,
            copies=True,
        ),
        DataSet(
            name="pbc",
            title="Peripheral blood cells of the Hospital Clinic of Barcelona (PBC)",
            description="17,092 centred cells of one analyser in eight classes",
            classes=EIGHT,
            licence="CC BY 4.0",
            citation="Acevedo et al., Data in Brief 30 (2020) 105474, doi:10.17632/snkd93bnjr.1",
            url="https://www.kaggle.com/datasets/unclesamulus/blood-cells-image-dataset",
            kaggle="unclesamulus/blood-cells-image-dataset",
            roots=("pbc/PBC_dataset_normal_DIB", "pbc/bloodcells_dataset", "pbc"),
            signs=EIGHT,
            known=_KNOWN / "pbc.csv.gz",
            images=pbc.WHOLE,
            counts={
                "eosinophil": 3_117,
                "lymphocyte": 1_214,
                "monocyte": 1_420,
                "neutrophil": 3_329,
                "basophil": 1_218,
                "erythroblast": 1_551,
                "ig": 2_895,
                "platelet": 2_348,
            },
            size=282_000_000,
            read=pbc.read,
            version=pbc.VERSION,
        ),
        DataSet(
            name="folder",
            title="Your own images",
            description="images in folders named after their class",
            classes=EIGHT,
            read=folder.read,
            version=folder.VERSION,
        ),
        DataSet(
            name="photographs",
            title="The photographs of the Kaggle set alone",
            description="its photographs in four classes, and copies that this library makes of them",
            classes=FOUR,
            licence="MIT",
            citation="Shenggan, BCCD Dataset; Mooney, Blood Cell Images, Kaggle 2018",
            url="https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
            roots=("blood-cells/dataset-master/dataset-master", "blood-cells/dataset-master"),
            signs=("JPEGImages",),
        ),
        DataSet(
            name="synthetic",
            title="Drawn smears",
            description="photographs drawn by this library, and augmented copies of them; no download",
            classes=FOUR,
            licence="MIT",
        ),
    )
}

SYNTHETIC_DEFAULTS: dict[str, Any] = {"photographs": 160, "copies": 8, "seed": 2026, "classes": FOUR}
"""What is drawn where `load_set` is not told otherwise; the numbers of ``profiles/quick.yaml``."""

LESSON_DEFAULTS: dict[str, Any] = {"copies": 8, "seed": 2026, "classes": FOUR}
"""The copies of the photographs where `load_set` is not told otherwise."""


@dataclass(frozen=True)
class ImageSet:
    """A loaded set.

    Attributes
    ----------
    name : str
        In the catalogue.
    manifest : Manifest
    root : Path
        The folder that the manifest's paths are relative to: the data folder, or where a drawn set
        lies.
    boxes : dict of str to tuple of Box
        Path to its annotated boxes, of every kind of object; empty where there are none.
    notes : tuple of str
        What a user should be told, a line each.
    """

    name: str
    manifest: Manifest
    root: Path
    boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def path_of(self, relative: str) -> Path:
        """Return where the file of a manifest's path lies."""
        return self.root / relative


def find_row(name: str) -> DataSet:
    """Return a row of the catalogue.

    Raises
    ------
    DataError
        If there is no such set.
    """
    if name not in CATALOG:
        raise DataError(f"there is no data set '{name}'", f"choose one of {', '.join(CATALOG)}")
    return CATALOG[name]


def find_root(row: DataSet, data: Path) -> Path:
    """Return the folder in which a set lies.

    Raises
    ------
    DataError
        If it is not there, saying where it was looked for and what to do.
    """
    for relative in row.roots:
        root = data / relative
        if root.is_dir() and (not row.signs or any((root / sign).is_dir() for sign in row.signs)):
            return root
    looked = " or ".join(dict.fromkeys(str(data / relative) for relative in row.roots))
    named = "name the folder that holds it with --data DIR or HEMATOVISION_DATA"
    fetch = f"run 'hematovision fetch {row.name}', or " if row.kaggle else ""
    raise DataError(f"the data set '{row.name}' is not at {looked}", fetch + named)


def load_set(
    name: str,
    data: Path | str | None = None,
    *,
    cache: Path | str | None = None,
    sources: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> ImageSet:
    """Load a set: its manifest, boxes and notes.

    Every file is hashed and decoded once; the result is kept in ``cache/manifests`` under a key of
    the names, sizes and times of all files, so that loading again takes a fraction of a second.

    Parameters
    ----------
    name : str
        In the catalogue.
    data : Path, optional
        The data folder (`config.data_folder` if not given); for ``folder``, the folder that holds the
        class folders. Not used by ``synthetic``.
    cache : Path, optional
        `config.cache_folder` if not given.
    sources : bool
        Whether to recover the photograph behind every augmented copy, where the set has copies.
        This takes minutes the first time.
    progress : callable, optional
        Called with (done, total) files.
    **options
        For ``synthetic``: ``photographs``, ``copies``, ``seed`` and ``classes``; the defaults are
        `SYNTHETIC_DEFAULTS`. For ``photographs`` the last three; the defaults are `LESSON_DEFAULTS`.

    Raises
    ------
    DataError
        If there is no such set, it is not where it should be, or it is malformed.
    HematoVisionError
        If a folder can't be read or the cache can't be written.
    """
    row = find_row(name)
    cache = Path(cache) if cache is not None else cache_folder()
    if row.name == "synthetic":
        return _draw_set(row, cache, progress, options)
    if row.name == "photographs":
        return _copy_set(row, data_folder(data), cache, progress, options)
    if options:
        raise DataError(f"'{name}' has no option '{next(iter(options))}'", "leave it out")
    data = data_folder(data)
    root = find_root(row, data)
    kept = cache / "manifests" / f"{name}-{_key(row, data, root)}"
    image_set = _recall(row, data, kept) or _read_set(row, data, root, kept, progress)
    if not (sources and row.copies):
        return image_set
    manifest = assign_sources(image_set.manifest, data, cache, progress)
    return ImageSet(name, check_manifest(manifest, name), data, image_set.boxes, image_set.notes)


def write_set_manifest(
    name: str, out: Path | str, data: Path | str | None = None, progress: Progress | None = None
) -> ImageSet:
    """Load a set and write its manifest as CSV; what ``hematovision manifest`` does."""
    for place in (Path(out).resolve().parent, cache_folder()):
        check_writable(place)  # before every image is read for nothing
    image_set = load_set(name, data, progress=progress)
    write_manifest(image_set.manifest, out)
    return image_set


def _key(row: DataSet, data: Path, root: Path) -> str:
    # what the decoder makes of a damaged file stands in the manifest: another decoder, another key
    decoder = sha256_file(image.__file__)
    where = root.relative_to(data).as_posix()
    return content_key(_VERSION, row.version, decoder, where, fingerprint(root))


def _read_set(row: DataSet, data: Path, root: Path, kept: Path, progress: Progress | None) -> ImageSet:
    assert row.read is not None
    reading = row.read(data, root)
    frame = mark_duplicates(inspect_images(reading.images, row.name, data, progress))
    manifest = check_manifest(share_sources(frame), row.name)
    notes = (*reading.notes, *_quality_notes(row.name, manifest))
    with atomic_path(kept) as temporary:
        temporary.mkdir()
        write_json(temporary / "set.json", {"notes": notes, "boxes": _pack(reading.boxes)})
        write_manifest(manifest, temporary / "manifest.csv")
    return ImageSet(row.name, manifest, data, reading.boxes, notes)


def _recall(row: DataSet, data: Path, kept: Path) -> ImageSet | None:
    """Return what was kept; None if nothing was, or it is damaged."""
    try:
        facts = read_json(kept / "set.json")
        manifest = read_manifest(kept / "manifest.csv")
        return ImageSet(row.name, manifest, data, _unpack(facts["boxes"]), tuple(facts["notes"]))
    except (HematoVisionError, KeyError, TypeError):
        return None


def _draw_set(row: DataSet, cache: Path, progress: Progress | None, options: dict[str, Any]) -> ImageSet:
    if unknown := sorted(set(options) - set(SYNTHETIC_DEFAULTS)):
        known = ", ".join(SYNTHETIC_DEFAULTS)
        raise DataError(f"'{row.name}' has no option '{unknown[0]}'", f"options are {known}")
    manifest, root = synthetic.read(cache, progress=progress, **{**SYNTHETIC_DEFAULTS, **options})
    return ImageSet(row.name, manifest, root, _unpack(read_json(root / "boxes.json")))


def _copy_set(
    row: DataSet, data: Path, cache: Path, progress: Progress | None, options: dict[str, Any]
) -> ImageSet:
    values = {**LESSON_DEFAULTS, **options}
    if unknown := sorted(set(values) - set(LESSON_DEFAULTS)):
        raise DataError(
            f"'{row.name}' has no option '{unknown[0]}'", f"options are {', '.join(LESSON_DEFAULTS)}"
        )
    manifest, root = lesson.read(find_root(row, data), cache, progress=progress, **values)
    return ImageSet(row.name, manifest, root, _unpack(read_json(root / "boxes.json")))


def _quality_notes(name: str, manifest: Manifest) -> tuple[str, ...]:
    words = {
        "unreadable": "cannot be read as images",
        "truncated": "are cut short",
        "conflict": "have the same bytes as a file of another class",
    }
    counts = manifest["status"].value_counts()
    return tuple(f"{name}: {counts[s]:,} files {said}" for s, said in words.items() if counts.get(s, 0))


def _pack(boxes: dict[str, tuple[Box, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {path: [asdict(box) for box in found] for path, found in boxes.items()}


def _unpack(boxes: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[Box, ...]]:
    return {path: tuple(Box(**box) for box in found) for path, found in boxes.items()}
