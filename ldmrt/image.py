"""Pixels in and out: from the decoder's tensors to files, with the text that says how a picture was made.

That text is the one AUTOMATIC1111's web UI writes and many tools read: the prompt, a line `Negative prompt: ...`, and a
last line of `Key: value` pairs. It goes into PNG as the text chunk `parameters`, into JPEG and WebP as Exif UserComment.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ldmrt.errors import BadRequest, LdmrtError, NumericalError

# By suffix: Pillow's name of the format, and how to write it.
FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
_PNG_KEY = "parameters"
# An Exif UserComment begins with eight bytes that name its encoding (Exif 2.32, section 4.6.5).
_UNICODE = b"UNICODE\0"
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """Turn decoded pictures into bytes: x / 2 + 1/2, clamped to [0, 1], times 255, rounded half to even.

    Computed in float32, whatever the input is, and on the input's device; only bytes leave it.

    Args:
        images: (N, 3, H, W) of any float dtype, in [-1, 1] up to over- and undershoots.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        NumericalError: there is NaN or infinity among the pixels.
    """
    pixels = _unit_range(images).mul_(255).round_().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def to_float(images: torch.Tensor) -> NDArray[np.float32]:
    """As `to_uint8`, without the last two steps: (N, H, W, 3) float32 in [0, 1]."""
    return np.ascontiguousarray(_unit_range(images).permute(0, 2, 3, 1).cpu().numpy())


def to_pil(pixels: NDArray[np.uint8]) -> list[Image.Image]:
    """RGB pictures from (N, H, W, 3) uint8."""
    return [Image.fromarray(picture) for picture in pixels]


def _unit_range(images: torch.Tensor) -> torch.Tensor:
    """A new tensor. In place from there on: most of the time goes into memory that is touched for the first time."""
    images = images.detach().float()
    if not bool(torch.stack(images.aminmax()).isfinite().all()):  # NaN is both the least and the greatest
        bad = int((~images.isfinite()).sum())
        raise NumericalError(
            f"the decoded pictures hold {bad} NaN or infinite values out of {images.numel()}: use a wider dtype for the"
            " decoder (float32 always holds it)"
        )
    return images.mul(0.5).add_(0.5).clamp_(0, 1)


@dataclass(frozen=True)
class Parameters:
    """What `parse_parameters` finds: values are as written, without quotes, but not converted."""

    prompt: str = ""
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def parameters_text(
    prompt: str,
    negative_prompt: str = "",
    *,
    steps: int,
    sampler: str,
    guidance_scale: float,
    seed: int,
    width: int,
    height: int,
    model: str = "",
    extra: Mapping[str, object] | None = None,
) -> str:
    """The text that says how a picture was made, as AUTOMATIC1111's web UI writes it.

    Args:
        prompt: the prompt.
        negative_prompt: left out when empty.
        steps: `Steps`.
        sampler: `Sampler`, as that knows it (`ldmrt.samplers.registry.Choice.title`).
        guidance_scale: `CFG scale`.
        seed: `Seed`, of this picture.
        width: the first half of `Size`, in pixels.
        height: the second half.
        model: `Model`; left out when empty.
        extra: more pairs for the end of the last line.
    """
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": f"{guidance_scale:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
    }
    if model:
        settings["Model"] = model
    settings |= extra or {}
    lines = [prompt] if prompt else []
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def parse_parameters(text: str) -> Parameters:
    """The inverse of `parameters_text`, also for texts that other tools wrote; it never fails.

    White space around prompts is not kept, and a prompt that itself has a line `Negative prompt:` is cut there.
    """
    lines = text.strip().split("\n")
    settings = {key: _unquote(value) for key, value in _PAIR.findall(lines[-1])}
    # A prompt's last line may well hold one colon; three pairs make it the settings.
    if len(settings) >= 3:
        lines.pop()
    else:
        settings = {}
    negative = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    return Parameters(
        prompt="\n".join(lines[:negative]).strip(),
        negative_prompt="\n".join(lines[negative:]).removeprefix(_NEGATIVE).strip(),
        settings=settings,
    )


def _quote(value: str) -> str:
    plain = value == value.strip() and not any(mark in value for mark in ',:\n"')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def save(image: Image.Image | NDArray[np.uint8], path: str | Path, *, parameters: str | None = None) -> None:
    """Write a picture so that `path` holds all of it or is left as it was: to a temporary name, then renamed.

    Args:
        image: a picture, or (H, W, 3) uint8.
        path: its suffix chooses the format: png, jpg, jpeg or webp. The folder must exist.
        parameters: the text to put into the file, see `parameters_text`.

    Raises:
        BadRequest: the suffix is not known, the folder cannot be written, or the text does not fit the format.
        LdmrtError: writing failed, for instance because the disk is full.
    """
    path = Path(path)
    check_writable(path)
    name, options = FORMATS[path.suffix.lower()]
    options = dict(options)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    encoded = io.BytesIO()  # not straight into the file: Pillow's JPEG encoder takes a full disk for success
    try:
        if parameters is not None:
            options |= _metadata(name, parameters)
        picture.save(encoded, format=name, **options)
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"{path}: the picture or its parameters do not fit {name} ({error}): use .png, or a shorter prompt",
            param="out",
        ) from error
    temporary = path.with_name(f".ldmrt-{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(encoded.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LdmrtError(
            f"{path} cannot be written ({error.strerror or error}): make room or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Find out before the work is done that `save` could not write there.

    Raises:
        BadRequest: the suffix is not known, or the folder is missing, not a folder, or not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise BadRequest(f"{path}: unknown picture format {path.suffix!r}, expected one of: {known}", param="out")
    if not path.parent.is_dir():
        what = "is a file" if path.parent.exists() else "does not exist"
        raise BadRequest(f"{path}: the folder {path.parent} {what}: create it or choose another", param="out")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadRequest(f"{path}: no permission to write in {path.parent}: choose another folder", param="out")
    if path.is_dir():
        raise BadRequest(f"{path} is a folder: expected the name of a file", param="out")


def read_parameters(path: str | Path) -> str | None:
    """The text in a picture that says how it was made; None when it has none.

    Raises:
        BadRequest: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.load()  # text chunks may come after the pixels
            text = image.info.get(_PNG_KEY)
            if isinstance(text, str):
                return text
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise BadRequest(f"{path} cannot be read as a picture ({error}): expected PNG, JPEG or WebP") from error
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", errors="replace")
    return None


def _metadata(name: str, parameters: str) -> dict[str, object]:
    if name == "PNG":
        chunks = PngInfo()
        # Becomes an iTXt chunk by itself where Latin-1, all that tEXt may hold, is not enough.
        chunks.add_text(_PNG_KEY, parameters)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {int(ExifTags.Base.UserComment): _UNICODE + parameters.encode("utf-16-be")}
    return {"exif": exif.tobytes()}
