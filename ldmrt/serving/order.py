"""A request whose pictures another process makes, image by image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures

from ldmrt.conditioning import Picture, read
from ldmrt.pipeline import Result
from ldmrt.request import Request
from ldmrt.serving.channel import Message
from ldmrt.serving.engine import OnStep
from ldmrt.serving.ticket import Image, Ticket
from ldmrt.serving.wire import packed, unpacked


@dataclass(frozen=True)
class Made:
    """A step that was made: see `ldmrt.serving.engine.Step`."""

    image: int
    step: int
    steps: int
    preview: Pictures.Image | None


@dataclass(eq=False, kw_only=True)
class Order(Ticket):
    """A request that is made elsewhere.

    Attributes:
        request: as it was given.
        brought: its pictures, in the size in which they are used; None for those that are not there.
        told: called with every step.
        images_made: what has come, by number.
    """

    request: Request
    brought: dict[str, Pictures.Image | None]
    told: OnStep | None
    images_made: dict[int, Pictures.Image] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> bytes:
        """The same for requests that ask for the same."""
        digest = hashlib.sha256(json.dumps(asdict(self.request)).encode("ascii"))
        for picture in self.brought.values():
            digest.update(b"" if picture is None else packed(picture))
        return digest.digest()

    @staticmethod
    def of(image: Image) -> Order:
        """The request of an image."""
        order = image.ticket
        assert isinstance(order, Order)  # noqa: S101 - where there are orders there are no other tickets
        return order

    def parcel(self, image: Image) -> tuple[dict[str, Any], list[bytes]]:
        """What the other process is told of an image, and the pictures that it begins from."""
        job = image.job()
        request = replace(
            self.request,
            prompt=job.prompts[0],
            negative_prompt=job.negative_prompts[0],
            seed=job.seeds[0],
            num_images_per_prompt=1,
            variation_seed=job.variation_seeds[0] if job.variation_seeds else None,
        )
        sizes = {name: None if picture is None else picture.size for name, picture in self.brought.items()}
        pictures = [packed(picture) for picture in self.brought.values() if picture is not None]
        return {"request": asdict(request), "previews": self.previews, **sizes}, pictures

    @staticmethod
    def step(number: int, message: Message) -> Made:
        """A step of an image.

        Raises:
            ChannelError: its preview is none.
        """
        header = message.header
        preview = unpacked(message.blobs[0], header["preview"]) if message.blobs else None
        return Made(number, header["step"], header["steps"], preview)

    def bring(self, number: int, message: Message) -> None:
        """An image has come.

        Raises:
            ChannelError: it is none, like the next.
            ValueError: its latents have another shape.
        """
        picture, latents = message.blobs
        self.images_made[number] = unpacked(picture, message.header["size"])
        values = np.frombuffer(latents, dtype=np.float32).reshape(message.header["latents"])
        self.latents[number] = torch.from_numpy(values.copy())

    def result(self, now: float) -> Result | None:
        """The pictures, if all have come.

        Args:
            now: by the clock of `submitted`.
        """
        if len(self.images_made) < self.job.num_images:
            return None
        numbers = range(self.job.num_images)
        started = self.started or now
        timings = {"wait": started - self.submitted, "run": now - started}
        latents = torch.stack([self.latents[number] for number in numbers])
        return Result([self.images_made[number] for number in numbers], latents, self.job.seeds, timings, self.job)


def scaled(picture: Picture, size: tuple[int, int]) -> Pictures.Image:
    """A picture as it will be used, which is all that need wait: in RGB, resized as `ldmrt.conditioning` does, which then finds nothing to do.

    Args:
        picture: as the caller gave it.
        size: (width, height) in pixels.
    """
    return read(picture, param="image").resize(size, Pictures.Resampling.LANCZOS)
