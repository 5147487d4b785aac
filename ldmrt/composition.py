"""Pictures that are put together of several calls of a pipeline, each of which draws a part as large as the engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ldmrt.conditioning import MOST_PIXELS
from ldmrt.errors import BadRequest
from ldmrt.pipeline import OutputType, delivered
from ldmrt.request import Job, Request


@dataclass(frozen=True)
class Composition:
    """What the calls made.

    Attributes:
        images: PIL images, or float32 (n, H, W, 3) in [0, 1], by the `output_type`.
        seeds: the seed of each image.
        timings: seconds by stage, of all calls.
        job: what was asked of each.
    """

    images: Any
    seeds: tuple[int, ...]
    timings: dict[str, float]
    job: Job


def request_of(arguments: Mapping[str, Any]) -> Request:
    """The part of a pipeline's arguments that is a request."""
    known = {one.name for one in fields(Request)}
    asked = {name: value for name, value in arguments.items() if name in known}
    return Request(**{"prompt": "", **asked})


def check_size(width: int, height: int) -> None:
    """Refuse what cannot be put together; as float32 the largest picture takes three quarters of a gibibyte meanwhile.

    Raises:
        BadRequest: the picture would be too large.
    """
    if width * height > MOST_PIXELS:
        raise BadRequest(
            f"the picture would have {width}x{height} pixels, expected at most {MOST_PIXELS}; give a smaller one",
            param="image",
        )


def check_output_type(output_type: OutputType) -> None:
    """Refuse latents.

    Raises:
        BadRequest: they are asked for, or something that is none of the ways.
    """
    if output_type not in ("pil", "np"):
        raise BadRequest(
            f"output_type is {output_type!r}, and a picture of several parts has no latents, expected pil or np",
            param="output_type",
        )


def deliver(canvas: torch.Tensor, output_type: OutputType) -> Any:
    """Pictures as they were asked for, of (n, 3, H, W) float32 in [0, 1]."""
    return delivered(canvas * 2 - 1, output_type)


def add(timings: dict[str, float], more: Mapping[str, float]) -> None:
    """Add seconds by stage to others, in place."""
    for stage, seconds in more.items():
        timings[stage] = timings.get(stage, 0.0) + seconds
