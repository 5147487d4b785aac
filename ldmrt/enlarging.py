"""Pictures drawn larger whatever their size, in tiles: an upscaling model's engines take one size.

Tiles overlap. All noise is drawn once for the whole picture, as if there were an engine of its size, and each tile gets its part, so that two
tiles see the same picture and the same noise where they overlap, and draw nearly the same. What differs is blended (`ldmrt.tiling`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ldmrt.composition import Composition, add, check_output_type, check_size, deliver, field, request_of
from ldmrt.conditioning import Picture, read
from ldmrt.delivery import OutputType
from ldmrt.errors import BadRequest
from ldmrt.noise import Generators
from ldmrt.pipeline import Pipeline
from ldmrt.tiling import Tiling


def enlarge(
    pipe: Pipeline,
    image: Picture,
    *,
    generator: Generators | None = None,
    output_type: OutputType = "pil",
    **arguments: Any,
) -> Composition:
    """Draw a picture larger, as many times as the model does. One that is as large as the engine takes is drawn as the pipeline alone would.

    Args:
        pipe: of an upscaling model.
        image: a PIL image, or (H, W, 3) uint8; of any size.
        generator: instead of `seed`, as of `Pipeline`.
        output_type: `pil` or `np`.
        arguments: of `Pipeline`: `prompt`, `noise_level`, `seed` and the others. `width` and `height` choose the tiles' size; `on_step` is
            called for every tile.

    Raises:
        BadRequest: the model draws nothing larger, the picture is none, or too large; and see `Pipeline`.
        NumericalError: see there.
    """
    picture = np.array(read(image, param="image"))
    tiling = tiles(pipe, picture.shape[1::-1], arguments.get("width"), arguments.get("height"))
    factor = pipe.bundle.manifest.model.downscale
    height, width = (side * factor for side in picture.shape[:2])
    check_size(width, height)
    check_output_type(output_type)
    missing = [(0, whole - side) for side, whole in zip(picture.shape[:2], tiling.size[::-1], strict=True)]
    picture = np.pad(picture, [*missing, (0, 0)], mode="edge")
    job, material = pipe.resolve(request_of(arguments), image=picture, noise_level=arguments.get("noise_level"))
    noise = field(material, job, pipe.table(job), tiling.size[::-1], generator)
    canvas = torch.zeros((job.num_images, 3, *(side * factor for side in tiling.size[::-1])))
    timings: dict[str, float] = {}
    for number, (x, y) in enumerate(tiling):
        part = noise.cut(slice(None), x, y, *tiling.tile)
        tile = picture[y : y + tiling.tile[1], x : x + tiling.tile[0]]
        asked = {**arguments, "image": Image.fromarray(tile), "noise": part, "seed": job.seeds[0], "output_type": "np"}
        made = pipe(**asked)
        tiling.lay(number, torch.from_numpy(made.images).permute(0, 3, 1, 2), canvas)
        add(timings, made.timings)
    return Composition(deliver(canvas[..., :height, :width], output_type), job.seeds, timings, job)


def tiles(pipe: Pipeline, size: tuple[int, int], width: int | None = None, height: int | None = None) -> Tiling:
    """The tiles of a picture, in its own pixels; one smaller than a tile is taken to be as large.

    Args:
        pipe: of an upscaling model.
        size: (width, height) of the picture.
        width: of what is drawn of a tile; None for the model's default.
        height: likewise.

    Raises:
        BadRequest: the model draws nothing larger.
    """
    model = pipe.bundle.manifest.model
    if model.upscaling is None:
        raise BadRequest(
            f"{model.name} is no upscaling model, which alone draws a picture larger; open a bundle of one",
            param="image",
        )
    drawn = width or pipe.defaults.width, height or pipe.defaults.height
    tile = drawn[0] // model.downscale, drawn[1] // model.downscale
    return Tiling((max(size[0], tile[0]), max(size[1], tile[1])), tile)
