"""Masks to learn inpainting and outpainting by: what is to be drawn anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import generator

Mask = NDArray[np.bool_]
_KINDS = ("object", "objects", "sides", "anywhere", "everything")
_SHARES = (0.5, 0.1, 0.2, 0.12, 0.08)
LEAST_MARGIN, GREATEST_MARGIN = 3, 24  # pixels of the mask beyond an object's box


def sample_mask(layout: generator.Layout, rng: np.random.Generator) -> Mask:
    """A mask (128, 128) for a picture: around an object or all of them, along sides, anywhere, or everywhere."""
    kind = rng.choice(_KINDS, p=_SHARES)
    mask = np.zeros((generator.SIDE, generator.SIDE), dtype=np.bool_)
    if kind == "everything":
        mask[:] = True
    elif kind == "sides":
        widths = rng.integers(20, 84, size=4) * (rng.random(4) < 0.4)
        widths[rng.integers(4)] = rng.integers(20, 84)
        left, top, right, bottom = (int(width) for width in widths)
        mask[:] = True
        mask[top : generator.SIDE - bottom, left : generator.SIDE - right] = False
    elif kind == "anywhere":
        width, height = (int(side) for side in rng.integers(24, 90, size=2))
        left, top = (int(rng.integers(0, generator.SIDE - side + 1)) for side in (width, height))
        mask[top : top + height, left : left + width] = True
    else:
        boxes = layout.boxes if kind == "objects" else (layout.boxes[rng.integers(len(layout.boxes))],)
        margins = rng.integers(LEAST_MARGIN, GREATEST_MARGIN + 1, size=4)
        left = max(0, min(box.left for box in boxes) - margins[0])
        top = max(0, min(box.top for box in boxes) - margins[1])
        right = max(box.left + box.side for box in boxes) + margins[2]
        bottom = max(box.top + box.side for box in boxes) + margins[3]
        mask[top:bottom, left:right] = True
    return mask
