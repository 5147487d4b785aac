"""What the soak asks `ldmrt serve` for: things to draw, with the pictures that come of them, and things that cannot be."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldmrt.pipeline import Pipeline

PROMPTS = (
    "a red circle on a white background",
    "a blue square",
    "a green star left of a yellow circle",
    "a purple triangle on a black background",
)
SAMPLERS = ("ddim", "euler", "euler a", "dpm++ 2m karras", "unipc", "heun")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"

Pixels = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Item:
    """Something to ask for, and what comes of it.

    Attributes:
        path: where it is asked.
        fields: of the request.
        files: the pictures that it brings.
        wanted: the pixels of each picture.
    """

    path: str
    fields: dict[str, Any]
    files: dict[str, bytes]
    wanted: list[Pixels]

    def asked(self, **more: Any) -> dict[str, Any]:
        """Arguments of an HTTP client."""
        fields = {**self.fields, **more}
        if self.path == GENERATIONS:
            return {"url": self.path, "json": fields}
        texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in fields.items()}
        return {"url": self.path, "data": texts, "files": {name: (name, data) for name, data in self.files.items()}}


def catalogue(pipe: Pipeline, count: int) -> list[Item]:
    """The same every time."""
    drawn, items = random.Random(11), []
    for number in range(count):
        prompt, steps, seed = drawn.choice(PROMPTS), drawn.choice((4, 8, 12, 20)), drawn.randrange(2**31)
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "seed": seed,
            "sampler": drawn.choice(SAMPLERS),
            "guidance_scale": drawn.choice((1.0, 3.0, 5.0)),
        }
        fields: dict[str, Any] = {"prompt": prompt, **given}
        files: dict[str, bytes] = {}
        if number % 4 == 3:
            begin = Image.effect_mandelbrot((160, 140), (-2, -1.5 + 0.01 * number, 1, 1.5), 20).convert("RGB")
            files["image"] = png(begin)
            given["image"] = begin
            if number % 8 == 7:
                hole = Image.new("L", begin.size, 0)
                hole.paste(255, (40, 30, 120, 110))
                clear = begin.copy()
                clear.putalpha(Image.eval(hole, lambda value: 255 - value))
                files["mask"] = png(clear)
                given["mask_image"] = hole
            else:
                fields["strength"] = given["strength"] = 0.6
        else:
            fields["n"] = given["num_images_per_prompt"] = drawn.choice((1, 1, 2))
        pictures = pipe(prompt, **given).images
        items.append(Item(EDITS if files else GENERATIONS, fields, files, [pixels(picture) for picture in pictures]))
    return items


# What cannot be, and the status that it gets.
BAD: tuple[tuple[str, dict[str, Any], int], ...] = (
    (GENERATIONS, {"json": {"prompt": "a", "n": 0}}, 400),
    (GENERATIONS, {"json": {"prompt": "a", "size": "1x1"}}, 400),
    (GENERATIONS, {"json": {"prompt": "a", "sampler": "magic"}}, 400),
    (GENERATIONS, {"json": {"prompt": "a" * 5000}}, 400),
    (GENERATIONS, {"json": {"prompt": "a", "model": "another"}}, 404),
    (GENERATIONS, {"json": {"prompt": "a", "steps": 2, "guidance_scale": 3e38}}, 500),  # NaN
    (GENERATIONS, {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    (GENERATIONS, {"content": b" " * 300_000, "headers": {"content-type": "application/json"}}, 413),
    (EDITS, {"data": {"prompt": "a"}, "files": {"image": ("image", b"GIF89a")}}, 400),
    (EDITS, {"json": {"prompt": "a"}}, 415),
    ("/nowhere", {"json": {}}, 404),
)


def png(image: Image.Image) -> bytes:
    """Its file."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def pixels(image: Image.Image) -> Pixels:
    """(height, width, 3)."""
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def decoded(text: str) -> Pixels:
    """The pixels of a picture in an answer."""
    return pixels(Image.open(io.BytesIO(base64.b64decode(text))))


def decibels(one: Pixels, other: Pixels) -> float:
    """The peak signal to noise ratio; infinite for the same pixels."""
    error = float(((one - other).astype(np.float64) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
