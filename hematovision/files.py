"""Writing files so that a name never stands for half a file, and hashing them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from hematovision.errors import HematoVisionError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run again, what was done is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose a folder you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a file stands where a folder should be; choose another path",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


# renameat2(2): relative to the working directory, swap the two names
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def explain_os_error(error: OSError, path: Path | str) -> HematoVisionError:
    """Turn an ``OSError`` about ``path`` into one line with a remedy."""
    reason = _REMEDIES.get(error.errno or 0, (error.strerror or str(error)).lower())
    return HematoVisionError(f"cannot use {path}", reason)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, so that a kill finds no moment without either; False if impossible."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return swap is not None and swap(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _blamed(error: OSError, path: Path) -> Path | str:
    """Return the file an error is about, with temporary names told as what they stand for."""
    name = error.filename
    if not isinstance(name, str) or Path(name).is_relative_to(path):
        return path
    return path if Path(name).is_relative_to(path.parent) and f".{path.name}." in name else name


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path that takes the name ``path`` only once its block has ended well.

    Works for files and folders. On any error the temporary file or folder is removed and what
    stood at ``path`` is untouched. A folder that stood at ``path`` is replaced as a whole.

    Raises
    ------
    HematoVisionError
        If the file system refuses (disk full, no permission), naming ``path``.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix stays last: savers such as Keras's read the format from it
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary = holder / path.name
        yield temporary
        if temporary.is_dir() and path.is_dir():
            if _exchange(temporary, path):
                return
            old = holder / "old"
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(old, path)
                raise
        else:
            if temporary.is_file():
                with open(temporary, "rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, _blamed(error, path)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary.parent, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, keys sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def check_writable(folder: Path | str) -> None:
    """Make sure, before any work, that files can be written into a folder; make it if it is missing.

    Raises
    ------
    HematoVisionError
        Naming the folder, if they can't.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"\0" * 4096)
    except OSError as error:
        raise explain_os_error(error, folder) from error


def read_json(path: Path | str) -> Any:
    """Read JSON.

    Raises
    ------
    HematoVisionError
        If the file is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise explain_os_error(error, path) from error
    except ValueError as error:
        raise HematoVisionError(f"{path} is not valid JSON ({error})", "remove it and run again") from error


def create_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Create a ``.npy`` file of zeros to be filled through a memory map, its space on the disk taken.

    Writing through a map of a file with holes kills the process (SIGBUS) once the disk is full; here
    a full disk is found before any work. The header comes last: a creation that was killed leaves a
    file that `is_array` refuses.

    Raises
    ------
    HematoVisionError
        If the disk has no room for it or may not be written to; no file is left then.
    """
    kind = np.dtype(dtype)
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    size = math.prod(shape) * kind.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            _take_space(handle, header.tell(), size)
            handle.seek(0)
            handle.write(header.getvalue())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise explain_os_error(error, path) from error


def _take_space(handle: BinaryIO, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle.fileno(), 0, start + size)
        return
    handle.seek(start)
    block = bytes(1 << 20)
    for done in range(0, size, len(block)):
        handle.write(block[: size - done])
    handle.flush()


def is_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether a file is a whole ``.npy`` array of the given shape and type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.dtype(dtype)


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise explain_os_error(error, path) from error


def content_key(*parts: Any) -> str:
    """Return 16 hexadecimal digits that name the given JSON-like values; equal values, equal key."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
