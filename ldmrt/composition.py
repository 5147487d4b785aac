"""Pictures that are put together of several calls of a pipeline, each of which draws a part as large as the engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ldmrt.conditioning import MOST_PIXELS
from ldmrt.delivery import OutputType, delivered
from ldmrt.errors import BadRequest
from ldmrt.material import Material
from ldmrt.noise import Generators, Noise
from ldmrt.request import Job, Request
from ldmrt.samplers.table import SamplerTable

# Of the steps of samplers that draw it, in float32 half a gibibyte.
_MOST_NOISE = 1 << 27


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


def field(
    material: Material, job: Job, table: SamplerTable, cells: tuple[int, int], generator: Generators | None
) -> Noise:
    """All noise of a job, for pictures larger than its engines draw, of which each call gets its part (`Noise.cut`).

    Args:
        material: of the job.
        job: what is asked of each call.
        table: its sampler.
        cells: height and width of the latents of the whole pictures.
        generator: instead of the job's seeds.

    Raises:
        BadRequest: the pictures or their noise are too many numbers to be held at once; or the generators do not fit the images.
    """
    pixels = job.num_images * math.prod(cells) * material.model.downscale**2
    if pixels > MOST_PIXELS:
        raise BadRequest(
            f"{job.num_images} pictures would have {pixels} pixels, expected at most {MOST_PIXELS} at a time; ask for fewer",
            param="num_images_per_prompt",
        )
    numbers = job.num_images * material.model.latent_channels * math.prod(cells) * table.evaluations
    if table.uses_noise and numbers > _MOST_NOISE:
        raise BadRequest(
            f"{job.sampler} draws noise {table.evaluations} times for all of the picture, {numbers} numbers, expected at most {_MOST_NOISE}; "
            "use a sampler that draws none, such as ddim, or fewer steps",
            param="sampler",
        )
    return material.noise(job, table, cells, generator)


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
