"""Keys of everything a job depends on: the library, the packages under it, the images."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hematovision.config import Profile, cache_folder, data_folder
from hematovision.errors import ConfigError, DataError, HematoVisionError
from hematovision.files import content_key, read_json, sha256_file, write_json

NUMERIC_PACKAGES = ("numpy", "scipy", "pandas", "opencv-python-headless", "pillow", "scikit-learn", "keras")
TENSORFLOW_BUILDS = ("tensorflow-cpu", "tensorflow")
_REPORT_FILES_OF_NOTEBOOKS = ("__init__.py", "plots.py", "tables.py")


def library_files() -> list[Path]:
    """Return the files of the library that a notebook can use: all but the runner, pages and CLI."""
    package = Path(__file__).resolve().parents[1]
    return sorted(
        p
        for p in package.rglob("*")
        if p.is_file()
        and "__pycache__" not in p.parts
        and p != package / "cli.py"
        and (p.parent.name != "report" or p.name in _REPORT_FILES_OF_NOTEBOOKS)
        and "templates" not in p.parts
    )


def library_key() -> str:
    """Return a key of the library as far as a notebook can use it."""
    package = Path(__file__).resolve().parents[1]
    return content_key([(p.relative_to(package).as_posix(), sha256_file(p)) for p in library_files()])


def page_key() -> str:
    """Return a key of what makes the pages: a change there renders them again, and runs nothing."""
    folder = Path(__file__).resolve().parent
    return content_key([(p.name, sha256_file(p)) for p in sorted(folder.rglob("*")) if _is_source(p)])


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def numeric_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in (*NUMERIC_PACKAGES, *TENSORFLOW_BUILDS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def data_key(profile: Profile, data: str | Path | None = None) -> str:
    """Return a key of the images that a profile reads, 16 hexadecimal digits.

    Drawn images follow from the profile and the library. Files are hashed once and known again by
    path, size and time of change, so that a second run takes a fraction of a second; the key is of
    their content alone and stays when they are moved.

    Raises
    ------
    DataError
        If the folder of a set that the profile reads is not there, or holds nothing.
    """
    return content_key([(name, _folder_key(root)) for name, root in _roots(profile, data)])


def weights_key(parameters: Mapping[str, Any]) -> str:
    """Return a key of the weight files that a notebook starts from; names alone where Keras keeps them.

    Parameters
    ----------
    parameters : mapping
        Of the notebook, as `notebook.bind_parameters` gives them.
    """
    from hematovision.learn.backbones import sources_of, weights_file

    files = (
        (backbone, source, weights_file(backbone, source)) for backbone, source in sources_of(parameters)
    )
    return content_key([(b, source, _sha256(file) if file else "") for b, source, file in files])


def count_files(profile: Profile, data: str | Path | None = None) -> int:
    """Return about how many images a profile reads."""
    if profile.dataset == "synthetic":
        return profile.synthetic_photographs * (1 + profile.synthetic_copies)
    from hematovision.data.scan import walk_files

    return sum(1 for _, root in _roots(profile, data) for _ in walk_files(root))


def _roots(profile: Profile, data: str | Path | None) -> list[tuple[str, Path]]:
    names = [n for n in (profile.dataset, *profile.extra_training) if n != "synthetic"]
    if not names:
        return []
    # the catalogue brings the readers and what they decode with; a run on drawn cells needs none
    from hematovision.data.catalog import find_root, find_row

    for name in sorted(set(profile.classes) - set(find_row(profile.dataset).classes)):
        raise ConfigError(
            f"profile '{profile.name}': {profile.dataset} has no class '{name}'",
            f"its classes are {', '.join(find_row(profile.dataset).classes)}",
        )
    return [(name, find_root(find_row(name), data_folder(data))) for name in names]


def _folder_key(folder: Path) -> str:
    from hematovision.data.scan import fingerprint, walk_files

    memory_path = cache_folder() / "data_keys.json"
    memory: dict[str, Any] = {}
    with contextlib.suppress(HematoVisionError):
        memory = read_json(memory_path)
    mark = fingerprint(folder)
    if mark not in memory:
        files = sorted(path for path, _ in walk_files(folder))
        if not files:
            raise DataError(f"the folder {folder} is empty", "fill it, or name another with --data")
        memory[mark] = content_key([(path, _sha256(folder / path)) for path in files])
        write_json(memory_path, memory)
    return str(memory[mark])


def _sha256(path: Path) -> str:
    # a file that may not be read is the audit's to report, not a reason to stop
    try:
        return sha256_file(path)
    except HematoVisionError:
        return hashlib.sha256(b"unreadable").hexdigest()
