"""Pictures of a scene's edges, as an edge filter would find them: white on black, one or two pixels wide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import generator

Edges = NDArray[np.bool_]


def draw_edges(layout: generator.Layout, rng: np.random.Generator) -> Edges:
    """The edges (128, 128) of a layout's shapes: within them, around them, or both, as filters differ."""
    labels = np.zeros((generator.SIDE, generator.SIDE), dtype=np.uint8)
    for number, (thing, box) in enumerate(zip(layout.scene.things, layout.boxes, strict=True), start=1):
        region = labels[box.top : box.top + box.side, box.left : box.left + box.side]
        region[generator.shape_mask(thing.shape, box.side) >= 0.5] = number
    image = Image.fromarray(labels)
    inner = labels != np.asarray(image.filter(ImageFilter.MinFilter(3)))
    outer = labels != np.asarray(image.filter(ImageFilter.MaxFilter(3)))
    found: Edges = (inner, outer, inner | outer)[rng.choice(3, p=(0.4, 0.3, 0.3))]
    return found
