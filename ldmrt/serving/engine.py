"""What a server asks of whatever makes its pictures: a `Batcher` in this process, or one in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from PIL import Image

from ldmrt.conditioning import Picture
from ldmrt.pipeline import Pipeline
from ldmrt.request import Defaults, Request
from ldmrt.serving.handle import Handle
from ldmrt.serving.register import Stats


class State(StrEnum):
    """What can be expected of an engine."""

    LOADING = "loading"  # requests wait until it is ready
    READY = "ready"
    DOWN = "down"  # it cannot be started, which is tried now and then; requests are refused meanwhile
    BROKEN = "broken"  # for good
    CLOSED = "closed"


@dataclass(frozen=True)
class Facts:
    """What a server tells of a model.

    Attributes:
        name: the model's own name.
        kind: the family member, such as `stable-diffusion`.
        defaults: what a request gets where it says nothing, and its bounds.
        begins: whether there can be a picture to begin from.
        needs_image: whether there must be one.
        takes_mask: whether there can be a mask over that picture.
        needs_mask: whether it only draws under one.
        reads_text: whether it is told what to draw in words.
    """

    name: str
    kind: str
    defaults: Defaults
    begins: bool
    needs_image: bool
    takes_mask: bool
    needs_mask: bool
    reads_text: bool

    @classmethod
    def of(cls, pipeline: Pipeline) -> Facts:
        """Those of an opened bundle."""
        model = pipeline.bundle.manifest.model
        upscales = model.upscaling is not None
        return cls(
            name=model.name,
            kind=model.kind,
            defaults=pipeline.defaults,
            begins=upscales or any(record.component == "encoder" for record in pipeline.bundle.manifest.engines),
            needs_image=upscales or model.inpainting or pipeline.defaults.refines,
            takes_mask=not upscales and not pipeline.defaults.refines,
            needs_mask=model.inpainting,
            reads_text=bool(model.tokenizers),
        )


class Step(Protocol):
    """A step that was made: what a server needs of `ldmrt.serving.handle.Progress`, which says what the fields are."""

    @property
    def image(self) -> int:
        """Which image of the request."""

    @property
    def step(self) -> int:
        """Which step of it."""

    @property
    def steps(self) -> int:
        """How many there are."""

    @property
    def preview(self) -> Image.Image | None:
        """What the image is going to be."""


OnStep = Callable[[Step], object]


class Engine(Protocol):
    """Takes requests from any thread, and never lets a caller wait for the model. `ldmrt.serving.Batcher` is one."""

    @property
    def facts(self) -> Facts:
        """What it draws."""

    @property
    def state(self) -> State:
        """What can be expected of it now."""

    @property
    def restarts(self) -> int:
        """How often what makes the pictures had to be started again."""

    def submit(
        self,
        request: Request,
        *,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        timeout: float | None = None,
        on_progress: OnStep | None = None,
        previews: int = 0,
    ) -> Handle:
        """Hand in a request: see `Batcher.submit`."""

    def stats(self) -> Stats:
        """What was done until now."""

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, finish what was accepted or end it with `Cancelled`, and end."""
