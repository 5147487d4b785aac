"""A picture continued beyond its edges, on a canvas of any size: window by window, each as large as the engines and drawn from what is known of it.

Windows overlap by half. The next is always the one of which most is known. What was drawn before is drawn over in a narrow band where a
window joins it, and blended there; the picture itself is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from ldmrt.composition import Composition, add, check_output_type, check_size, deliver, field, request_of
from ldmrt.conditioning import Picture, read
from ldmrt.delivery import OutputType
from ldmrt.errors import BadRequest
from ldmrt.extension import Extension
from ldmrt.noise import Generators
from ldmrt.pipeline import Pipeline
from ldmrt.tiling import Tiling

_OVERLAP = 2  # half a window
# What a call of a window would have to be cut out of, or has another meaning there.
_WHOLE = (
    "mask_image",
    "mask_blur",
    "apply_overlay",
    "segmentation",
    "control_image",
    "latents",
    "denoising_start",
    "denoising_end",
)


class Plan(NamedTuple):
    """How a canvas is drawn; sizes are (width, height).

    Attributes:
        canvas: its size in pixels.
        place: the first pixel of the picture on it, (x, y).
        cells: its size in latent cells, at least a window's.
        window: the size of a window in cells.
        windows: the first cell (x, y) of each, in the order in which they are drawn.
    """

    canvas: tuple[int, int]
    place: tuple[int, int]
    cells: tuple[int, int]
    window: tuple[int, int]
    windows: tuple[tuple[int, int], ...]


def outpaint(
    pipe: Pipeline,
    image: Picture,
    extend: Sequence[int],
    *,
    generator: Generators | None = None,
    output_type: OutputType = "pil",
    **arguments: Any,
) -> Composition:
    """Continue a picture, whose own pixels come back as they were.

    Args:
        pipe: of an inpainting model, or of another one but for upscaling models.
        image: a PIL image, or (H, W, 3) uint8; of any size.
        extend: pixels to the left, to the right, above and below.
        generator: instead of `seed`, as of `Pipeline`.
        output_type: `pil` or `np`.
        arguments: of `Pipeline`: `prompt`, `seed` and the others. `width` and `height` choose the windows' size; `on_step` is called for
            every window of every image. With `strength` below 1 something is left of the picture's edge drawn out.

    Raises:
        BadRequest: the picture is none, the canvas too large, or an argument has no meaning for a canvas; and see `Pipeline`.
        NumericalError: see there.
    """
    for name in _WHOLE:
        if arguments.get(name) is not None and arguments[name] is not False:
            raise BadRequest(f"{name} was given, and extend continues a whole picture; leave it out", param=name)
    picture = np.array(read(image, param="image"))
    plan = windows(pipe, picture.shape[1::-1], extend, arguments.get("width"), arguments.get("height"))
    check_output_type(output_type)
    cell = pipe.bundle.manifest.model.downscale
    size = plan.window[0] * cell, plan.window[1] * cell
    blank = Image.new("L", size, 255)
    job, material = pipe.resolve(
        request_of(arguments),
        image=Image.new("RGB", size),
        mask_image=blank,
        class_labels=arguments.get("class_labels"),
    )
    noise = field(material, job, pipe.table(job), plan.cells[::-1], generator)

    (x, y), (height, width) = plan.place, picture.shape[:2]
    around = [
        (first, cell * cells - first - side)
        for first, side, cells in zip((y, x), (height, width), plan.cells[::-1], strict=True)
    ]
    filled = torch.from_numpy(np.pad(picture, [*around, (0, 0)], mode="edge")).permute(2, 0, 1).float() / 255
    original = torch.zeros(filled.shape[1:], dtype=torch.bool)
    original[y : y + height, x : x + width] = True
    canvases: list[torch.Tensor] = []
    timings: dict[str, float] = {}
    for number, seed in enumerate(job.seeds):
        canvas, known = filled.clone(), original.clone()
        prompt = number // job.num_images_per_prompt
        own: dict[str, Any] = {
            "prompt": job.prompts[prompt],
            "negative_prompt": job.negative_prompts[prompt],
            "num_images_per_prompt": 1,
            "seed": seed,
            "output_type": "np",
        }
        for column, row in plan.windows:
            place = (slice(cell * row, cell * row + size[1]), slice(cell * column, cell * column + size[0]))
            seen = _seen(known[place], original[place], blur=cell)
            part = noise.cut(slice(number, number + 1), column, row, *plan.window)
            shown = (canvas[:, *place].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            made = pipe(**{**arguments, **own, "image": shown, "mask_image": _drawn(seen, cell), "noise": part})
            canvas[:, *place].lerp_(torch.from_numpy(made.images[0]).permute(2, 0, 1), seen)
            known[place] = True
            add(timings, made.timings)
        canvases.append(canvas[:, : plan.canvas[1], : plan.canvas[0]])
    return Composition(deliver(torch.stack(canvases), output_type), job.seeds, timings, job)


def windows(
    pipe: Pipeline, size: tuple[int, int], extend: Sequence[int], width: int | None = None, height: int | None = None
) -> Plan:
    """How a canvas is to be drawn.

    Args:
        pipe: whose engines say how large a window is.
        size: (width, height) of the picture in pixels.
        extend: see `outpaint`.
        width: of a window in pixels; None for the model's default.
        height: likewise.

    Raises:
        BadRequest: it is not extended, or by a number that is none, or the canvas is too large.
    """
    whole = [isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in extend]
    if len(extend) != len(Extension._fields) or not all(whole) or not any(extend):
        raise BadRequest(
            f"extend is {tuple(extend)}, expected pixels to the left, right, top and bottom, 0 or more, and not all 0",
            param="extend",
        )
    by, cell = Extension(*extend), pipe.bundle.manifest.model.downscale
    canvas = size[0] + by.left + by.right, size[1] + by.top + by.bottom
    check_size(*canvas)
    window = (width or pipe.defaults.width) // cell, (height or pipe.defaults.height) // cell
    cells = max(window[0], -(-canvas[0] // cell)), max(window[1], -(-canvas[1] // cell))
    place = by.left, by.top
    known, wanted = np.zeros((2, *cells[::-1]), dtype=bool)
    wanted[: -(-canvas[1] // cell), : -(-canvas[0] // cell)] = True
    known[_inside(place[1], size[1], cell), _inside(place[0], size[0], cell)] = True
    return Plan(canvas, place, cells, window, tuple(_order(Tiling(cells, window, _OVERLAP), known, wanted)))


def _inside(first: int, length: int, cell: int) -> slice:
    """The cells that lie wholly within some pixels."""
    return slice(-(-first // cell), max(-(-first // cell), (first + length) // cell))


def _order(tiling: Tiling, known: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """The windows that are drawn, by their first cells: always the one of which most is known."""
    width, height = tiling.tile

    def counted(x: int, y: int) -> tuple[int, bool]:
        """How much of a window is known, and whether something of it is still wanted."""
        place = (slice(y, y + height), slice(x, x + width))
        return int(known[place].sum()), bool((wanted[place] & ~known[place]).any())

    left = {one: counted(*one) for one in tiling}
    order: list[tuple[int, int]] = []
    while left := {one: found for one, found in left.items() if found[1]}:
        x, y = max(left, key=lambda one: left[one][0])
        known[y : y + height, x : x + width] = True
        order.append((x, y))
        left |= {one: counted(*one) for one in left if abs(one[0] - x) < width and abs(one[1] - y) < height}
    return order


def _seen(known: torch.Tensor, original: torch.Tensor, blur: int) -> torch.Tensor:
    """How much is seen of what is drawn in a window, (H, W) float32: all of it where nothing is known, less and less in a band around that,
    and nothing of it where the picture is.
    """
    unknown = Image.fromarray(np.where(known.numpy(), 0, 255).astype(np.uint8))
    soft = torch.from_numpy(np.array(unknown.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)) / 255
    return torch.where(original, 0.0, torch.where(known, (2 * soft).clamp(max=1), 1.0))


def _drawn(seen: torch.Tensor, cell: int) -> Image.Image:
    """The mask of the cells of which something is seen."""
    some = functional.max_pool2d((seen > 0).float()[None], cell)
    mask = some[0].repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return Image.fromarray((mask * 255).to(torch.uint8).numpy())
