"""How much a request may ask for: what one client may cost the others."""

from __future__ import annotations

from dataclasses import dataclass

from ldmrt.request import Defaults
from ldmrt.serving.http.errors import bad_request
from ldmrt.serving.http.fields import Fields


@dataclass(frozen=True)
class Limits:
    """Bounds of a request. Sizes are bounded besides by the engines that the bundle has.

    Attributes:
        images: of one request.
        steps: of one image.
        pixels: of one image.
        pixel_steps: images x steps x pixels.
        prompt: characters of a prompt, and of a negative prompt.
        json_bytes: of a body of JSON.
        form_bytes: of a body with pictures.
        upload_pixels: of a picture that a request brings.
        body_seconds: in which a body must have come.
        seconds: in which a request must be finished.
    """

    images: int = 10
    steps: int = 150
    pixels: int = 2048 * 2048
    pixel_steps: int = 500 * 1024 * 1024
    prompt: int = 4000
    json_bytes: int = 256 << 10
    form_bytes: int = 32 << 20
    upload_pixels: int = 16 << 20
    body_seconds: float = 30.0
    seconds: float = 300.0

    def check(self, fields: Fields, defaults: Defaults) -> None:
        """Refuse what is too much.

        Raises:
            HttpError: 400, with the field's name.
        """
        request = fields.request()
        steps = defaults.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
        pixels = (request.width or defaults.width) * (request.height or defaults.height)
        images = request.num_images_per_prompt
        for name, text in (("prompt", fields.prompt), ("negative_prompt", fields.negative_prompt or "")):
            _bounded(name, len(text), self.prompt, "characters")
        _bounded("n", images, self.images, "images")
        _bounded("steps", steps, self.steps, "steps")
        _bounded("size", pixels, self.pixels, "pixels")
        _bounded("n", images * steps * pixels, self.pixel_steps, "pixels drawn in all steps of all images")


def _bounded(param: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise bad_request(f"{param} asks for {value} {what}, expected at most {limit}", param)
