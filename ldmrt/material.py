"""What a request brings besides words, and what each of its images starts from: pictures, latents, classes, and the noise that is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict, Unpack

import torch

from ldmrt.beginning import Beginning, resolve as resolve_beginning
from ldmrt.blending import Blending, resolve as resolve_blending
from ldmrt.classes import Classes, ClassLabels, resolve as resolve_classes
from ldmrt.conditioning import Encode, Picture
from ldmrt.errors import BadRequest
from ldmrt.inpainting import Inpainting, resolve as resolve_inpainting
from ldmrt.layout import Layout, resolve as resolve_layout
from ldmrt.manifest import ModelRecord
from ldmrt.noise import Generators, Noise, draw
from ldmrt.overlay import Overlay, resolve as resolve_overlay
from ldmrt.request import Job
from ldmrt.samplers.table import SamplerTable
from ldmrt.segmentation import SemanticMap, resolve as resolve_segmentation
from ldmrt.slots import Blend
from ldmrt.upscaling import Upscaling, resolve as resolve_upscaling

Tensors = Mapping[str, torch.Tensor]


class Brought(TypedDict, total=False):
    """What a caller may bring besides a request's words and numbers; `ldmrt.Pipeline` says what each is.

    Attributes:
        image: the picture to begin from, to draw into or to draw larger, or its latents.
        mask_image: what of the picture is drawn anew.
        noise_level: for an upscaling model.
        class_labels: for a class-conditional model.
        segmentation: for a model of semantic maps.
        layout: for a model of layouts.
    """

    image: Picture | torch.Tensor | None
    mask_image: Picture | None
    noise_level: int | None
    class_labels: ClassLabels | None
    segmentation: SemanticMap | None
    layout: Layout | None


class Start(NamedTuple):
    """What an image starts from.

    Attributes:
        latents: (C, h, w) float32, on the CPU.
        noise: (evaluations, C, h, w), of a sampler that draws some; None for another.
        table: the sampler, which scales latents that are noise, and no others.
        cond: the denoising network's inputs, besides those that text and guidance give.
        uncond: the same, for what the image is guided away from.
        blend: what is kept of a picture at every step; None for nothing.
    """

    latents: torch.Tensor
    noise: torch.Tensor | None
    table: SamplerTable
    cond: Tensors
    uncond: Tensors
    blend: Blend | None = None


@dataclass(frozen=True, eq=False)
class Material:
    """What a request brings besides words.

    Attributes:
        model: what the latents are like.
        beginning: where they come from.
        latents: (n, C, h, w) float32, given instead of noise.
        blending: what of it another model than one for inpainting leaves as it is; None for nothing.
        inpainting: the picture that an inpainting model draws into; None for another model.
        upscaling: the picture that an upscaling model draws larger; None for another model.
        classes: what a class-conditional model draws.
        segmentation: the input of a model of semantic maps; empty for another model.
        layout: the input of a model of layouts; empty for another model.
        overlay: what is laid over the pictures when they are drawn; None for nothing.
    """

    model: ModelRecord
    beginning: Beginning
    latents: torch.Tensor | None
    blending: Blending | None
    inpainting: Inpainting | None
    upscaling: Upscaling | None
    classes: Classes
    segmentation: Tensors
    layout: Tensors
    overlay: Overlay | None

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
        noise: Noise | None = None,
    ) -> list[Start]:
        """What each image of a job starts from.

        Args:
            job: of the request.
            table: its sampler.
            encode: from a picture and the noise of its encoding to latents.
            device: where the engines run.
            generator: instead of the job's seeds: one for all images, or one for each.
            noise: instead of drawing any.

        Raises:
            BadRequest: the generators, the latents or the noise do not fit the images.
        """
        count, factor = len(job.seeds), self.model.downscale
        cells = job.height // factor, job.width // factor
        if noise is None:
            noise = self.noise(job, table, cells, generator)
        else:
            self._check(noise, (count, self.model.latent_channels, *cells), table)
        shared: Tensors = {name: tensor.to(device) for name, tensor in {**self.segmentation, **self.layout}.items()}
        own: list[Tensors] = [shared] * count
        if self.upscaling is not None:
            own = _joined(own, self.upscaling.conditionings(count, noise.low_res, device))
        originals = self.beginning.originals(noise, encode)
        latents, table = self.beginning.start(originals, noise, table)
        blends: Sequence[Blend | None] = [None] * count
        if self.blending is not None and originals is not None:
            blends = self.blending.blends(originals, noise.start)
        if self.inpainting is not None and noise.encoding is not None:
            own = _joined(own, self.inpainting.conditionings(factor, noise.encoding, encode))
        steps = [None] * count if noise.steps is None else list(noise.steps)
        labels = [self.classes.conditionings(number, device) for number in range(count)]
        return [
            Start(one, drawn, table, {**inputs, **label}, {**inputs, **null}, blend)
            for one, drawn, inputs, (label, null), blend in zip(latents, steps, own, labels, blends, strict=True)
        ]

    def noise(
        self, job: Job, table: SamplerTable, cells: tuple[int, int], generator: Generators | None = None
    ) -> Noise:
        """What is drawn for a job.

        Args:
            job: of the request.
            table: its sampler.
            cells: height and width of the latents: the job's, or those of a larger picture of which it draws a part.
            generator: instead of the job's seeds: one for all images, or one for each.

        Raises:
            BadRequest: the generators or the latents do not fit the images.
        """
        return draw(
            job.seeds,
            (self.model.latent_channels, *cells),
            table,
            generator=generator,
            latents=self.beginning.latents if self.beginning.begun else self.latents,
            # Of an ordinary model it is not used, but diffusers draws it too.
            encoding=self.inpainting is not None or self.blending is not None,
            picture=self.beginning.picture is not None,
            low_res=0 if self.upscaling is None else self.upscaling.noised_channels,
            variations=job.variation_seeds,
            variation_strength=job.variation_strength,
        )

    def _check(self, noise: Noise, shape: tuple[int, ...], table: SamplerTable) -> None:
        """Refuse noise that was given and does not fit."""
        needed = {
            "steps": table.uses_noise,
            "encoding": self.inpainting is not None,
            "picture": self.beginning.picture is not None,
            "low_res": self.upscaling is not None and self.upscaling.noised_channels > 0,
        }
        missing = [name for name, need in needed.items() if need and getattr(noise, name) is None]
        if missing or tuple(noise.start.shape) != shape:
            found = f"without {', '.join(missing)}" if missing else f"for latents {tuple(noise.start.shape)}"
            raise BadRequest(f"noise is {found}, expected all of a call's, for latents {shape}", param="noise")

    def finished(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, H, W) in [-1, 1] as they are delivered, of decoded ones."""
        return images if self.overlay is None else self.overlay.over(images)


