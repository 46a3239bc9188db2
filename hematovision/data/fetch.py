"""Downloading a public set from Kaggle, and checking a set against the files that are known.

A set appears under its final name only when it is complete and verified. Until then everything lies
in ``.fetch-NAME`` of the data folder, from where a broken or killed download goes on.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import logging
import os
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hematovision.config import data_folder
from hematovision.data.catalog import DataSet, find_root, find_row
from hematovision.data.scan import Progress, is_image, name_a_few, walk_files
from hematovision.errors import DataError
from hematovision.files import atomic_path, explain_os_error, sha256_file

DIGITS = 16
"""Hexadecimal digits of the SHA-256 that the known lists keep: 64 bits tell damage from chance."""

TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection and between two pieces of data; kagglehub itself waits for ever."""

_TRIES = 6  # a broken connection is taken up again so often, as long as data keeps coming
_PAUSE = 2.0  # seconds before the second try, twice that before the third, and so on
_DISK_FACTOR = 2.2  # archive and unpacked files lie side by side for a moment
_DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError)
_TOKEN = "put a token from https://www.kaggle.com/settings into KAGGLE_API_TOKEN"

Say = Callable[[str], None]
Known = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Verification:
    """How a set compares with the list of its known files.

    Attributes
    ----------
    name : str
        In the catalogue.
    root : Path
        The folder that was looked at.
    intact : int
        Known files that are there, byte for byte.
    images : int
        Images that are there, known or not.
    expected : int
        Images of the whole set.
    missing, damaged, unknown : tuple of str
        Paths relative to the root: known files that are not there, that have other bytes, and files
        of which nothing is known.
    """

    name: str
    root: Path
    intact: int
    images: int
    expected: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether every known file is there as it should be."""
        return not self.missing and not self.damaged

    @property
    def complete(self) -> bool:
        """Whether the set is sound and has all its images."""
        return self.sound and self.images >= self.expected

    def describe(self) -> str:
        """Return the result in one line, with the first names of what is wrong."""
        parts = [f"{self.images:,} of {self.expected:,} images, {self.intact:,} files verified"]
        for files, said in ((self.damaged, "damaged"), (self.missing, "missing")):
            if files:
                parts.append(f"{len(files):,} {said} ({name_a_few(files)})")
        if self.unknown:
            parts.append(f"{len(self.unknown):,} not on the list of known files")
        return f"{self.name}: " + ", ".join(parts)


def verify(name: str, data: Path | str | None = None, progress: Progress | None = None) -> Verification:
    """Compare a set with the list of its known files, by size and SHA-256.

    Of ``pbc`` the list knows 4,216 of the 17,092 images; the others are counted as unknown.

    Parameters
    ----------
    name : str
        In the catalogue.
    data : Path, optional
        The data folder (`config.data_folder` if not given).
    progress : callable, optional
        Called with (done, total) files.

    Raises
    ------
    DataError
        If the set is not there, or has no list of known files.
    """
    row = find_row(name)
    if row.known is None:
        raise DataError(f"nothing is known beforehand about '{name}'", "verify blood-cells or pbc")
    root = find_root(row, data_folder(data))
    known = read_known(row.known)
    here = {_collapse(path): path for path, _ in walk_files(root) if _is_part(path)}
    shared = sorted(known.keys() & here.keys())
    good = _map_files(lambda path: _same(root / here[path], known[path]), shared, progress)
    damaged = tuple(here[path] for path, same in zip(shared, good, strict=True) if not same)
    return Verification(
        name,
        root,
        len(shared) - len(damaged),
        sum(is_image(path) for path in here),
        row.images,
        tuple(sorted(known.keys() - here.keys())),
        damaged,
        tuple(here[path] for path in sorted(here.keys() - known.keys())),
    )


def read_known(path: Path) -> Known:
    """Read a list of known files: path to its size in bytes and the first digits of its SHA-256."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
            return {row["path"]: (int(row["bytes"]), row["sha256"]) for row in csv.DictReader(handle)}
    except (OSError, EOFError, zlib.error, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"the list of known files {path} cannot be read", "install the library again"
        ) from error


def write_known(
    name: str, out: Path | str, data: Path | str | None = None, progress: Progress | None = None
) -> int:
    """Write the list of known files from a set that is known to be good.

    This is how ``hematovision/data/known/*.csv.gz`` were made. Images, annotations and ``labels.csv``
    are listed, sorted, with doubled folders written once; equal files give equal bytes.

    Returns
    -------
    int
        Number of files listed.
    """
    root = find_root(find_row(name), data_folder(data))
    paths = [(path, status.st_size) for path, status in walk_files(root) if _is_part(path)]
    digests = _map_files(lambda entry: sha256_file(root / entry[0])[:DIGITS], paths, progress)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "bytes", "sha256"))
    rows = ((_collapse(path), size, digest) for (path, size), digest in zip(paths, digests, strict=True))
    table.writerows(sorted(rows))
    with atomic_path(out) as temporary:
        temporary.write_bytes(gzip.compress(text.getvalue().encode(), 9, mtime=0))
    return len(paths)


