"""A base model and a refiner, each for its part of the schedule: an ensemble of expert denoisers (Balaji et al. 2022, arXiv 2211.01324), as
Stable Diffusion XL is meant to be used (Podell et al. 2023, arXiv 2307.01952, section 2.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldmrt.pipeline import Pipeline, Result
from ldmrt.request import Job, Request, resolve

# As diffusers and the makers of Stable Diffusion XL recommend it.
START = 0.8


@dataclass(frozen=True)
class Refining:
    """What a refiner does for the pictures of a base model.

    Attributes:
        refiner: the model that finishes them.
        start: the share of the schedule after which it takes over, between 0 and 1.
    """

    refiner: Pipeline
    start: float = START

    def plan(self, base: Pipeline, job: Job) -> int:
        """Check that both can do their part of a job of the base model's, before any work.

        Returns:
            How many steps they make together.

        Raises:
            BadRequest: one cannot: the refiner has no engine for the size, or there is no step for one of them.
        """
        request = Request(
            prompt=job.prompts,
            num_inference_steps=job.num_inference_steps,
            sampler=job.sampler,
            eta=job.eta,
            width=job.width,
            height=job.height,
            has_image=True,
            denoising_start=self.start,
        )
        finished = resolve(request, self.refiner.defaults)
        begun = replace(job, span=replace(job.span, denoising_end=self.start))
        return base.table(begun).num_steps + self.refiner.table(finished).num_steps

    def draw(self, base: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any) -> Result:
        """Make pictures with both.

        Args:
            base: the model that begins them.
            seeds: one for each image; a generator of each serves both models, so that no noise is drawn twice.
            own: arguments for the base model alone, such as `image` and `control_image`.
            arguments: for both; see `ldmrt.pipeline.Pipeline`.

        Raises:
            BadRequest: see `Pipeline`, as for the next.
            NumericalError: a model made NaN or infinity.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        prompt = arguments.get("prompt", "")
        each = len(seeds) if isinstance(prompt, str) else len(seeds) // len(prompt)
        asked = {**arguments, "num_images_per_prompt": each, "generator": generators}
        begun = base(**{**asked, **own, "denoising_end": self.start, "output_type": "latent"})
        finished = self.refiner(**asked, image=begun.latents, denoising_start=self.start)
        stages = {**begun.timings, **finished.timings}
        timings = {stage: begun.timings.get(stage, 0.0) + finished.timings.get(stage, 0.0) for stage in stages}
        return replace(finished, seeds=tuple(seeds), timings=timings)
