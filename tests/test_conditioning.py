"""Pictures from anywhere: each is read as it looks, or refused in one line; no header makes memory of what is not there."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ldmrt.conditioning import MOST_PIXELS, mask, open_picture, read, rgb
from ldmrt.errors import BadRequest
from tests.test_inpainting import half, picture


def pixels(image: Image.Image) -> NDArray[Any]:
    return np.asarray(image.convert("RGB"), dtype=int)


def png(width: int, height: int, *, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A file whose header may say anything."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = [chunk(b"IHDR", header), extra and chunk(b"eXIf", extra), chunk(b"IDAT", zlib.compress(data))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(picture(1, (40, 20)), "PNG", exif=exif)


def translucent() -> Image.Image:
    image = picture(1, (16, 16)).convert("RGBA")
    image.putalpha(half((16, 16)))
    return image


def grey16() -> Image.Image:
    return Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))


def grey_levels() -> NDArray[Any]:
    return np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2)


PALETTE = picture(1, (16, 16)).quantize(8)
FRAMES = [picture(seed, (16, 16)).quantize(64) for seed in (1, 2, 3)]
# What is in the file, what is seen of it, and by how much a lossy format may be off.
GOOD: dict[str, tuple[bytes, NDArray[Any], int]] = {
    "CMYK": (saved(picture(1, (16, 16)).convert("CMYK"), "TIFF"), pixels(picture(1, (16, 16))), 1),
    "CMYK, JPEG": (saved(picture(1, (16, 16)).convert("CMYK"), "JPEG", quality=100), pixels(picture(1, (16, 16))), 12),
    "16 bits": (saved(grey16(), "PNG"), grey_levels(), 0),
    "16 bits, TIFF": (saved(grey16(), "TIFF"), grey_levels(), 0),
    "16 bits, PGM": (b"P5 16 16 65535\n" + np.asarray(grey16()).astype(">u2").tobytes(), grey_levels(), 0),
    "grey": (saved(half((16, 16)), "PNG"), pixels(half((16, 16))), 0),
    "one bit": (saved(half((16, 16)).convert("1"), "PNG"), pixels(half((16, 16))), 0),
    "palette": (saved(PALETTE, "PNG"), pixels(PALETTE), 0),
    "palette with transparency": (saved(PALETTE, "PNG", transparency=bytes([0, 128, 255])), pixels(PALETTE), 0),
    "alpha": (saved(translucent(), "PNG"), pixels(picture(1, (16, 16))), 0),
    "grey and alpha": (saved(translucent().convert("LA"), "PNG"), pixels(picture(1, (16, 16)).convert("L")), 0),
    "animated GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), pixels(FRAMES[0]), 0),
    "animated PNG": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), pixels(FRAMES[0]), 0),
    "animated WebP": (
        saved(FRAMES[0].convert("RGB"), "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        pixels(FRAMES[0]),
        0,
    ),
    "turned by Exif": (rotated(6), np.rot90(pixels(picture(1, (40, 20))), -1), 0),
    "mirrored by Exif": (rotated(2), pixels(picture(1, (40, 20)))[:, ::-1], 0),
    "one pixel": (saved(picture(1, (1, 1)), "PNG"), pixels(picture(1, (1, 1))), 0),
    "a line": (saved(picture(1, (3000, 1)), "PNG"), pixels(picture(1, (3000, 1))), 0),
    "broken Exif": (png(1, 1, data=b"\0\x09\x08\x07", extra=b"MM\0*\0\0\xff\xff"), np.array([[[9, 8, 7]]]), 0),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_seen(name: str, tmp_path: Path) -> None:
    data, expected, off = GOOD[name]
    path = tmp_path / "picture"
    path.write_bytes(data)
    opened = open_picture(path, param="image")
    found = np.asarray(read(opened, param="image"), dtype=int)
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= off
    # And as networks take it, whatever its size.
    tensor = rgb(opened, (24, 8), param="image")
    assert tensor.shape == (3, 8, 24)
    assert 0 <= tensor.min() <= tensor.max() <= 1


WHOLE = saved(picture(1, (64, 64)), "PNG")
PHOTO = saved(picture(1, (64, 64)), "JPEG")
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as a picture"),
    "text": (b"a red circle", "cannot be read as a picture"),
    "cut off": (WHOLE[:-200], "cannot be read as a picture"),
    "cut off, JPEG": (PHOTO[: len(PHOTO) // 2], "cannot be read as a picture"),
    "a wrong checksum": (WHOLE.replace(b"IDAT", b"IDAU", 1), "cannot be read as a picture"),
    "a header that lies": (png(8000, 8000), "cannot be read as a picture"),
    "no width": (png(0, 8), "cannot be read as a picture|has 0x8 pixels"),
    "too large": (png(9000, 9000), f"has 9000x9000 pixels, expected 1 to {MOST_PIXELS}"),
    "a bomb": (png(60000, 60000), "cannot be read as a picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot be read as a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    """In one line that names the file."""
    data, message = BAD[name]
    path = tmp_path / "picture"
    path.write_bytes(data)
    with pytest.raises(BadRequest, match=message) as caught:
        open_picture(path, param="image")
    assert caught.value.param == "image"
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_decoded_of_a_picture_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_image: Image.Image) -> None:
        pytest.fail("there was memory made for its pixels")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    path = tmp_path / "p.png"
    path.write_bytes(png(9000, 9000))
    with pytest.raises(BadRequest, match="has 9000x9000 pixels"):
        open_picture(path, param="image")
    with Image.open(path) as image, pytest.raises(BadRequest, match="has 9000x9000 pixels"):
        read(image, param="image")


def test_a_picture_for_which_there_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(
        BadRequest, match=r"a.png cannot be read as a picture \(it takes more memory than there is\)"
    ) as caught:
        open_picture(tmp_path / "a.png", param="image")
    assert caught.value.param == "image"


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadRequest, match="cannot be read as a picture"):
            open_picture(path, param="mask_image")


MEMORY: dict[str, tuple[Callable[[], Any], str]] = {
    "no pixel": (lambda: Image.new("RGB", (0, 5)), "image has 0x5 pixels"),
    "an array without pixels": (lambda: np.zeros((4, 0, 3), dtype=np.uint8), "image has 0x4 pixels"),
    "floats": (lambda: np.zeros((4, 4, 3)), "image is an array of float64"),
    "one channel": (lambda: np.zeros((4, 4), dtype=np.uint8), r"an array of uint8 \(4, 4\)"),
    "four channels": (lambda: np.zeros((4, 4, 4), dtype=np.uint8), r"an array of uint8 \(4, 4, 4\)"),
    "a path": (lambda: "p.png", "image is str, expected a PIL image"),
    "whole numbers beyond 16 bits": (
        lambda: Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)),
        "greys from 70000 to 70000, expected 8 or 16 bits",
    ),
    "floats in an image": (lambda: Image.new("F", (4, 4), 0.5), "has pixels of mode F, expected 8 or 16 bits"),
    "a file that is cut off": (lambda: Image.open(io.BytesIO(WHOLE[:-200])), "image cannot be decoded"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_what_programs_hand_in(name: str) -> None:
    make, message = MEMORY[name]
    for prepare in (rgb, mask):
        with pytest.raises(BadRequest, match=message) as caught:
            prepare(make(), (8, 8), param="image")
        assert caught.value.param == "image"


def test_a_mask_of_another_size_and_mode() -> None:
    """Nearest to half of white there is an edge; everything else is what it was."""
    for size in ((16, 8), (640, 3), (1000, 1000)):
        for mode in ("L", "1", "RGB", "RGBA", "P"):
            found = mask(half(size).convert(mode), (64, 64), param="mask_image")
            assert found.shape == (1, 64, 64)
            assert (found[..., :31] == 1).all()
            assert (found[..., 33:] == 0).all()
    translucent = Image.new("LA", (4, 4), (255, 0))  # white, wherever it is seen through
    assert mask(translucent, (8, 8), param="mask_image").min() == 1
    assert np.array_equal(
        np.asarray(mask(half(), (64, 64), param="mask_image", blur=0)), np.asarray(mask(half(), (64, 64), param="m"))
    )
