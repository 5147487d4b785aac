"""What a request brings besides words, and what each of its images starts from: pictures, latents, and the noise that is drawn for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ldmrt.beginning import Beginning, resolve as resolve_beginning
from ldmrt.bundle import ModelRecord
from ldmrt.conditioning import Encode, Picture
from ldmrt.inpainting import Inpainting, resolve as resolve_inpainting
from ldmrt.noise import Generators, draw
from ldmrt.request import Job
from ldmrt.samplers.table import SamplerTable


class Start(NamedTuple):
    """What an image starts from.

    Attributes:
        latents: (C, h, w) float32, on the CPU.
        noise: (evaluations, C, h, w), of a sampler that draws some; None for another.
        table: the sampler, which scales latents that are noise, and no others.
        inputs: the denoising network's, besides those that its text and its guidance give.
    """

    latents: torch.Tensor
    noise: torch.Tensor | None
    table: SamplerTable
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Material:
    """What a request brings besides words.

    Attributes:
        model: what the latents are like.
        beginning: where they come from.
        inpainting: the picture that an inpainting model draws into; None for another model.
        latents: (n, C, h, w) float32, given instead of noise.
    """

    model: ModelRecord
    beginning: Beginning
    inpainting: Inpainting | None
    latents: torch.Tensor | None

    def of(self, image: int) -> Material:
        """The part that concerns one image, which counts from 0."""
        begun, part = self.beginning.latents, slice(image, image + 1)
        return replace(
            self,
            beginning=self.beginning if begun is None else replace(self.beginning, latents=begun[part]),
            latents=None if self.latents is None else self.latents[part],
        )

    def starts(self, job: Job, table: SamplerTable, encode: Encode, generator: Generators | None = None) -> list[Start]:
        """What each image of a job starts from.

        Args:
            job: of the request.
            table: its sampler.
            encode: from a picture and the noise of its encoding to latents.
            generator: instead of the job's seeds: one for all images, or one for each.

        Raises:
            BadRequest: the generators or the latents do not fit the images.
        """
        factor = self.model.downscale
        noise = draw(
            job.seeds,
            (self.model.latent_channels, job.height // factor, job.width // factor),
            table,
            generator=generator,
            latents=self.beginning.latents if self.beginning.begun else self.latents,
            encoding=self.inpainting is not None,
            picture=self.beginning.picture is not None,
        )
        latents, table = self.beginning.start(noise, table, encode)
        inputs: list[dict[str, torch.Tensor]] = [{}] * len(latents)
        if self.inpainting is not None and noise.encoding is not None:
            inputs = self.inpainting.conditionings(factor, noise.encoding, encode)
        steps = [None] * len(latents) if noise.steps is None else list(noise.steps)
        return [Start(one, drawn, table, own) for one, drawn, own in zip(latents, steps, inputs, strict=True)]


def resolve(
    model: ModelRecord,
    job: Job,
    *,
    image: Picture | torch.Tensor | None = None,
    mask_image: Picture | None = None,
    latents: torch.Tensor | None = None,
) -> Material:
    """Check what a request brings.

    Args:
        model: of the bundle.
        job: of the request.
        image: see `ldmrt.Pipeline`, as the others.
        mask_image: for an inpainting model.
        latents: instead of noise.

    Raises:
        BadRequest: the model needs what is not there, has no use for what is, or it is no picture.
    """
    inpainting = resolve_inpainting(model, (job.width, job.height), image, mask_image)
    return Material(model, resolve_beginning(model, job, image, latents), inpainting, latents)
