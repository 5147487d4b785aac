"""Pictures that a request brings: read, put into the size that is asked for, and encoded to latents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.rows import run_rows

# Of a picture that is given: 8192 x 8192, which take 192 MiB.
MOST_PIXELS = 1 << 26
# What is opened as a picture. Pillow knows more, of which some run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Picture = Image.Image | NDArray[np.uint8]
# From a picture (3, H, W) and noise (n, C, h, w) to latents (n, C, h, w): see `encode`.
Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def open_picture(path: str | os.PathLike[str], *, param: str) -> Image.Image:
    """A picture from a file, turned as its Exif says.

    Args:
        path: a file. Of several frames the first is taken.
        param: what to name in an error.

    Raises:
        BadRequest: the file is missing, no picture, has too many pixels, or ends before they do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken Exif, and of what is refused next
            with Image.open(Path(path), formats=_FORMATS) as image:
                _check_size(image, os.fspath(path), param)
                return ImageOps.exif_transpose(image)
    except BadRequest:
        raise
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error, param) from error
    except MemoryError as error:  # a small file may ask for much of it
        raise _unreadable(path, "it takes more memory than there is", param) from error


def _unreadable(path: str | os.PathLike[str], why: object, param: str) -> BadRequest:
    return BadRequest(f"{os.fspath(path)} cannot be read as a picture ({why}): expected PNG, JPEG or WebP", param=param)


def rgb(picture: Picture, size: tuple[int, int], *, param: str) -> torch.Tensor:
    """A picture as networks take it, as diffusers prepares one: RGB, resized with Lanczos's filter to the size, without regard to
    its proportions.

    Args:
        picture: a PIL image, or (H, W, 3) uint8.
        size: (width, height) in pixels.
        param: what to name in an error.

    Returns:
        (3, height, width) float32 in [0, 1].

    Raises:
        BadRequest: it is no picture.
    """
    pixels = np.array(_resized(picture, size, param), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 255


def mask(picture: Picture, size: tuple[int, int], *, param: str, blur: float | None = None) -> torch.Tensor:
    """A mask, resized like a picture, then grey; by default as diffusers prepares one, 1 from half of white on, else 0.

    Args:
        picture: as of `rgb`.
        size: (width, height) in pixels.
        param: what to name in an error.
        blur: the radius in pixels of a Gaussian blur, 0 for none, after which greys stay; None for none, and no greys.

    Returns:
        (1, height, width) float32 in [0, 1].

    Raises:
        BadRequest: it is no picture.
    """
    grey = _resized(picture, size, param).convert("L")
    if blur:
        grey = grey.filter(ImageFilter.GaussianBlur(blur))
    values = torch.from_numpy(np.array(grey, dtype=np.float32))[None] / 255
    return (values >= 0.5).float() if blur is None else values


def encode(
    engine: Engine, model: ModelRecord, picture: torch.Tensor, noise: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Latents of a picture, drawn from what the VAE's encoder makes of it (Kingma & Welling 2013, arXiv 1312.6114), scaled as they are
    denoised.

    Args:
        engine: the `encoder`.
        model: has the scaling.
        picture: (3, H, W) float32 in [-1, 1].
        noise: (n, C, h, w) float32, standard normal, for as many draws.
        device: where the engine runs.

    Returns:
        (n, C, h, w) float32, on the device.
    """
    spec = engine.inputs["image"]
    rows = spec.shape[0]
    inputs = {"image": picture[None].to(device=device, dtype=spec.dtype)}
    made = run_rows(engine.run, inputs, rows if isinstance(rows, int) else None)
    mean, variance = made["latent_mean"].float(), made["latent_logvar"].float().exp()
    return (mean + variance.sqrt() * noise.to(device) - model.shift_factor) * model.scaling_factor


def read(picture: Picture, *, param: str) -> Image.Image:
    """A picture as it is, in RGB of 8 bits: 16 bits are rounded, transparency is left out, as in diffusers, of several frames there is one.

    Args:
        picture: a PIL image, or (H, W, 3) uint8.
        param: what to name in an error.

    Raises:
        BadRequest: it is no picture, has no pixel or too many, or cannot be decoded.
    """
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        form = (
            f"an array of {picture.dtype} {picture.shape}"
            if isinstance(picture, np.ndarray)
            else type(picture).__name__
        )
        raise BadRequest(f"{param} is {form}, expected a PIL image or an array of uint8 (H, W, 3)", param=param)
    _check_size(picture, param, param)
    if picture.mode == "F":
        raise BadRequest(f"{param} has pixels of mode F, expected 8 or 16 bits: floats have no white", param=param)
    try:
        if picture.mode.startswith("I"):
            return Image.fromarray(_eight_bits(np.asarray(picture), param)).convert("RGB")
        if picture.mode == "P" and "transparency" in picture.info:  # else Pillow warns
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    except BadRequest:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise BadRequest(
            f"{param} cannot be decoded ({error}), expected a whole picture in RGB, grey or a palette", param=param
        ) from error


def _check_size(picture: Image.Image, name: str, param: str) -> None:
    """Refuse a picture before its pixels are decoded, whose number its header says, and a header may say anything."""
    width, height = picture.size
    if not 0 < width * height <= MOST_PIXELS:
        raise BadRequest(
            f"{name} has {width}x{height} pixels, expected 1 to {MOST_PIXELS}; give it in another size", param=param
        )


def _eight_bits(values: NDArray[Any], param: str) -> NDArray[np.uint8]:
    """Greys of 16 bits in 8."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadRequest(
            f"{param} has greys from {values.min()} to {values.max()}, expected 8 or 16 bits: 0 to 65535", param=param
        )
    return ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)


def _resized(picture: Picture, size: tuple[int, int], param: str) -> Image.Image:
    """A picture in RGB and of a size."""
    return read(picture, param=param).resize(size, Image.Resampling.LANCZOS)
