"""The picture that was drawn into, laid over what was drawn: what the mask leaves out is then what it was, to the bit.

The way to latents and back changes every pixel a little, also where nothing was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldmrt.blending import job_mask
from ldmrt.conditioning import Picture, rgb
from ldmrt.errors import BadRequest
from ldmrt.request import Job


@dataclass(frozen=True, eq=False)
class Overlay:
    """What is laid over.

    Attributes:
        picture: (3, H, W) float32 in [-1, 1].
        mask: (1, H, W) float32, 1 where what was drawn is seen, 0 where the picture is, between them a part of both.
    """

    picture: torch.Tensor
    mask: torch.Tensor

    def over(self, images: torch.Tensor) -> torch.Tensor:
        """Drawn pictures (n, 3, H, W) in [-1, 1], of any float type and on any device, with it laid over; float32."""
        picture, mask = self.picture.to(images.device), self.mask.to(images.device)
        return torch.lerp(picture, images.float().clamp(-1, 1), mask)


def resolve(job: Job, image: Picture | torch.Tensor | None, mask_image: Picture | None) -> Overlay | None:
    """The overlay of a request, or None if it asks for none.

    Raises:
        BadRequest: what is to be laid over is no picture.
    """
    if not job.apply_overlay or mask_image is None:
        return None
    if image is None or isinstance(image, torch.Tensor):
        raise BadRequest(
            "apply_overlay gives a picture back where the mask leaves it out, and image is none; give a picture as image, or leave out "
            "apply_overlay",
            param="apply_overlay",
        )
    size = (job.width, job.height)
    return Overlay(rgb(image, size, param="image") * 2 - 1, job_mask(job, mask_image))
