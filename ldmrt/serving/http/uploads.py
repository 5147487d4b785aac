"""What a form brings. Nothing of it is written to a disk, and no name that a client gave is used."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ldmrt.serving.http.errors import HttpError, bad_request
from ldmrt.serving.http.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PARTS = 40


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        values: its fields of text.
        files: the bytes of its files.
    """

    values: dict[str, str]
    files: dict[str, bytes]


async def read_form(request: Request, limits: Limits) -> Form:
    """The form of a request, whose body is here already.

    Raises:
        HttpError: 400 or 415.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HttpError(415, "unsupported_media_type", "send a form: multipart/form-data")
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=2,
        max_fields=_MOST_PARTS,
        max_part_size=limits.json_bytes,
    )
    parser.spool_max_size = limits.form_bytes
    try:
        return await _sorted(await parser.parse())
    except (MultiPartException, KeyError, ValueError):
        message = "the form cannot be read: send one of a few fields, one image, and perhaps a mask"
        raise HttpError(400, "invalid_form", message, headers={"x-should-retry": "false"}) from None
    finally:
        # Not `FormData.close`: a part that has no end is not in there, and its file would be left to the garbage collector.
        for file in parser._files_to_close_on_error:
            file.close()


async def _sorted(data: FormData) -> Form:
    """The parts of a form by their names, each of which may be there once."""
    files: dict[str, bytes] = {}
    values: dict[str, str] = {}
    for sent, value in data.multi_items():
        name = "image" if sent == "image[]" else sent
        if name in values or name in files:
            raise bad_request(f"{name[:64]} is there twice, expected once", name[:64])
        if isinstance(value, UploadFile):
            if name not in ("image", "mask"):
                raise bad_request(f"there is no field {name[:64]!r} for a file", name[:64])
            files[name] = await value.read()
        else:
            values[name] = value
    return Form(values, files)


def open_picture(data: bytes, limits: Limits, *, param: str) -> Image.Image:
    """A picture from bytes, turned as its Exif says. Its size is known before its pixels are read.

    Args:
        data: PNG, JPEG or WebP, of which the first frame is taken.
        limits: has the most pixels.
        param: the field that brought it.

    Raises:
        HttpError: 400.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.upload_pixels:
                message = f"{param} has {width}x{height} pixels, expected at most {limits.upload_pixels} in all"
                raise bad_request(message, param)
            image.load()
            return ImageOps.exif_transpose(image)
    except HttpError:
        raise
    except Exception:  # noqa: BLE001 - Pillow raises anything, in words that may name addresses of memory
        raise bad_request(f"{param} cannot be read as a picture: send PNG, JPEG or WebP", param) from None


def mask_of(picture: Image.Image) -> Image.Image:
    """White where a picture is transparent: where OpenAI's API is to draw anew, and ours."""
    return picture.convert("RGBA").getchannel("A").point([255, *[0] * 255])
