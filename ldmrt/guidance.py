"""The guidance scale as an input of a model that was distilled with it (Meng et al. 2022, arXiv 2210.03142), instead of a second row."""

from __future__ import annotations

import math

import torch


def embedding(guidance_scale: float, width: int) -> torch.Tensor:
    """The embedding of a guidance scale as latent consistency models take it (Luo et al. 2023, arXiv 2310.04378), which count it from 1:
    sines, then cosines, of 1000 * (guidance_scale - 1) at frequencies from 1 down to 1 / 10,000.

    Args:
        guidance_scale: as for classifier-free guidance.
        width: how many numbers; a last odd one is 0.

    Returns:
        (width,) float32.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale - 1.0) * frequencies
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)])
