"""What a request brings besides words, and what each of its images starts from: pictures, latents, classes, and the noise that is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ldmrt.beginning import Beginning, resolve as resolve_beginning
from ldmrt.bundle import ModelRecord
from ldmrt.classes import Classes, ClassLabels, resolve as resolve_classes
from ldmrt.conditioning import Encode, Picture
from ldmrt.inpainting import Inpainting, resolve as resolve_inpainting
from ldmrt.layout import Layout, resolve as resolve_layout
from ldmrt.noise import Generators, draw, seeded
from ldmrt.request import Job
from ldmrt.samplers.table import SamplerTable
from ldmrt.segmentation import SemanticMap, resolve as resolve_segmentation
from ldmrt.upscaling import Upscaling, resolve as resolve_upscaling

Tensors = Mapping[str, torch.Tensor]


class Start(NamedTuple):
    """What an image starts from.

    Attributes:
        latents: (C, h, w) float32, on the CPU.
        noise: (evaluations, C, h, w), of a sampler that draws some; None for another.
        table: the sampler, which scales latents that are noise, and no others.
        cond: the denoising network's inputs, besides those that text and guidance give.
        uncond: the same, for what the image is guided away from.
    """

    latents: torch.Tensor
    noise: torch.Tensor | None
    table: SamplerTable
    cond: Tensors
    uncond: Tensors


@dataclass(frozen=True, eq=False)
class Material:
    """What a request brings besides words.

    Attributes:
        model: what the latents are like.
        beginning: where they come from.
        latents: (n, C, h, w) float32, given instead of noise.
        inpainting: the picture that an inpainting model draws into; None for another model.
        upscaling: the picture that an upscaling model draws larger; None for another model.
        classes: what a class-conditional model draws.
        segmentation: the input of a model of semantic maps; empty for another model.
        layout: the input of a model of layouts; empty for another model.
    """

    model: ModelRecord
    beginning: Beginning
    latents: torch.Tensor | None
    inpainting: Inpainting | None
    upscaling: Upscaling | None
    classes: Classes
    segmentation: dict[str, torch.Tensor]
    layout: dict[str, torch.Tensor]

    @property
    def is_encoded(self) -> bool:
        """Whether there is a picture for the VAE's encoder."""
        return self.beginning.picture is not None or self.inpainting is not None

    def of(self, image: int) -> Material:
        """The part that concerns one image, which counts from 0."""
        begun, part = self.beginning.latents, slice(image, image + 1)
        return replace(
            self,
            beginning=self.beginning if begun is None else replace(self.beginning, latents=begun[part]),
            latents=None if self.latents is None else self.latents[part],
            classes=self.classes.of(image),
        )

    def starts(
        self,
        job: Job,
        table: SamplerTable,
        encode: Encode,
        device: torch.device,
        generator: Generators | None = None,
    ) -> list[Start]:
        """What each image of a job starts from.

        Args:
            job: of the request.
            table: its sampler.
            encode: from a picture and the noise of its encoding to latents.
            device: where the engines run.
            generator: instead of the job's seeds: one for all images, or one for each.

        Raises:
            BadRequest: the generators or the latents do not fit the images.
        """
        count, factor = len(job.seeds), self.model.downscale
        generators = seeded(job.seeds, generator)
        shared: Tensors = {name: tensor.to(device) for name, tensor in (self.segmentation | self.layout).items()}
        own: list[Tensors] = [shared] * count
        if self.upscaling is not None:
            own = _joined(own, self.upscaling.conditionings(count, generators, device))
        noise = draw(
            job.seeds,
            (self.model.latent_channels, job.height // factor, job.width // factor),
            table,
            generator=generators,
            latents=self.beginning.latents if self.beginning.begun else self.latents,
            encoding=self.inpainting is not None,
            picture=self.beginning.picture is not None,
            variations=job.variation_seeds,
            variation_strength=job.variation_strength,
        )
        latents, table = self.beginning.start(noise, table, encode)
        if self.inpainting is not None and noise.encoding is not None:
            own = _joined(own, self.inpainting.conditionings(factor, noise.encoding, encode))
        steps = [None] * count if noise.steps is None else list(noise.steps)
        labels = [self.classes.conditionings(number, device) for number in range(count)]
        return [
            Start(one, drawn, table, {**inputs, **label}, {**inputs, **null})
            for one, drawn, inputs, (label, null) in zip(latents, steps, own, labels, strict=True)
        ]


def _joined(inputs: list[Tensors], more: list[dict[str, torch.Tensor]]) -> list[Tensors]:
    return [{**one, **other} for one, other in zip(inputs, more, strict=True)]


def resolve(
    model: ModelRecord,
    job: Job,
    *,
    image: Picture | torch.Tensor | None = None,
    mask_image: Picture | None = None,
    latents: torch.Tensor | None = None,
    noise_level: int | None = None,
    class_labels: ClassLabels | None = None,
    segmentation: SemanticMap | None = None,
    layout: Layout | None = None,
) -> Material:
    """Check what a request brings.

    Args:
        model: of the bundle.
        job: of the request.
        image: see `ldmrt.Pipeline`, as the others.
        mask_image: for an inpainting model.
        latents: instead of noise.
        noise_level: for an upscaling model.
        class_labels: for a class-conditional model.
        segmentation: for a model of semantic maps.
        layout: for a model of layouts.

    Raises:
        BadRequest: the model needs what is not there, has no use for what is, or it is no picture.
    """
    size = (job.width, job.height)
    return Material(
        model=model,
        beginning=resolve_beginning(model, job, image, latents),
        latents=latents,
        inpainting=resolve_inpainting(model, size, image, mask_image),
        upscaling=resolve_upscaling(model, size, image, noise_level),
        classes=resolve_classes(model, job, class_labels),
        segmentation=resolve_segmentation(model, size, segmentation),
        layout=resolve_layout(model, layout),
    )
