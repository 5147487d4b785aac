"""What a request brings whose model knows nothing of masks: a picture is kept outside of one by blending latents (`ldmrt.kernels.blend`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldmrt.conditioning import Picture, mask
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.request import Job
from ldmrt.slots import Blend


@dataclass(frozen=True, eq=False)
class Blending:
    """What is kept of the picture that is begun from.

    Attributes:
        mask: (1, h, w) float32, a value for each latent cell: 1 for what is drawn anew, 0 for what stays, between them a part of both.
    """

    mask: torch.Tensor

    def blends(self, originals: torch.Tensor, noise: torch.Tensor) -> list[Blend]:
        """What each image keeps.

        Args:
            originals: (n, C, h, w) float32, the picture's latents.
            noise: (n, C, h, w) float32, standard normal: that of the initial latents.
        """
        return [Blend(*one, self.mask) for one in zip(originals, noise, strict=True)]


def resolve(
    model: ModelRecord, job: Job, image: Picture | torch.Tensor | None, mask_image: Picture | None
) -> Blending | None:
    """The mask of a request, or None if there is none or the model is shown it (`ldmrt.inpainting`).

    Raises:
        BadRequest: there is no picture that it could be of, or the model draws none of its own size.
    """
    if mask_image is None or model.inpainting:
        return None
    if model.upscaling is not None:
        raise BadRequest(
            f"mask_image was given, and {model.name} draws a small picture larger, all of it; leave it out",
            param="mask_image",
        )
    if image is None:
        raise BadRequest(
            "image is missing: mask_image says what of it is drawn anew; give both, or leave out mask_image",
            param="image",
        )
    values = job_mask(job, mask_image)
    # As diffusers takes it: the pixel at the corner of each cell.
    return Blending(values[:, :: model.downscale, :: model.downscale].contiguous())


def job_mask(job: Job, mask_image: Picture) -> torch.Tensor:
    """The mask of a job, (1, H, W) float32: see `ldmrt.conditioning.mask`."""
    blur = job.mask_blur if job.soft_mask else None
    return mask(mask_image, (job.width, job.height), param="mask_image", blur=blur)