def _joined(inputs: list[Tensors], more: list[dict[str, torch.Tensor]]) -> list[Tensors]:
    return [{**one, **other} for one, other in zip(inputs, more, strict=True)]


def resolve(
    model: ModelRecord,
    job: Job,
    *,
    latents: torch.Tensor | None = None,
    **brought: Unpack[Brought],
) -> Material:
    """Check what a request brings.

    Args:
        model: of the bundle.
        job: of the request.
        latents: instead of noise.
        brought: the rest.

    Raises:
        BadRequest: the model needs what is not there, has no use for what is, or it is no picture.
    """
    size, image, mask_image = (job.width, job.height), brought.get("image"), brought.get("mask_image")
    blending = resolve_blending(model, job, image, mask_image)
    return Material(
        model=model,
        beginning=resolve_beginning(model, job, image, latents, keeps=blending is not None),
        latents=latents,
        blending=blending,
        inpainting=resolve_inpainting(model, size, image, mask_image),
        upscaling=resolve_upscaling(model, size, image, brought.get("noise_level")),
        classes=resolve_classes(model, job, brought.get("class_labels")),
        segmentation=resolve_segmentation(model, size, brought.get("segmentation")),
        layout=resolve_layout(model, brought.get("layout")),
        overlay=resolve_overlay(job, image, mask_image),
    )
