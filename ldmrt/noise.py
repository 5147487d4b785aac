"""The noise that pictures start from: drawn on the CPU, whatever runs the model, in diffusers' order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldmrt.errors import BadRequest
from ldmrt.samplers.table import SamplerTable

Generators = torch.Generator | Sequence[torch.Generator]


def draw(
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    table: SamplerTable,
    *,
    generator: Generators | None = None,
    latents: torch.Tensor | None = None,
    encoding: bool = False,
    variations: Sequence[int] = (),
    strength: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Draw all the noise of a call, float32.

    A generator gives first the initial latents of its images, then what the encoding of a picture draws (once for all its images),
    then their noise step by step: what diffusers would draw from it.

    Args:
        seeds: one for each image; each starts a generator of its own.
        shape: (C, h, w) of an image's latents.
        table: the sampler, which says in which evaluations it draws.
        generator: instead of the seeds: one for all images, or one for each.
        latents: (n, C, h, w), instead of drawing them.
        encoding: whether a picture is encoded.
        variations: for each image the seed of another noise, towards which its initial latents are turned; none for leaving them.
        strength: how far, 0 to 1.

    Returns:
        Initial latents (n, C, h, w); the noise (n, evaluations, C, h, w) of samplers that draw some, else None; that of the encoding
        (n, C, h, w), or None.

    Raises:
        BadRequest: the generators or the latents do not fit the images.
    """
    count = len(seeds)
    if latents is not None and tuple(latents.shape) != (count, *shape):
        raise BadRequest(f"latents has the shape {tuple(latents.shape)}, expected {(count, *shape)}", param="latents")
    if isinstance(generator, torch.Generator):
        generators, images = [generator], count
    else:
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds] if generator is None else list(generator)
        images = 1
    if len(generators) * images != count:
        raise BadRequest(f"{len(generators)} generators were given for {count} images", param="generator")
    if any(one.device.type != "cpu" for one in generators):
        raise BadRequest(
            "the generator is on a GPU, expected torch.Generator('cpu'): noise is drawn on the CPU", param="generator"
        )
    block = (images, *shape)
    starts, noises, encodings = [], [], []
    for one in generators:
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
        start = torch.stack([slerp(one, other, strength) for one, other in zip(start, others, strict=True)])
    return start, torch.cat(noises) if noises else None, torch.cat(encodings) if encodings else None


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
