"""How pictures, errors and facts look on their way between two processes: as pixels, and as fields of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from ldmrt import errors
from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.request import Defaults
from ldmrt.serving.channel import ChannelError
from ldmrt.serving.engine import Facts


def packed(picture: Image.Image) -> bytes:
    """The pixels of an RGB picture."""
    return picture.convert("RGB").tobytes()


def unpacked(pixels: bytes, size: Sequence[int]) -> Image.Image:
    """The inverse.

    Raises:
        ChannelError: there are more pixels or fewer.
    """
    width, height = (int(side) for side in size)
    if len(pixels) != width * height * 3:
        raise ChannelError(f"{len(pixels)} bytes are no picture of {width}x{height}")
    return Image.frombytes("RGB", (width, height), pixels)


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error; what is none of ours goes as an `LdmrtError`."""
    kind = type(error).__name__ if isinstance(error, LdmrtError) else "LdmrtError"
    return {"type": kind, "message": str(error), "param": getattr(error, "param", None)}


def error_of(fields: dict[str, Any]) -> LdmrtError:
    """The inverse. `Overloaded` is one side's own affair, and comes as an `LdmrtError`."""
    kind = getattr(errors, fields["type"], LdmrtError)
    if kind is BadRequest:
        return BadRequest(fields["message"], param=fields["param"])
    known = isinstance(kind, type) and issubclass(kind, LdmrtError) and kind is not errors.Overloaded
    return (kind if known else LdmrtError)(fields["message"])


def facts_fields(facts: Facts) -> dict[str, Any]:
    """What a model draws."""
    return asdict(facts)


def facts_of(fields: dict[str, Any]) -> Facts:
    """The inverse."""
    defaults = fields["defaults"]
    sizes = tuple((width, height) for width, height in defaults["sizes"])
    return Facts(**{**fields, "defaults": Defaults(**{**defaults, "sizes": sizes})})
