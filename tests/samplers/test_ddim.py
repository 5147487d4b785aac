"""DDIM against diffusers in float64, to the ninth digit, on random model outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ldmrt.kernels.sampler import Basis, Column
from ldmrt.samplers.ddim import ddim
from ldmrt.samplers.table import blank_rows
from ldmrt.schedule import NoiseSchedule
from tests.samplers.oracle import STABLE_DIFFUSION, TOLERANCE

CONFIG = STABLE_DIFFUSION | {"set_alpha_to_one": False}


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
    compare_with_diffusers(CONFIG | config, steps, eta)
    compare_with_diffusers(CONFIG | config, steps, eta, float64=True)


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(steps: int, eta: float, prediction: str) -> None:
    config = {"prediction_type": prediction, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    compare_with_diffusers(CONFIG | config, steps, eta)
    compare_with_diffusers(CONFIG | config, steps, eta, float64=True)
    schedule = NoiseSchedule.from_config(CONFIG | config)
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


def test_a_blank_row_changes_nothing() -> None:
    x, m, noise = torch.randn(3, 1, 4, 2, 2)
    assert torch.equal(apply_row(blank_rows(1)[0], x, m, noise), x)
