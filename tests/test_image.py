"""Hostile and odd images: each decodes properly or is refused in one line."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from hematovision.errors import ImageError
from hematovision.vision.image import encode_jpeg, encode_png, probe_image, read_image


def picture(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """Return a smooth picture whose four corners differ, so that every orientation is told."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([40 + 3 * x, 50 + 4 * y, 220 - 2 * x - y], axis=2).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def declared_png(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def refusal(source: Path | bytes, **options: object) -> str:
    """Return the message of the refusal, after checking that it is one line with a remedy."""
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    rgb = picture()
    assert np.array_equal(read_image(encoded(Image.fromarray(rgb), kind)), rgb)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    rgb = picture()
    options = {"quality": 95} if kind != "GIF" else {}
    back = read_image(encoded(Image.fromarray(rgb), kind, **options))
    # quality 95 and a palette of 256 both stay within a few levels in the mean on a smooth picture
    assert np.abs(back.astype(int) - rgb).mean() < 6


def test_result_is_contiguous_writeable_uint8() -> None:
    back = read_image(encode_png(picture()))
    back[0, 0] = 0
    assert back.dtype == np.uint8
    assert back.flags["C_CONTIGUOUS"]
    assert back.shape == (40, 60, 3)


def test_wrong_extension_is_fine_when_the_content_decodes(tmp_path: Path) -> None:
    path = tmp_path / "cell.jpg"
    path.write_bytes(encode_png(picture()))
    assert np.array_equal(read_image(path), picture())
    assert np.array_equal(read_image(str(path)), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = picture()
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    data = encoded(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    back = read_image(data)
    assert back.shape == upright.shape
    assert np.abs(back.astype(int) - upright).mean() < 6  # JPEG and WebP at quality 95
    for verify in (True, False):
        info = probe_image(data, verify=verify)
        assert (info.width, info.height, info.status) == (60, 40, "ok")


def test_cmyk_is_converted() -> None:
    rgb = np.full((32, 32, 3), (200, 120, 60), np.uint8)
    for kind in ("TIFF", "JPEG"):
        back = read_image(encoded(Image.fromarray(rgb).convert("CMYK"), kind))
        assert np.abs(back.astype(int) - rgb).max() <= 4  # JPEG's rounding of a flat colour


def test_grey_palette_and_one_bit_are_converted() -> None:
    image = Image.fromarray(picture())
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(read_image(encoded(image.convert("L"), "PNG")), np.repeat(grey[..., None], 3, 2))
    palette = image.quantize(64)
    assert np.array_equal(read_image(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = np.zeros((32, 32), bool)
    bits[:, 16:] = True
    assert read_image(encoded(Image.fromarray(bits), "PNG"))[0, [0, 31], 0].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new(mode, (32, 32), (0,) * (len(mode) - 1) + (0,))
    image.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 16, 32))
    back = read_image(encoded(image, "PNG"))
    assert back[0, 0].tolist() == [0, 0, 0]
    assert back[0, 31].tolist() == [255, 255, 255]


def test_half_transparency_is_blended() -> None:
    back = read_image(encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 128)), "PNG"))
    assert abs(int(back[0, 0, 0]) - 127) <= 1


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, 16, 32))
    for kind in ("PNG", "GIF"):
        back = read_image(encoded(image, kind, transparency=1))
        assert back[0, 0].tolist() == [10, 20, 30]
        assert back[0, 31].tolist() == [255, 255, 255]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_image(data)[16, 16].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_more_than_eight_bits_are_scaled_by_their_range(kind: str, bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16)
    back = read_image(encoded(Image.fromarray(np.tile(ramp, (32, 1))), kind))[0, :, 0]
    assert np.array_equal(back, np.rint(ramp / (2**bits - 1) * 255).astype(np.uint8))


def test_sixteen_bit_pgm_is_scaled() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).round().astype(">u2"), (32, 1))
    back = read_image(b"P5\n64 32\n65535\n" + ramp.tobytes())[0, :, 0]
    assert back[0] == 0
    assert back[-1] == 255
    assert abs(int(back[32]) - 129) <= 1  # the middle of the ramp


@pytest.mark.parametrize("top", [1.0, 255.0, 5e6])
def test_float_samples_are_scaled_by_their_range(top: float) -> None:
    ramp = np.tile(np.linspace(0, top, 64, dtype=np.float32), (32, 1))
    back = read_image(encoded(Image.fromarray(ramp), "TIFF"))[0, :, 0]
    assert np.array_equal(back, np.rint(np.linspace(0, 255, 64)).astype(np.uint8))


def test_negative_samples_are_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(-500, 500, 64).astype(np.int32), (32, 1))
    back = read_image(encoded(Image.fromarray(ramp), "TIFF"))[0, :, 0]
    assert (back[0], back[-1]) == (0, 255)


def test_samples_that_are_not_numbers_are_refused() -> None:
    values = np.full((32, 32), 0.5, np.float32)
    values[3, 3] = np.nan
    assert "not numbers" in refusal(encoded(Image.fromarray(values), "TIFF"))


def test_a_colour_profile_is_converted_and_a_damaged_one_ignored() -> None:
    rgb = np.full((32, 32, 3), (200, 120, 60), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_image(encoded(Image.fromarray(rgb), "PNG", icc_profile=srgb)), rgb)
    assert np.array_equal(read_image(encoded(Image.fromarray(rgb), "PNG", icc_profile=b"no profile")), rgb)


