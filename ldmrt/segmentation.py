"""What a request for a model of semantic maps brings: the number of a class for every pixel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldmrt.components import SEGMENTATION
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord

SemanticMap = Image.Image | NDArray[np.integer]


def resolve(model: ModelRecord, size: tuple[int, int], segmentation: SemanticMap | None) -> dict[str, torch.Tensor]:
    """The U-Net's input `segmentation` (1, H, W) int64; empty for a model that takes none.

    Args:
        model: which classes it knows.
        size: (width, height) in pixels, to which the map is brought; each pixel takes the class of the nearest.
        segmentation: an image of one channel, or of a palette, or an array of whole numbers (H, W).

    Raises:
        BadRequest: the model needs a map and it is not there, or it has no use for it, or it is none, or has a class that it does not know.
    """
    if model.segments is None:
        if segmentation is not None:
            raise BadRequest(
                f"segmentation was given, and {model.name} takes no semantic map; leave it out", param="segmentation"
            )
        return {}
    if segmentation is None:
        raise BadRequest(
            f"segmentation is missing: {model.name} draws a semantic map of {model.segments} classes; give the number of one for every pixel",
            param="segmentation",
        )
    labels = np.asarray(segmentation)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise BadRequest(
            f"segmentation is an array of {labels.dtype} {labels.shape}, expected whole numbers (H, W): an image of one channel, or of a palette",
            param="segmentation",
        )
    if labels.size == 0 or labels.min() < 0 or labels.max() >= model.segments:
        found = f"classes from {labels.min()} to {labels.max()}" if labels.size else "no pixel"
        raise BadRequest(f"segmentation has {found}, expected 0 to {model.segments - 1}", param="segmentation")
    rows, columns = (np.arange(wide) * found // wide for wide, found in zip(size[::-1], labels.shape, strict=True))
    nearest = torch.from_numpy(labels[np.ix_(rows, columns)].astype(np.int64))
    return {SEGMENTATION: nearest[None]}
