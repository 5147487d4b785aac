"""Whole pictures by every sampler: diffusers' latents with the tiny model, and the right picture with the built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldmrt.pipeline import Pipeline
from ldmrt.samplers.registry import SAMPLERS
from tests.samplers.oracle import scheduler_class
from tests.samplers.test_make import OPTIONS, pytestmark as ignored_warnings

pytestmark = ignored_warnings

# One evaluation differs by diffusers' float32 noise levels, by up to 3e-5; some steps with guidance make a little more of it.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


# The path that DPM++ SDE draws there is a tree of torchsde's, whose numbers are its own.
@pytest.mark.parametrize(
    ("name", "rescale"),
    [*((name, 0.0) for name in SAMPLERS if name != "dpm++ sde"), ("ddim", 0.7), ("heun", 0.3), ("unipc", 1.0)],
)
def test_latents_are_diffusers(pipe: Pipeline, reference: Any, name: str, rescale: float) -> None:
    config, original = reference.scheduler.config, reference.scheduler
    reference.scheduler = scheduler_class(SAMPLERS[name].scheduler).from_config(config, **OPTIONS.get(name, {}))
    given: dict[str, Any] = {
        "prompt": "a red circle",
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "guidance_rescale": rescale,
        "output_type": "latent",
    }
    try:
        theirs = reference(**given, generator=torch.Generator("cpu").manual_seed(3)).images
    finally:
        reference.scheduler = original
    ours = pipe(**given, seed=3, sampler=name).latents
    assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE


@pytest.mark.parametrize("name", [*SAMPLERS, "Euler a Karras", "DPM++ 2M Karras", "DPM++ 2M SDE Exponential"])
def test_a_red_circle_is_a_red_circle(shapes: Pipeline, name: str) -> None:
    """By a red region as large and as round as a circle is, on white. The model was not distilled, so LCM and TCD blur it."""
    # These two extrapolate their last four evaluations, and overshoot at 20 steps with the model's guidance of 5; so does diffusers.
    given: dict[str, Any] = {"guidance_scale": 2.5} if name in ("pndm", "lms") else {}
    result = shapes("a large red circle on a white background", seed=1, sampler=name, output_type="np", **given)
    assert result.job.num_inference_steps == 20
    picture = result.images[0]
    red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.4) & (picture[..., 2] < 0.4)
    white = (picture > 0.8).all(-1)
    assert 0.1 < red.mean() < 0.35
    assert white.mean() > 0.5
    rows, columns = np.nonzero(red)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - width) <= 12
    assert abs(red.sum() / (height * width) - np.pi / 4) < 0.1


@pytest.fixture(scope="module")
def shapes() -> Pipeline:
    return Pipeline.from_bundle(device="cpu")
