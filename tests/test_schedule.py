"""Sampler tables against diffusers, after every step, on random model outputs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler

from ldmrt.errors import BadRequest, BundleError
from ldmrt.kernels.sampler import WIDTH, Basis, Column
from ldmrt.schedule import SAMPLERS, NoiseSchedule, blank_rows, ddim, sampler_table

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}

# diffusers keeps alphas_cumprod in float32: 1 - a at small t then carries a relative error of 2**-24 / 1e-3 = 6e-5, and
# its square root and the products with it up to half of that at each step. The table is made in float64, so this is the
# distance from diffusers, not from the formula.
TOLERANCE = 1e-4


def apply_row(row: np.ndarray[Any, Any], x: torch.Tensor, m: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The update of one slot as written in the column list, for a sampler without saved x and history."""
    c = torch.from_numpy(row).to(x.dtype).tolist()
    d = c[Column.DENOISED_X] * x + c[Column.DENOISED_M] * m
    d = d.clamp(-c[Column.CLIP], c[Column.CLIP])
    basis = {Basis.X: x, Basis.M: m, Basis.D: d, Basis.NOISE: noise}
    return torch.stack([c[Column.NEXT_X + offset] * value for offset, value in basis.items()]).sum(0)


def compare_with_diffusers(config: dict[str, Any], steps: int, eta: float, *, float64: bool = False) -> None:
    """Step both. With float64, diffusers' code runs in float64 on our alphas_cumprod, and has to agree to 1e-9."""
    oracle = DDIMScheduler(**config)
    oracle.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(dict(oracle.config) | {"_class_name": "DDIMScheduler"})
    table = ddim(schedule, steps, eta)
    dtype, tolerance = (torch.float64, 1e-9) if float64 else (torch.float32, TOLERANCE)
    if float64:
        oracle.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
        oracle.final_alpha_cumprod = torch.tensor(schedule.final_alpha_cumprod, dtype=dtype)
    assert table.timesteps.tolist() == oracle.timesteps.tolist()
    generator = torch.Generator("cpu").manual_seed(0)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=generator, dtype=dtype)
    for index, timestep in enumerate(oracle.timesteps):
        m = torch.randn(ours.shape, generator=generator, dtype=dtype)
        noise = torch.randn(ours.shape, generator=generator, dtype=dtype)
        theirs = oracle.step(m, timestep, theirs, eta=eta, variance_noise=noise if eta > 0 else None).prev_sample
        ours = apply_row(table.coefficients[index], ours, m, noise)
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < tolerance, f"step {index}: relative error {error:.1e}"


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_ddim_is_diffusers(steps: int, prediction: str, spacing: str, eta: float, clip: bool) -> None:
    config = {"prediction_type": prediction, "timestep_spacing": spacing, "clip_sample": clip}
    compare_with_diffusers(STABLE_DIFFUSION | config, steps, eta)
    compare_with_diffusers(STABLE_DIFFUSION | config, steps, eta, float64=True)


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(steps: int, eta: float, prediction: str) -> None:
    config = {"prediction_type": prediction, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    compare_with_diffusers(STABLE_DIFFUSION | config, steps, eta)
    compare_with_diffusers(STABLE_DIFFUSION | config, steps, eta, float64=True)
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | config)
    assert schedule.alphas_cumprod[-1] == 0.0
    # With eta = 1 the first step takes nothing of noise_hat. There is no oracle: diffusers takes the root of a rounding
    # error, which is 2e-4 or NaN.
    assert ddim(schedule, steps, 1.0).coefficients[0, Column.NEXT_X + Basis.M] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
        {"num_train_timesteps": 200, "clip_sample_range": 2.5},
        {"set_alpha_to_one": False},
        {"set_alpha_to_one": True, "steps_offset": 0},
    ],
    ids=lambda config: next(iter(config)) + "=" + str(next(iter(config.values())))[:20],
)
def test_other_schedules(config: dict[str, Any]) -> None:
    for steps in (7, 30):
        compare_with_diffusers(config, steps, 0.3)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_of_every_count(spacing: Any) -> None:
    oracle = DDIMScheduler(timestep_spacing=spacing)
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for steps in range(1, 1001):
        oracle.set_timesteps(steps)
        # diffusers' arange yields an extra element, timestep -1, at a few counts of "trailing"
        assert ddim(schedule, steps).timesteps.tolist() == oracle.timesteps.tolist()[:steps]


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
    ],
)
def test_left_out_keys_mean_what_the_class_means(oracle: Any, clips: bool) -> None:
    full = dict(oracle().config)
    schedule = NoiseSchedule.from_config({"_class_name": oracle.__name__})
    assert schedule == NoiseSchedule.from_config(full | {"_class_name": oracle.__name__})
    assert schedule.timestep_spacing == full["timestep_spacing"]
    assert schedule.clip_sample_range == (1.0 if clips else math.inf)
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle().alphas_cumprod, rtol=2e-5)


