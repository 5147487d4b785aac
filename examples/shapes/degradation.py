"""Small pictures as they come: blurred, sampled in one way or another, noisy."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

import generator

FACTOR = 4
GREATEST_NOISE = 0.24  # standard deviation, of pictures in [-1, 1]: 31 of 255
_FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def shrink(picture: generator.Picture, rng: np.random.Generator) -> generator.Picture:
    """A picture a quarter as wide and high, blurred before by up to 1.5 of its pixels."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.5))))
    size = (picture.shape[1] // FACTOR, picture.shape[0] // FACTOR)
    return np.asarray(blurred.resize(size, _FILTERS[rng.integers(len(_FILTERS))]))


def add_noise(small: Tensor, order: torch.Generator) -> Tensor:
    """Small pictures (n, 3, h, w) in [-1, 1] with normal noise, each of another strength, a quarter of them with none."""
    strength = (torch.rand(len(small), 1, 1, 1, generator=order) * 4 / 3 - 1 / 3).clamp(min=0) * GREATEST_NOISE
    noise = torch.randn(small.shape, generator=order) * strength
    return (small + noise.to(small.device)).clamp(-1, 1)
