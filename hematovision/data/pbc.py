"""Reader of the Barcelona peripheral blood cell set (PBC): one centred cell an image, eight classes."""

from __future__ import annotations

from pathlib import Path

from hematovision.classes import EIGHT
from hematovision.data.scan import Listed, Reading, folder_label, is_image, name_a_few, walk_files
from hematovision.errors import DataError

VERSION = 1
"""Changes whenever the same files would give another reading."""

WHOLE = 17_092
"""Images in the whole set (Acevedo et al. 2020)."""


def read(data: Path, root: Path) -> Reading:
    """List the images of the class folders.

    The set tells no patients, so each picture is its own source, by its file name; files of the same
    bytes are later given one source. A part of the set is read as it is, and said in the notes.

    Parameters
    ----------
    data : Path
        The data folder, to which the paths are relative.
    root : Path
        The folder that holds the class folders.

    Raises
    ------
    DataError
        If a folder is named after no class, or there is no image.
    """
    listed = []
    for path, _ in walk_files(root):
        folder, slash, name = path.partition("/")
        if slash and is_image(name):
            full = (root / path).relative_to(data).as_posix()
            listed.append(Listed(full, folder_label(root / folder), Path(name).stem))
    if not listed:
        raise DataError(f"{root} holds no image", "fetch the set again with 'hematovision fetch pbc'")
    notes = []
    if len(listed) < WHOLE:
        notes.append(f"pbc: {len(listed):,} of the {WHOLE:,} images are here")
    present = {image.label for image in listed}
    if absent := [name for name in EIGHT if name not in present]:
        notes.append(f"pbc: no image of {name_a_few(absent, len(EIGHT))} is here")
    return Reading(tuple(listed), notes=tuple(notes))