def fetch(
    name: str,
    data: Path | str | None = None,
    *,
    force: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a set with kagglehub into ``<data>/<name>``, verified; keep it if it is there already.

    A broken connection is taken up where it broke, in this run or in the next. kagglehub shows the
    progress of the download on the standard error stream.

    Parameters
    ----------
    name : str
        ``"blood-cells"`` or ``"pbc"``.
    data : Path, optional
        The data folder (`config.data_folder` if not given).
    force : bool
        Download again and replace a folder that is damaged or only a part of the set. What is there
        is kept until the new one is complete.
    say : callable, optional
        Called with a line at the beginning of each long piece of work, and with the result.
    progress : callable, optional
        Called with (done, total) files while verifying.

    Returns
    -------
    Path
        ``<data>/<name>``.

    Raises
    ------
    DataError
        If there is nothing to download; the folder that is there is damaged or a part; there is no
        network, no permission or no room; or what came is not what is known.
    HematoVisionError
        If the data folder can't be written.
    """
    row = find_row(name)
    if not row.kaggle:
        raise DataError(f"there is nothing to download for '{name}'", "fetch blood-cells or pbc")
    say = say or (lambda _line: None)
    data = data_folder(data)
    target = data / name
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file, not a folder", "move it away and run again")
    if not force and target.is_dir() and any(target.iterdir()):
        say(f"{target} is there already; verifying it")
        return _keep(row, data, target, say, progress)
    with _alone(data, name) as staging:
        _check_room(row, data)
        say(f"downloading {row.kaggle} from Kaggle ({row.licence}; {row.citation})")
        unpacked = _download(row, staging / "hub")
        _place(unpacked, staging / "hub", staging / name)
        say("verifying")
        _check_download(row, staging, say, progress)
        with atomic_path(target) as temporary:
            os.rename(staging / name, temporary)
    return target


def _keep(row: DataSet, data: Path, target: Path, say: Say, progress: Progress | None) -> Path:
    try:
        result = verify(row.name, data, progress)
    except DataError as error:
        raise DataError(
            f"{target} is there but is not the set '{row.name}'", "move it away and run again"
        ) from error
    say(result.describe())
    if result.complete:
        return target
    what = (
        "is damaged or incomplete" if not result.sound else "is a part of the set, and can be used as it is"
    )
    raise DataError(
        f"{target} {what}: {result.describe()}",
        f"to replace it by the whole set, run 'hematovision fetch {row.name} --force'",
    )


def _check_download(row: DataSet, staging: Path, say: Say, progress: Progress | None) -> None:
    """Refuse what came if a known file is missing or has other bytes, and clear it away."""
    try:
        result = verify(row.name, staging, progress)
    except DataError as error:
        _clear(staging)
        remedy = f"see {row.url} and put the files into place yourself (data/README.md)"
        raise DataError(f"what Kaggle sent for {row.kaggle} is not the set '{row.name}'", remedy) from error
    say(result.describe())
    if not result.sound:
        _clear(staging)
        raise DataError(f"the download is not what is known: {result.describe()}", "run again")


@contextlib.contextmanager
def _alone(data: Path, name: str) -> Iterator[Path]:
    """Yield the staging folder, held against other processes; removed once it is of no more use."""
    staging, lock = data / f".fetch-{name}", data / f".fetch-{name}.lock"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "w")  # noqa: SIM115 - closed below, after the work
    except OSError as error:
        raise explain_os_error(error, data) from error
    with handle:
        _hold(handle.fileno(), lock, data / name)
        done = False
        try:
            yield staging
            done = True
        finally:
            # what a broken download brought stays for the next run
            if done or not any(entry.is_file() for entry in staging.rglob("*")):
                shutil.rmtree(staging, ignore_errors=True)
                lock.unlink(missing_ok=True)


def _hold(handle: int, lock: Path, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the holder before us removes the file at its end: a lock on a removed file holds nothing
        if os.stat(lock).st_ino != os.fstat(handle).st_ino:
            raise FileNotFoundError(lock)
    except OSError as error:
        raise DataError(f"{target} is being fetched by another process", "wait for it to end") from error


def _clear(folder: Path) -> None:
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _check_room(row: DataSet, data: Path) -> None:
    need, free = int(row.size * _DISK_FACTOR), shutil.disk_usage(data).free
    if free < need:
        what = f"{data} has {free / 1e6:,.0f} MB free, and {row.name} needs {need / 1e6:,.0f} MB to unpack"
        raise DataError(what, "free some space, or choose another folder with --data DIR")


def _download(row: DataSet, hub: Path) -> Path:
    """Download and unpack with kagglehub, its cache being ``hub``; return the unpacked folder."""
    try:
        import kagglehub
        import requests
        from kagglehub.exceptions import (
            BackendError,
            ColabEnvironmentError,
            CredentialError,
            DataCorruptionError,
            KaggleEnvironmentError,
        )
    except ImportError as error:
        raise DataError("kagglehub is not installed", "run: pip install 'hematovision[train]'") from error
    had, renewed = -1, False
    for tries in range(1, _TRIES + 1):
        try:
            with _kagglehub_in(hub):
                return Path(kagglehub.dataset_download(row.kaggle))
        except requests.RequestException as error:  # before OSError, of which it is a kind
            have = _bytes_in(hub)
            if _status(error) or have <= had or tries == _TRIES:
                raise _explain_request(error, row, have) from error
            had = have
            time.sleep(_PAUSE * tries)
        except (BackendError, ColabEnvironmentError, CredentialError, KaggleEnvironmentError) as error:
            raise _explain_kagglehub(error) from error
        except (DataCorruptionError, *_DAMAGED_ARCHIVE) as error:
            if "credentials" in str(error):  # a plain ValueError, like that for an archive of no known kind
                raise _explain_kagglehub(error) from error
            _clear(hub)
            # an older part may have been continued with the bytes of a newer archive: begin afresh, once
            if renewed:
                what = f"the archive that Kaggle sent for {row.kaggle} is damaged"
                raise DataError(what, "it has been removed; run again later") from error
            had, renewed = -1, True
        except OSError as error:
            raise explain_os_error(error, hub.parent.parent) from error
    raise DataError(f"the download of {row.kaggle} keeps breaking off", "run again, it goes on where it was")


@contextlib.contextmanager
def _kagglehub_in(hub: Path) -> Iterator[None]:
    """Point kagglehub's cache at ``hub``, keep it off the standard output and let it time out."""
    from requests.adapters import HTTPAdapter

    logger, variable = logging.getLogger("kagglehub"), "KAGGLEHUB_CACHE"
    level, before, send = logger.level, os.environ.get(variable), HTTPAdapter.send

    def send_with_timeout(adapter: Any, request: Any, **options: Any) -> Any:
        options["timeout"] = options.get("timeout") or TIMEOUT
        return send(adapter, request, **options)

    os.environ[variable] = str(hub)
    logger.setLevel(logging.ERROR)
    HTTPAdapter.send = send_with_timeout  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        HTTPAdapter.send = send  # type: ignore[method-assign]
        logger.setLevel(level)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _bytes_in(hub: Path) -> int:
    return sum(file.stat().st_size for file in hub.rglob("*.archive"))


def _status(error: Exception) -> int:
    """Return the HTTP status that an error carries; 0 if the server never answered."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _explain_kagglehub(error: Exception) -> DataError:
    return DataError(f"kagglehub stops: {error}", f"mend it, or {_TOKEN}")


def _explain_request(error: Exception, row: DataSet, have: int) -> DataError:
    by_hand = f"or download {row.url} in a browser and unpack it into {row.name}/ of the data folder"
    status = _status(error)
    if status in (401, 403):
        return DataError(f"Kaggle refuses {row.kaggle} (HTTP {status})", f"{_TOKEN}, {by_hand}")
    if status == 429:
        return DataError("Kaggle asks to slow down (HTTP 429)", f"run again in some minutes, {by_hand}")
    if status:
        return DataError(f"Kaggle answers HTTP {status} for {row.kaggle}", f"run again later, {by_hand}")
    if have:
        what = f"the download of {row.kaggle} broke off after {have / 1e6:,.1f} MB"
        return DataError(what, "check the network and run again, it goes on where it was")
    return DataError("Kaggle cannot be reached", f"check the network and run again, {by_hand}")


def _place(unpacked: Path, hub: Path, place: Path) -> None:
    """Move what kagglehub unpacked to ``place``; copy it where it is not ours (a mounted folder)."""
    try:
        if place.exists():
            shutil.rmtree(place)
        if unpacked.resolve().is_relative_to(hub.resolve()):
            os.rename(unpacked, place)
        else:
            shutil.copytree(unpacked, place)
    except OSError as error:
        raise explain_os_error(error, place) from error


def _is_part(path: str) -> bool:
    """Whether a file belongs to a set: an image, an annotation, or the table of labels."""
    return is_image(path) or path.endswith((".xml", "labels.csv"))


def _collapse(path: str) -> str:
    """Write folders that repeat their parent's name once: archives unpack to ``a/a/`` or ``a/``."""
    parts = path.split("/")
    return "/".join(part for part, before in zip(parts, [None, *parts], strict=False) if part != before)


def _same(path: Path, known: tuple[int, str]) -> bool:
    try:
        return path.stat().st_size == known[0] and sha256_file(path)[:DIGITS] == known[1]
    except OSError:
        return False


def _map_files(work: Callable[[Any], Any], files: list[Any], progress: Progress | None) -> list[Any]:
    results = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashing leaves the interpreter lock
        for result in pool.map(work, files):
            results.append(result)
            if progress and (len(results) % 64 == 0 or len(results) == len(files)):
                progress(len(results), len(files))
    return results
