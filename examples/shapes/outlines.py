"""Scenes drawn in another style: the shapes outlined, not filled."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

import generator

WIDTH = 4  # of the line, in pixels


@lru_cache(maxsize=1024)
def outline_mask(shape: str, side: int) -> generator.Mask:
    """Coverage (0 to 1) of a shape's outline, which lies within the shape: float32, ``side`` x ``side`` pixels."""
    coverage = generator.shape_mask(shape, side)
    padded = np.pad(coverage, WIDTH)
    around = range(-WIDTH, WIDTH + 1)
    disk = [(y, x) for y in around for x in around if x * x + y * y <= WIDTH * WIDTH]
    inside = np.stack([np.roll(padded, shift, axis=(0, 1)) for shift in disk]).min(axis=0)
    outline: generator.Mask = coverage - inside[WIDTH:-WIDTH, WIDTH:-WIDTH]
    return outline


def draw_outlined(layout: generator.Layout) -> generator.Picture:
    """Draw a layout's outlines: uint8 RGB, (128, 128, 3)."""
    return generator.draw(layout, outline_mask)
