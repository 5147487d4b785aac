"""A request inside the batcher, and its images, each of which waits and runs by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ldmrt.delivery import OutputType
from ldmrt.material import Material
from ldmrt.request import Job
from ldmrt.samplers.table import SamplerTable
from ldmrt.serving.handle import Handle, OnProgress
from ldmrt.text import Windows


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request.

    Attributes:
        handle: what the caller holds.
        job: what was asked.
        table: the sampler.
        windows: the tokens of each prompt.
        material: what else it brings.
        output_type: how the pictures are delivered.
        previews: how many pictures of each image are wanted on its way.
        on_progress: called after every step of every image.
        priority: the greater starts first.
        submitted: when, by the batcher's clock, in seconds.
        due: until when it must be finished, or None.
        started: when its first image was admitted, or None.
        running: how many of its images are in a batch.
        error: what it is to end with, once none of its images runs.
        ended: whether the caller has been told.
        latents: of the images that are finished, (C, h, w) float32 on the CPU, by number.
        pictures: the same decoded, (3, H, W).
    """

    handle: Handle
    job: Job
    table: SamplerTable
    windows: Sequence[Windows]
    material: Material
    output_type: OutputType
    previews: int
    on_progress: OnProgress | None
    priority: int
    submitted: float
    due: float | None
    started: float | None = None
    running: int = 0
    error: BaseException | None = None
    ended: bool = False
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    pictures: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.job.width, self.job.height

    @property
    def rows(self) -> int:
        """Rows of the model's batch that each image takes."""
        return 2 if self.job.do_cfg else 1

    @cached_property
    def preview_steps(self) -> frozenset[int]:
        """The steps after which there is a preview: as many equal parts of the way as there are pictures, the last one included."""
        steps = self.table.num_steps
        return frozenset(round(part * steps / (self.previews + 1)) - 1 for part in range(1, self.previews + 1)) - {-1}

    def images(self) -> list[Image]:
        """One for each seed."""
        return [Image(self, number) for number in range(self.job.num_images)]


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a request: `number` counts from 0."""

    ticket: Ticket
    number: int

    @property
    def evaluations(self) -> int:
        """How often the model runs for it: what it costs."""
        return self.ticket.table.evaluations

    @property
    def windows(self) -> Windows:
        """Its prompt's tokens, and its negative prompt's."""
        return self.ticket.windows[self.number // self.ticket.job.num_images_per_prompt]

    @property
    def tokens(self) -> int:
        """The length of its text."""
        ours, _ = self.windows
        return ours[0].ids.size if ours else 0

    def job(self) -> Job:
        """The part of the request that concerns this image."""
        job = self.ticket.job
        prompt = self.number // job.num_images_per_prompt
        return replace(
            job,
            prompts=job.prompts[prompt : prompt + 1],
            negative_prompts=job.negative_prompts[prompt : prompt + 1],
            num_images_per_prompt=1,
            seeds=job.seeds[self.number : self.number + 1],
            variation_seeds=job.variation_seeds[self.number : self.number + 1],
        )
