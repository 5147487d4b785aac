"""The noise that pictures start from: drawn on the CPU, whatever runs the model, in diffusers' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldmrt.errors import BadRequest
from ldmrt.samplers.table import SamplerTable

Generators = torch.Generator | Sequence[torch.Generator]


class Noise(NamedTuple):
    """The noise of a call, float32.

    Attributes:
        start: (n, C, h, w), of the initial latents.
        steps: (n, evaluations, C, h, w), of a sampler that draws some; None for another.
        encoding: (n, C, h, w), of the encoding of what an inpainting model is shown; None without.
        picture: (n, C, h, w), of the encoding of the picture that is begun from; None without.
        low_res: (n, channels, h, w), on the picture that an upscaling model draws larger; None without.
    """

    start: torch.Tensor
    steps: torch.Tensor | None = None
    encoding: torch.Tensor | None = None
    picture: torch.Tensor | None = None
    low_res: torch.Tensor | None = None

    def cut(self, images: slice, x: int, y: int, width: int, height: int) -> Noise:
        """That of some images, and of a rectangle of their latents."""
        place = (images, ..., slice(y, y + height), slice(x, x + width))
        return Noise(*(None if one is None else one[place] for one in self))  # type: ignore[arg-type]


def draw(
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    table: SamplerTable,
    *,
    generator: Generators | None = None,
    latents: torch.Tensor | None = None,
    encoding: bool = False,
    picture: bool = False,
    low_res: int = 0,
    variations: Sequence[int] = (),
    variation_strength: float = 0.0,
) -> Noise:
    """Draw all the noise of a call, float32.

    A generator gives first what is added to a picture that is drawn larger (once for all its images), then what the encoding of the
    picture draws that is begun from (once likewise), then the initial latents
    of its images, then what the encoding of an inpainting model's picture draws, then their noise step by step: what diffusers would draw
    from it.

    Args:
        seeds: one for each image; each starts a generator of its own.
        shape: (C, h, w) of an image's latents.
        table: the sampler, which says in which evaluations it draws.
        generator: instead of the seeds: one for all images, or one for each.
        latents: (n, C, h, w), instead of drawing them.
        encoding: whether a picture is encoded that an inpainting model is shown.
        picture: whether a picture is encoded that is begun from.
        low_res: channels of a picture as large as the latents that noise is added to.
        variations: for each image the seed of another noise, towards which its initial latents are turned; none for leaving them.
        variation_strength: how far, 0 to 1.

    Raises:
        BadRequest: the generators or the latents do not fit the images.
    """
    count = len(seeds)
    if latents is not None and tuple(latents.shape) != (count, *shape):
        raise BadRequest(f"latents has the shape {tuple(latents.shape)}, expected {(count, *shape)}", param="latents")
    generators, images = _checked(seeded(seeds, generator), count)
    block = (images, *shape)
    starts, noises, encodings, pictures, low = [], [], [], [], []
    for one in generators:
        if low_res:
            low.append(torch.randn((1, low_res, *shape[1:]), generator=one).expand(images, low_res, *shape[1:]))
        if picture:
            pictures.append(torch.randn((1, *shape), generator=one).expand(block))
        if latents is None:
            starts.append(torch.randn(block, generator=one))
        if encoding:
            encodings.append(torch.randn((1, *shape), generator=one).expand(block))
        if table.uses_noise:
            drawn = [torch.randn(block, generator=one) if d else torch.zeros(block) for d in table.draws_noise.tolist()]
            noises.append(torch.stack(drawn, dim=1))
    start = torch.cat(starts) if latents is None else latents.detach().to("cpu", torch.float32)
    if variations:
        others = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in variations]
        pairs = zip(start, others, strict=True)
        start = torch.stack([slerp(one, other, variation_strength) for one, other in pairs])
    return Noise(start, *(torch.cat(drawn) if drawn else None for drawn in (noises, encodings, pictures, low)))


def slerp(start: torch.Tensor, end: torch.Tensor, strength: float) -> torch.Tensor:
    """The point at a share of the way from one tensor to another, on the arc between them (Shoemake 1985, "Animating rotation with
    quaternion curves"); on the line, where they point the same way or opposite ways.

    A weighted mean of two noises has less variance than they; on the arc between vectors that are nearly at right angles, as noises are,
    it stays.

    Args:
        start: float32, any shape; taken as one vector.
        end: the same.
        strength: 0 gives `start`, 1 gives `end`.

    Returns:
        float32, computed in float64.
    """
    first, second = start.double(), end.double()
    cosine = (first * second).sum() / (first.norm() * second.norm()).clamp(min=1e-300)
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(first, second, strength).float()
    return ((torch.sin((1 - strength) * angle) * first + torch.sin(strength * angle) * second) / angle.sin()).float()


def seeded(seeds: Sequence[int], generator: Generators | None) -> Generators:
    """The generators of a call: those that were given, or one for each seed."""
    if generator is not None:
        return generator
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _checked(generator: Generators, count: int) -> tuple[list[torch.Generator], int]:
    """The generators for so many images, and how many images each draws for.

    Raises:
        BadRequest: they are not as many, or not on the CPU.
    """
    generators, images = ([generator], count) if isinstance(generator, torch.Generator) else (list(generator), 1)
    if len(generators) * images != count:
        raise BadRequest(f"{len(generators)} generators were given for {count} images", param="generator")
    if any(one.device.type != "cpu" for one in generators):
        raise BadRequest(
            "the generator is on a GPU, expected torch.Generator('cpu'): noise is drawn on the CPU", param="generator"
        )
    return generators, images
