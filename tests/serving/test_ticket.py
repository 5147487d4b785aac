"""A request cut into images."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from ldmrt import material
from ldmrt.bundle import Bundle
from ldmrt.manifest import ModelRecord
from ldmrt.opening import builtin_bundle
from ldmrt.request import Defaults, Request, resolve
from ldmrt.samplers.make import sampler_table
from ldmrt.schedule import NoiseSchedule
from ldmrt.serving.handle import Handle
from ldmrt.serving.ticket import Ticket
from ldmrt.tokenizer import TokenWindows

DEFAULTS = Defaults(width=64, height=64, num_inference_steps=8, guidance_scale=5.0, sizes=((64, 64),))
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@cache
def shapes() -> ModelRecord:
    return Bundle.open(builtin_bundle()).manifest.model


def _windows(count: int) -> TokenWindows:
    return TokenWindows(np.zeros((count, 77), np.int64), np.ones((count, 77), np.float32), "")


def ticket(previews: int = 0, **fields: Any) -> Ticket:
    job = resolve(Request(**{"prompt": "a", "seed": 5, "sampler": "heun", **fields}), DEFAULTS)
    windows = [((_windows(1 + number),), (_windows(1),)) for number in range(2)]
    return Ticket(
        handle=Handle(job, lambda: False),
        job=job,
        table=sampler_table(job.sampler, SCHEDULE, job.num_inference_steps),
        windows=windows,
        material=material.resolve(shapes(), job),
        output_type="pil",
        previews=previews,
        on_progress=None,
        priority=0,
        submitted=0.0,
        due=None,
    )


def test_every_image_is_a_job_of_its_own() -> None:
    made = ticket(prompt=["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2)
    jobs = [image.job() for image in made.images()]
    assert [(job.prompts, job.negative_prompts, job.seeds) for job in jobs] == [
        (("a",), ("c",), (5,)),
        (("a",), ("c",), (6,)),
        (("b",), ("d",), (7,)),
        (("b",), ("d",), (8,)),
    ]
    assert {job.num_images for job in jobs} == {1}
    assert [image.tokens for image in made.images()] == [77, 77, 154, 154]
    assert {image.evaluations for image in made.images()} == {15}


def test_every_image_has_its_own_variation() -> None:
    made = ticket(num_images_per_prompt=3, variation_seed=9, variation_strength=0.2)
    jobs = [image.job() for image in made.images()]
    assert [(job.seeds, job.variation_seeds, job.variation_strength) for job in jobs] == [
        ((5,), (9,), 0.2),
        ((5,), (10,), 0.2),
        ((5,), (11,), 0.2),
    ]


@pytest.mark.parametrize(("guidance", "rows"), [(5.0, 2), (1.0, 1)])
def test_rows(guidance: float, rows: int) -> None:
    assert ticket(guidance_scale=guidance).rows == rows


@pytest.mark.parametrize(
    ("previews", "steps", "after"),
    [(0, 8, set()), (1, 8, {3}), (3, 8, {1, 3, 5}), (1, 4, {1}), (2, 2, {0}), (9, 3, {0, 1, 2}), (1, 1, set())],
)
def test_previews_are_evenly_spaced(previews: int, steps: int, after: set[int]) -> None:
    assert ticket(previews, num_inference_steps=steps).preview_steps == after
