"""Safe decoding: any common picture to one uint8 RGB array, or one clear line why not.

The header is read and judged before a pixel is decoded, so a decompression bomb costs nothing, and
a picture is either decoded whole or refused: half a picture would be classified as if it were one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hematovision.errors import ImageError
from hematovision.files import explain_os_error
from hematovision.vision.field import RGB

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
"""Pillow's names of the formats that are read. Everything else (PostScript, icons, video stills) is
refused: what no microscope writes is only a way in for hostile files."""

MAX_PIXELS = 50_000_000
"""Default limit, in pixels: 7000 x 7000, above any camera on a microscope, 150 MB decoded."""

MIN_SIDE = 16
"""Shortest side in pixels that can still hold a recognisable cell."""

_ORIENTATION_TAG = 0x0112  # EXIF and TIFF
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ZEROS = 16  # bytes; a JPEG's own data hardly ever holds as many zeros in a row
_CUT_SHORT = re.compile(r"truncat|end of file|eof|premature|unexpected end|not enough|ended", re.IGNORECASE)


@dataclass(frozen=True)
class ImageInfo:
    """What an audit wants to know of a file.

    Attributes
    ----------
    width, height : int
        In pixels after EXIF orientation; 0 unless ``status`` is ``"ok"``.
    status : {"ok", "unreadable", "truncated"}
    reason : str
        The one line that `read_image` would raise; ``""`` if ok.
    """

    width: int
    height: int
    status: Literal["ok", "unreadable", "truncated"]
    reason: str = ""


class _TruncatedError(ImageError):
    """An image whose file ends before its pixels do."""


def read_image(source: Path | str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> RGB:
    """Decode a picture.

    Orientation from EXIF is applied, a colour profile is converted to sRGB, transparency is laid on
    white, of an animation the first frame is taken. Samples of more than 8 bits are scaled by the
    range they were recorded in: the smallest of 8, 10, 12, 14 and 16 bits that holds the largest
    value, since cameras store 10 to 14 bits in 16 and a smear's background is near white. The file's
    extension is not looked at.

    Parameters
    ----------
    source : Path, str or bytes
        A file's path, or its content.
    name : str, optional
        What messages call it; by default the path, or ``"the image"``.
    max_pixels : int
        Larger pictures are refused before decoding.

    Returns
    -------
    uint8 array of shape (height, width, 3)
        sRGB, contiguous and writeable.

    Raises
    ------
    ImageError
        If there is no such file, it is empty, a folder, cut short, damaged, of an unknown format,
        of more than `max_pixels`, or less than `MIN_SIDE` pixels wide or high.
    """
    with _opened(source, name) as (file, called), _quiet_pillow(), _refusing(called):
        image = _open_header(file, called, max_pixels)
        return _to_rgb(image, called)


def probe_image(
    path: Path | str | bytes, *, verify: bool = True, max_pixels: int = MAX_PIXELS, name: str = ""
) -> ImageInfo:
    """Tell an image's size and whether it decodes, without raising.

    Parameters
    ----------
    path : Path, str or bytes
        A file's path, or its content.
    verify : bool
        Whether to decode all of it. ``False`` reads the header only (some 20 times faster) and
        therefore misses files that are cut short.
    max_pixels, name
        As for `read_image`.
    """
    try:
        with _opened(path, name) as (file, called), _quiet_pillow(), _refusing(called):
            image = _open_header(file, called, max_pixels)
            if verify:
                height, width = _to_rgb(image, called).shape[:2]
            else:
                width, height = image.size
                if image.format != "TIFF" and _orientation(image) in _SIDEWAYS:
                    width, height = height, width
    except ImageError as error:
        return ImageInfo(
            0, 0, "truncated" if isinstance(error, _TruncatedError) else "unreadable", str(error)
        )
    return ImageInfo(width, height, "ok")


def encode_png(rgb: RGB) -> bytes:
    """Return the picture as PNG: lossless, the same bytes for the same pixels."""
    return _encode(rgb, "PNG", compress_level=6)


def encode_jpeg(rgb: RGB, quality: int = 95) -> bytes:
    """Return the picture as baseline JPEG without colour subsampling.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
    quality : int
        1 to 100. Colour is kept at full resolution because granules differ by colour alone.
    """
    return _encode(rgb, "JPEG", quality=quality, subsampling=0)


def _encode(rgb: RGB, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(buffer, format=kind, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def _opened(source: Path | str | bytes, name: str) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a readable binary file and what to call it in messages."""
    if isinstance(source, bytes):
        called = name or "the image"
        if not source:
            raise ImageError(f"{called} is empty (0 bytes)", "send the image again")
        yield io.BytesIO(source), called
        return
    called = name or str(source)
    with contextlib.ExitStack() as stack:
        try:
            status = os.stat(source)
            if stat.S_ISDIR(status.st_mode):
                raise ImageError(f"{called} is a folder, not an image", "name a file in it")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{called} is not a regular file", "name an image file")
            if status.st_size == 0:
                raise ImageError(f"{called} is empty (0 bytes)", "copy or download it again")
            file = stack.enter_context(open(source, "rb"))
        except FileNotFoundError as error:
            raise ImageError(f"{called} does not exist", "check the path") from error
        except OSError as error:
            raise ImageError(f"{called} cannot be opened", explain_os_error(error, source).remedy) from error
        except ValueError as error:  # a null byte in the path
            raise ImageError(f"{called!r} is not a path", "check the path") from error
        yield file, called


