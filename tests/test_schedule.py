"""Noise schedules against diffusers'."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from ldmrt.errors import BadRequest, BundleError
from ldmrt.schedule import NoiseSchedule

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def test_alphas_cumprod_is_the_product_in_float64() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.alphas_cumprod.shape == (1000,)
    np.testing.assert_allclose(schedule.alphas_cumprod, DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod, rtol=2e-5)
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0]
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1.0


@pytest.mark.parametrize(
    ("oracle", "clips"),
    [
        (DDIMScheduler, True),
        (DDPMScheduler, True),
        (PNDMScheduler, False),
        (EulerDiscreteScheduler, False),
        (LCMScheduler, False),
        (TCDScheduler, False),
    ],
)
def test_left_out_keys_mean_what_the_class_means(oracle: Any, clips: bool) -> None:
    full = dict(oracle().config)
    schedule = NoiseSchedule.from_config({"_class_name": oracle.__name__})
    # Where a file says nothing of the spacing, it is the sampler's that is used, not that of the class of the file.
    assert schedule.timestep_spacing is None
    full["timestep_spacing"] = None
    assert schedule == NoiseSchedule.from_config(full | {"_class_name": oracle.__name__})
    assert schedule.clip_sample_range == (1.0 if clips else math.inf)
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle().alphas_cumprod, rtol=2e-5)


def test_dict_form_is_small_strict_json_and_comes_back() -> None:
    for schedule in (
        NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"}),
        NoiseSchedule(train_steps=3, trained_betas=(0.1, 0.2, 0.3), clip_sample_range=1.0),
        NoiseSchedule(thresholding=True, dynamic_thresholding_ratio=0.9, timestep_spacing="trailing"),
    ):
        text = json.dumps(schedule.to_dict(), allow_nan=False)
        assert len(text) < 700
        assert NoiseSchedule.from_dict(json.loads(text)) == schedule
    huge = 10**400
    for bad in (
        {"wrong": 1},
        {"train_steps": "many"},
        {"prediction_type": "flow"},
        {"clip_sample_range": -1.0},
        {"clip_sample_range": huge},
        {"sample_max_value": huge},
        {"timestep_scaling": huge},
    ):
        with pytest.raises(BundleError, match="build the bundle again"):
            NoiseSchedule.from_dict(bad)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio is 1.5"),
        ({"sample_max_value": 0}, "sample_max_value is 0"),
        ({"original_inference_steps": 0}, "original_inference_steps is 0, expected at least 1"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected one of: linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is 2 values, expected 1000"),
        ({"beta_end": 3.0}, "betas is 0.0001 to 3"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"clip_sample": True, "clip_sample_range": 0.0}, "clip_sample_range is 0.0"),
        ({"beta_start": "low"}, "wrong type"),
        ({"beta_start": [1]}, "wrong type"),
    ],
)
def test_unsupported_configs(config: dict[str, Any], found: str) -> None:
    with pytest.raises(BadRequest) as caught:
        NoiseSchedule.from_config(config)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_noise_levels() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    alphas = DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.double()
    np.testing.assert_allclose(schedule.sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-4)
    flawless = NoiseSchedule.from_config(STABLE_DIFFUSION | {"rescale_betas_zero_snr": True})
    assert flawless.alphas_cumprod[-1] == 0.0
    assert flawless.sigmas[-1] == pytest.approx(4096.0)
