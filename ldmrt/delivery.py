"""The ways in which pictures are handed out."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from ldmrt import image as pixels
from ldmrt.errors import BadRequest

OutputType = Literal["pil", "np", "latent"]


def check_output_type(output_type: object) -> None:
    """Check how pictures are to be delivered.

    Raises:
        BadRequest: it is none of the ways.
    """
    if output_type not in get_args(OutputType):
        raise BadRequest(f"output_type is {output_type!r}, expected pil, np or latent", param="output_type")


def delivered(images: torch.Tensor, output_type: OutputType) -> Any:
    """Pictures as they were asked for."""
    return pixels.to_float(images) if output_type == "np" else pixels.to_pil(pixels.to_uint8(images))