def test_cielab_is_converted() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (32, 32), (200, 120, 60)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    back = read_image(encoded(lab, "TIFF"))
    assert np.abs(back[0, 0].astype(int) - (200, 120, 60)).max() <= 3  # 8-bit CIELAB is coarse


def test_missing_file_folder_and_null_byte(tmp_path: Path) -> None:
    assert "missing.png does not exist" in refusal(tmp_path / "missing.png")
    assert "is a folder" in refusal(tmp_path)
    refusal(Path("a\0b.png"))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refusal(tmp_path / "pipe.png")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(encode_png(picture()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "permission" in refusal(path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "is empty" in refusal(path)
    assert "is empty" in refusal(b"")


@pytest.mark.parametrize(
    "content",
    [b"just text\n" * 50, b"\0" * 500, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg></svg>", b"\xff\xd8\xff"],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    assert "notes.jpg" in refusal(path)
    assert probe_image(path).status in ("unreadable", "truncated")


def test_a_format_off_the_list_is_refused() -> None:
    assert "known format" in refusal(encoded(Image.fromarray(picture()), "ICO"), name="icon.ico")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_short_anywhere_is_refused(kind: str, compressed: bool) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    options: dict[str, object] = {}
    if compressed:
        options = {"JPEG": {"progressive": True}, "TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    data = encoded(Image.fromarray(rgb), kind, **options)
    # trailers without pixels (PNG's last chunk, a GIF's end byte, TIFF's tags) may be missing
    for share in (0.01, 0.05, 0.3, 0.6, 0.9):
        part = data[: max(1, int(len(data) * share))]
        refusal(part)
        assert probe_image(part).status in ("truncated", "unreadable"), share
    assert read_image(data).shape == (64, 64, 3)


def test_a_jpeg_whose_tail_was_never_written_is_refused() -> None:
    data = encode_jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    half = len(data) // 2
    refusal(data[:half] + b"\0" * (len(data) - half))


def test_truncated_is_told_from_unreadable() -> None:
    data = encode_jpeg(picture(64, 64))
    assert probe_image(data[:-200]).status == "truncated"
    assert probe_image(b"text" * 100).status == "unreadable"
    assert probe_image(data).status == "ok"
    cut = probe_image(data[:-200], verify=False)
    assert (cut.status, cut.width, cut.height) == ("ok", 64, 64)


def test_probe_names_the_file_and_gives_no_size_for_what_does_not_decode(tmp_path: Path) -> None:
    info = probe_image(tmp_path / "gone.png")
    assert (info.width, info.height, info.status) == (0, 0, "unreadable")
    assert "gone.png" in info.reason


@pytest.mark.parametrize("side", [8_000, 12_000, 30_000, 2**31 - 1])
def test_a_huge_picture_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "pixels" in refusal(declared_png(side, side), name="bomb.png")
        assert probe_image(declared_png(side, side), verify=False).status == "unreadable"


def test_the_limit_of_pixels_can_be_set() -> None:
    data = encode_png(picture(40, 60))
    assert read_image(data, max_pixels=2400).shape == (40, 60, 3)
    assert "60 x 40" in refusal(data, max_pixels=2399)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_a_tiny_picture_is_refused(size: tuple[int, int]) -> None:
    assert f"{size[0]} x {size[1]}" in refusal(encoded(Image.new("RGB", size), "PNG"))


def test_every_message_names_the_file() -> None:
    assert refusal(b"text", name="upload 7").startswith("upload 7 ")


def test_no_warning_leaks_and_no_global_state_changes() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([10, 20, 30] * 4)
    data = encoded(image, "PNG", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        read_image(data)
        probe_image(declared_png(10_000, 10_000))
        assert warnings.filters == before
    assert not caught
    assert Image.MAX_IMAGE_PIXELS == 89478485  # Pillow's own default


def test_threads_do_not_disturb_each_other() -> None:
    pictures = [picture(40 + i, 60) for i in range(8)]
    data = [encode_png(p) for p in pictures]
    before = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        back = list(pool.map(read_image, data * 20))
    assert all(np.array_equal(b, pictures[i % 8]) for i, b in enumerate(back))
    assert warnings.filters == before


def test_random_damage_is_refused_or_decoded_never_a_traceback() -> None:
    rng = np.random.default_rng(1)
    originals = [
        encoded(Image.fromarray(picture()), kind)
        for kind in ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
    ]
    for data in originals:
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 6):
                damaged[place] = rng.integers(0, 256)
            try:
                back = read_image(bytes(damaged))
            except ImageError:
                continue
            assert back.dtype == np.uint8
            assert back.ndim == 3


def test_encoding_is_deterministic_and_reads_back() -> None:
    rgb = picture()
    assert encode_png(rgb) == encode_png(rgb)
    assert np.array_equal(read_image(encode_png(rgb)), rgb)
    assert np.abs(read_image(encode_jpeg(rgb, 95)).astype(int) - rgb).mean() < 2  # nearly lossless


@pytest.mark.data
def test_real_images_decode(real_data: Path) -> None:
    paths = sorted((real_data / "blood-cells").rglob("BloodImage_*.jpg"))[:20]
    assert paths
    for path in paths:
        assert read_image(path).shape == (480, 640, 3)
        assert probe_image(path, verify=False).status == "ok"
