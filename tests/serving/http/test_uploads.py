"""Pictures that clients send: bounded, of three formats, and never a word of Pillow's."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmrt.serving.http import Limits
from ldmrt.serving.http.errors import HttpError
from ldmrt.serving.http.uploads import mask_of, open_picture

LIMITS = Limits(upload_pixels=1000)


def written(form: str, size: tuple[int, int] = (8, 4), mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, "red" if mode == "RGB" else 0).save(out, format=form, **options)
    return out.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG that has a header and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_formats_that_are_read(form: str) -> None:
    assert open_picture(written(form), LIMITS, param="image").size == (8, 4)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_any_mode(mode: str) -> None:
    assert open_picture(written("JPEG", mode=mode), LIMITS, param="image").size == (8, 4)


def test_exif_turns_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(written("JPEG", exif=exif.tobytes()), LIMITS, param="image").size == (4, 8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        written("GIF"),
        written("TIFF"),
        written("BMP"),
        written("JPEG", (30, 30))[:-40],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        claiming(8, 8),
        claiming(9000, 9000),
        claiming(20_000, 20_000),
        claiming(2**31 - 1, 2**31 - 1),
    ],
    ids=["empty", "signature", "gif", "tiff", "bmp", "cut", "svg", "no pixels", "81 MP", "400 MP", "2^62"],
)
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        open_picture(data, LIMITS, param="mask")
    assert (caught.value.status, caught.value.param) == (400, "mask")
    assert "0x7" not in caught.value.message
    assert "BytesIO" not in caught.value.message


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_many_frames_there_is_the_first(form: str) -> None:
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", *["blue", "green"] * 100)]
    out = io.BytesIO()
    frames[0].save(out, format=form, save_all=True, append_images=frames[1:], lossless=True)
    first = np.asarray(open_picture(out.getvalue(), LIMITS, param="image").convert("RGB"))
    assert first[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_png_of_any_mode(mode: str) -> None:
    data = written("PNG", mode=mode)
    assert open_picture(data, LIMITS, param="image").convert("RGB").size == (8, 4)
    assert mask_of(open_picture(data, LIMITS, param="mask")).size == (8, 4)


def test_a_text_that_unpacks_to_more_than_it_may() -> None:
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(64 << 20))
    png = written("PNG")
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    with pytest.raises(HttpError, match="image cannot be read as a picture"):
        open_picture(png[:33] + chunk + png[33:], LIMITS, param="image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_is_refused_or_harmless(form: str) -> None:
    """Each byte wrong, and the file ended at each: Pillow's errors are many, and none of them comes through."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    data = written(form, (12, 8), exif=exif.tobytes())
    refused: list[HttpError] = []
    for position in range(len(data)):
        for damaged in (data[:position], data[:position] + bytes([data[position] ^ 0x81]) + data[position + 1 :]):
            try:
                picture = open_picture(damaged, LIMITS, param="image")
            except HttpError as error:
                refused.append(error)
            else:
                width, height = picture.size
                assert width * height <= LIMITS.upload_pixels
                picture.convert("RGB")
    assert len(refused) > len(data) / 2
    says = (
        r"image (cannot be read as a picture: send PNG, JPEG or WebP|has \d+x\d+ pixels, expected at most 1000 in all)"
    )
    assert all(error.status == 400 and re.fullmatch(says, error.message) for error in refused)


def test_the_limit_of_pixels() -> None:
    assert open_picture(written("PNG", (50, 20)), LIMITS, param="image").size == (50, 20)
    with pytest.raises(HttpError, match="image has 51x20 pixels, expected at most 1000"):
        open_picture(written("PNG", (51, 20)), LIMITS, param="image")


def test_a_mask_is_white_where_nothing_is_left() -> None:
    alpha = np.array([[0, 1, 128, 255]], dtype=np.uint8)
    picture = Image.merge("LA", (Image.new("L", (4, 1)), Image.fromarray(alpha)))
    assert np.asarray(mask_of(picture)).tolist() == [[255, 0, 0, 0]]
    assert np.asarray(mask_of(Image.new("RGB", (2, 1)))).tolist() == [[0, 0]]
