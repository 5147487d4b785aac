"""What denoising begins from: noise, a picture and noise, or latents that another model has begun."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ldmrt.conditioning import Encode, Picture, rgb
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.noise import Noise
from ldmrt.request import Job
from ldmrt.samplers.table import SamplerTable


@dataclass(frozen=True, eq=False)
class Beginning:
    """Where the latents of a call come from; without either, from noise alone.

    Attributes:
        picture: (3, H, W) float32 in [-1, 1], which is encoded and gets the noise of its first step (Meng et al. 2021, arXiv 2108.01073).
        latents: (n, C, h, w) float32: a picture that is encoded already, or, if `begun`, what another model has denoised so far.
        begun: whether the latents are taken as they are.
        covered: whether the picture or the latents are only there to be kept in part, and all that is drawn begins from noise.
    """

    picture: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    begun: bool = False
    covered: bool = False

    def originals(self, noise: Noise, encode: Encode) -> torch.Tensor | None:
        """The latents of the picture, (n, C, h, w) float32 on the CPU; None without one.

        Args:
            noise: see `ldmrt.noise.draw`.
            encode: from a picture and the noise of its encoding to latents.
        """
        if self.picture is not None and noise.picture is not None:
            return encode(self.picture, noise.picture).cpu()
        return self.latents

    def start(
        self, originals: torch.Tensor | None, noise: Noise, table: SamplerTable
    ) -> tuple[torch.Tensor, SamplerTable]:
        """The initial latents and the table that goes with them: it scales those that are noise, and no others.

        Args:
            originals: as `originals` gives them.
            noise: see `ldmrt.noise.draw`.
            table: the sampler.

        Returns:
            (n, C, h, w) float32 on the CPU, and the table.
        """
        if originals is None or self.covered:
            return noise.start, table
        of_picture, of_noise = (1.0, 0.0) if self.begun else table.levels[0].tolist()
        return of_picture * originals + of_noise * noise.start, replace(table, initial_noise_scale=1.0)


def resolve(
    model: ModelRecord,
    job: Job,
    image: Picture | torch.Tensor | None,
    latents: torch.Tensor | None,
    *,
    keeps: bool = False,
) -> Beginning:
    """What a request begins from.

    Args:
        model: of the bundle.
        job: what was asked.
        image: a picture, or latents (n, C, h, w) or (1, C, h, w) in its place.
        latents: what was given instead of noise.
        keeps: whether a part of the picture is kept (`ldmrt.blending`).

    Raises:
        BadRequest: the image is none; or latents do not fit, or there is a picture where only latents do.
    """
    if model.upscaling is not None:
        if job.span.strength != 1:
            raise BadRequest(
                f"strength is {job.span.strength:g}, and {model.name} draws a small picture larger, from noise; leave it out",
                param="strength",
            )
        return Beginning()
    begun = job.span.denoising_start > 0
    whole = job.span.strength == 1 and not begun
    if image is None or (model.inpainting and whole):
        return Beginning()
    if begun and latents is not None:
        raise BadRequest(
            "latents stands for noise, and with denoising_start there is none to begin from; give the other model's latents as image",
            param="latents",
        )
    if isinstance(image, torch.Tensor):
        return Beginning(latents=_latents(model, job, image), begun=begun, covered=keeps and whole)
    if begun:
        raise BadRequest(
            "denoising_start goes with the latents of another model, and image is a picture; give strength for a picture",
            param="denoising_start",
        )
    picture = rgb(image, (job.width, job.height), param="image") * 2 - 1
    return Beginning(picture=picture, covered=keeps and whole)


def _latents(model: ModelRecord, job: Job, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the place of a picture, one for each image."""
    shape = (model.latent_channels, job.height // model.downscale, job.width // model.downscale)
    if tuple(latents.shape) not in ((job.num_images, *shape), (1, *shape)):
        raise BadRequest(
            f"image is latents of shape {tuple(latents.shape)}, expected {(job.num_images, *shape)}: a size of this bundle, and as many as "
            "images",
            param="image",
        )
    return latents.detach().to("cpu", torch.float32).expand(job.num_images, *shape)