@contextlib.contextmanager
def _refusing(called: str) -> Iterator[None]:
    """Turn whatever a hostile file makes Pillow raise into one line."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{called} does not fit in memory", "scale it down") from error
    # Broad on purpose: damaged files make the decoders raise OSError, SyntaxError, ValueError,
    # struct.error, TypeError, KeyError and more.
    except Exception as error:
        if _CUT_SHORT.search(str(error)) or isinstance(error, EOFError):
            raise _TruncatedError(
                f"{called} is cut short or damaged, its pixels are not complete", "copy or download it again"
            ) from error
        raise ImageError(f"{called} is damaged and cannot be decoded", "copy or download it again") from error


def _open_header(file: IO[bytes], called: str, max_pixels: int) -> Image.Image:
    """Read the header alone and refuse what must not be decoded."""
    too_large = f"{called} holds more than {max_pixels:,} pixels"
    remedy = "scale it down or cut a part out of it"
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{called} is not an image of a known format", f"convert it to one of {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(too_large, remedy) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{too_large} ({width} x {height})", remedy)
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{called} is only {width} x {height} pixels", f"a cell needs at least {MIN_SIDE} a side"
        )
    if image.format in ("JPEG", "MPO"):
        _refuse_unwritten_tail(file, called)
    return image


def _refuse_unwritten_tail(file: IO[bytes], called: str) -> None:
    """Refuse a JPEG that ends in zeros in place of its end marker.

    So end files whose space was reserved but never filled (a download or copy that was broken off):
    the decoder takes the zeros for grey blocks. Elsewhere the decoders notice by themselves.
    """
    place = file.tell()
    try:
        file.seek(-_ZEROS, io.SEEK_END)
        if file.read() != bytes(_ZEROS):
            return
        file.seek(0)
        content = file.read().rstrip(b"\0")
    finally:
        file.seek(place)
    if content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):  # end of image, start of scan
        raise _TruncatedError(
            f"{called} is cut short, its end was never written", "copy or download it again"
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where EXIF is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF is decoration: damage to it must not lose the picture
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image, called: str) -> RGB:
    """Decode all pixels and convert them to sRGB, upright."""
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _scale_by_range(np.asarray(image), called)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = _on_white(image)
    image = _to_srgb(image)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> Image.Image:
    """Lay a picture with transparency on white, keeping its colour profile."""
    if image.mode == "La":  # Pillow converts premultiplied grey to LA alone
        image = image.convert("LA")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, layer).convert("RGB")
    if image.mode not in ("LA", "La"):  # a grey profile does not fit RGB pixels
        flat.info["icc_profile"] = image.info.get("icc_profile")
    return flat


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an embedded colour profile, or CIELAB pixels, to sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        converted = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB")
        return image if converted is None else converted
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "CMYK", "L"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image  # converting would only add rounding
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image  # a damaged or foreign profile must not lose the picture


def _scale_by_range(values: NDArray[Any], called: str) -> NDArray[np.uint8]:
    """Scale integer or float samples to 0..255 by the range they were recorded in."""
    samples = values.astype(np.float64)
    if not np.isfinite(samples).all():
        raise ImageError(f"{called} holds samples that are not numbers", "export it again")
    low, high = float(samples.min()), float(samples.max())
    if low < 0 or high > 65535:
        # no camera's range: all that is known is the range that is there
        samples = (samples - low) / max(high - low, 1e-12) * 255
    elif values.dtype.kind == "f" and high <= 1:
        samples = samples * 255
    else:
        full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high <= 2**bits - 1)
        samples = samples / full * 255
    return np.rint(samples).astype(np.uint8)


_quiet_lock = threading.Lock()
_quiet_users = 0
_QUIET_MODULE = r"PIL\."


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's own warnings while any thread is decoding, and no longer.

    ``warnings.catch_warnings`` saves and restores the whole state of the process, which two
    threads undo for each other; here one narrow filter is added by the first and removed by the last.
    """
    global _quiet_users
    with _quiet_lock:
        _quiet_users += 1
        if _quiet_users == 1:
            warnings.filterwarnings("ignore", module=_QUIET_MODULE)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                kept = [f for f in warnings.filters if not _is_quiet_filter(f)]
                warnings.filters[:] = kept  # type: ignore[index]


def _is_quiet_filter(entry: tuple[Any, ...]) -> bool:
    return entry[0] == "ignore" and getattr(entry[3], "pattern", None) == _QUIET_MODULE