def test_dict_form_is_small_strict_json_and_comes_back() -> None:
    for schedule in (
        NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"}),
        NoiseSchedule(train_steps=3, trained_betas=(0.1, 0.2, 0.3), clip_sample_range=1.0),
    ):
        text = json.dumps(schedule.to_dict(), allow_nan=False)
        assert len(text) < 500
        assert NoiseSchedule.from_dict(json.loads(text)) == schedule
    for bad in ({"wrong": 1}, {"train_steps": "many"}, {"prediction_type": "flow"}, {"clip_sample_range": -1.0}):
        with pytest.raises(BundleError, match="build the bundle again"):
            NoiseSchedule.from_dict(bad)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"thresholding": True}, "thresholding is true"),
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


def test_bad_arguments() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"timestep_spacing": "leading"})
    for steps in (0, -1, 1001):
        with pytest.raises(BadRequest, match="expected 1 to 1000") as caught:
            ddim(schedule, steps)
        assert caught.value.param == "num_inference_steps"
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(BadRequest, match="expected a number from 0 to 1") as caught:
            ddim(schedule, 4, eta)
        assert caught.value.param == "eta"
    with pytest.raises(BadRequest, match="begin at timestep 1000, but the model was trained up to 999"):
        ddim(schedule, 1000)
    with pytest.raises(BadRequest, match="no sampler 'euler', expected one of: ddim") as caught:
        sampler_table("euler", schedule, 4)
    assert caught.value.param == "sampler"
    with pytest.raises(BadRequest, match="pure noise"):
        ddim(NoiseSchedule(zero_terminal_snr=True, timestep_spacing="trailing"), 4)


def test_table_shape_and_flags() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    table = sampler_table("ddim", schedule, 5)
    assert set(SAMPLERS) == {"ddim"}
    assert table.name == "ddim"
    assert table.coefficients.shape == (5, WIDTH)
    assert table.coefficients.dtype == np.float64
    assert table.timesteps.dtype == np.float64
    assert table.evaluations == 5
    assert table.steps.tolist() == [0, 1, 2, 3, 4]
    assert not table.uses_noise
    assert (table.initial_input_scale, table.initial_noise_scale) == (1.0, 1.0)
    assert ddim(schedule, 5, 0.1).draws_noise.tolist() == [True] * 5
    assert not table.coefficients[:, Column.PUSH].any()
    assert (table.coefficients[:, 29:] == 0).all()
    for steps in (1, 999):
        for eta in (0.0, 1.0):
            finite = np.delete(ddim(schedule, steps, eta).coefficients, Column.CLIP, axis=1)
            assert np.isfinite(finite).all()


def test_a_blank_row_changes_nothing() -> None:
    x, m, noise = torch.randn(3, 1, 4, 2, 2)
    assert torch.equal(apply_row(blank_rows(1)[0], x, m, noise), x)
