"""Estimates of the picture under way against diffusers' `pred_original_sample`, with a stand-in for the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.estimate import estimate
from ldmrt.samplers.make import sampler_table
from ldmrt.schedule import NoiseSchedule
from tests.samplers import oracle

STEPS = 7


def config(prediction: str) -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "prediction_type": prediction,
    }


# diffusers' own, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_it_is_what_diffusers_estimates(name: str) -> None:
    """For samplers that add no noise, and a model that predicts noise, to rounding."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    options = config("epsilon")
    if name == "euler":
        del options["clip_sample"]
    scheduler: Any = (DDIMScheduler if name == "ddim" else EulerDiscreteScheduler)(**options)
    scheduler.set_timesteps(STEPS)
    table = sampler_table(name, NoiseSchedule.from_config(scheduler.config), STEPS)
    generator = torch.Generator().manual_seed(oracle.SEED)
    x = torch.randn(1, *oracle.SHAPE, generator=generator) * scheduler.init_noise_sigma
    for made, (told, timestep) in enumerate(zip(table.timesteps.tolist(), scheduler.timesteps, strict=True), 1):
        output = oracle.model(scheduler.scale_model_input(x, timestep), told)
        stepped = scheduler.step(output, timestep, x)
        x = stepped.prev_sample
        of_latents, of_output = estimate(table, NoiseSchedule.from_config(scheduler.config), made)
        found = of_latents * x + of_output * output
        expected = stepped.pred_original_sample if made < STEPS else x
        assert (found - expected).norm() / expected.norm() < 1e-4, made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler a", "dpm++ 2m karras", "lcm"])
def test_of_a_model_that_knows_the_picture_it_is_the_picture(name: str, prediction: str) -> None:
    """Latents of the next level's noise, and an output that says exactly that noise, whatever the sampler."""
    schedule = NoiseSchedule.from_config(config(prediction))
    table = sampler_table(name, schedule, STEPS)
    picture, noise = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for made in range(1, STEPS):
        timestep = float(table.timesteps[made])
        at = int(timestep)
        low, high = (schedule.alphas_cumprod[min(t, 999)] for t in (at, at + 1))
        sigmas = [((1 - alpha) / alpha) ** 0.5 for alpha in (low, high)]
        sigma = sigmas[0] ** (1 - (timestep - at)) * sigmas[1] ** (timestep - at)  # between timesteps, as Karras' are
        alpha = 1 / (1 + sigma**2)
        given = alpha**0.5 * picture + (1 - alpha) ** 0.5 * noise
        output = {
            "epsilon": noise,
            "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * picture,
            "sample": picture,
        }[prediction]
        latents = given / float(table.coefficients[made - 1, Column.NEXT_INPUT_SCALE])
        of_latents, of_output = estimate(table, schedule, made)
        assert torch.allclose(of_latents * latents + of_output * output, picture, atol=1e-9)
