"""What each job of a run has done: the key of its inputs, the files it left, the time it took.

The graph's memory is one small JSON file a job, written when the job is complete, so that a run
that is killed at any moment finds everything that was finished and nothing that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from hematovision.config import BACKBONE_NAMES
from hematovision.errors import HematoVisionError
from hematovision.files import read_json, sha256_file, write_json

RUN = "run"
"""Folder of the runner's own files, inside the folder of artifacts."""


@dataclass(frozen=True)
class Record:
    """What one job has done.

    Attributes
    ----------
    key : str
        Of all its inputs.
    outputs : dict of str to str
        Path relative to the artifacts, and SHA-256.
    seconds : float
    peak_mb : int
        Largest resident memory of the notebook's kernel, in megabytes.
    finished : str
        ISO 8601, UTC.
    """

    key: str
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_mb: int = 0
    finished: str = ""


def record_path(folder: Path, name: str) -> Path:
    """Return where the record of a job stands, whether or not it does."""
    return folder / RUN / "steps" / f"{name}.json"


def executed_path(folder: Path, name: str) -> Path:
    """Return where the executed notebook of a job stands."""
    return folder / RUN / "notebooks" / f"{name}.ipynb"


def read_record(folder: Path, name: str) -> Record | None:
    """Return the record of a job, or None where there is none that can be read."""
    with contextlib.suppress(HematoVisionError, TypeError):
        return Record(**read_json(record_path(folder, name)))
    return None


def write_record(folder: Path, name: str, record: Record) -> None:
    """Write the record of a job; from here on it is done."""
    write_json(record_path(folder, name), dataclasses.asdict(record))


def is_current(folder: Path, name: str, key: str) -> bool:
    """Return whether a job was done with these inputs and all it left is still there."""
    record = read_record(folder, name)
    return (
        record is not None
        and record.key == key
        and executed_path(folder, name).is_file()
        and all((folder / path).exists() for path in record.outputs)
    )


def begin_job(folder: Path, name: str, key: str) -> None:
    """Note what stands in the artifacts before a job starts, to tell later what it has written.

    A job that goes on after a kill keeps the note of its first start, so that files of the first
    attempt which the second need not write again still count as its own.
    """
    path = _begun_path(folder, name)
    with contextlib.suppress(HematoVisionError, KeyError, TypeError):
        if read_json(path)["key"] == key:
            return
    write_json(path, {"key": key, "before": _list_files(folder), "seconds": 0.0})


def seconds_before(folder: Path, name: str) -> float:
    """Return the seconds that attempts which were killed have spent on a job that is begun."""
    with contextlib.suppress(HematoVisionError, KeyError, TypeError, ValueError):
        return float(read_json(_begun_path(folder, name))["seconds"])
    return 0.0


def note_seconds(folder: Path, name: str, seconds: float) -> None:
    """Note how long a job has been going on over all attempts, for the next one if this is killed."""
    path = _begun_path(folder, name)
    write_json(path, {**read_json(path), "seconds": round(seconds, 2)})


def finish_job(folder: Path, name: str, backbone: str) -> dict[str, str]:
    """Return the files that a job has left, with their SHA-256.

    Parameters
    ----------
    folder : Path
        Of the artifacts.
    name, backbone : str
        Of the job. Jobs of a template may run side by side, so each owns only the files whose path
        names its backbone.

    Returns
    -------
    dict of str to str
    """
    before = read_json(_begun_path(folder, name))["before"]
    previous = read_record(folder, name)
    kept = previous.outputs if previous else {}
    now = _list_files(folder)
    mine = [p for p, stamp in now.items() if before.get(p) != stamp or p in kept]
    others = [b for b in BACKBONE_NAMES if b != backbone]
    if backbone:
        mine = [p for p in mine if backbone in p.lower() and not any(b in p.lower() for b in others)]
    return {path: sha256_file(folder / path) for path in sorted(mine)}


def forget_begin(folder: Path, name: str) -> None:
    """Remove the note of `begin_job`; the record stands in its place."""
    _begun_path(folder, name).unlink(missing_ok=True)


def _begun_path(folder: Path, name: str) -> Path:
    return folder / RUN / "steps" / f"{name}.begun.json"


def _list_files(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change of every artifact, leaving out half-written and hidden ones."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if parts[0] == RUN or any(part.startswith(".") for part in parts):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                status = path.stat()
                found["/".join(parts)] = [status.st_size, status.st_mtime_ns]
    return found
