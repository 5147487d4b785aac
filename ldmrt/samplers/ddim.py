"""DDIM and DDPM: from one training timestep to an earlier one, by way of the denoised estimate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldmrt.errors import BadRequest
from ldmrt.kernels.sampler import Column
from ldmrt.samplers.levels import training_timesteps
from ldmrt.samplers.table import (
    Float64,
    SamplerTable,
    assign,
    blank_rows,
    noise_estimate,
    on_unit_variance,
    set_denoised,
)
from ldmrt.schedule import NoiseSchedule


def ddim(schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0, *, begin: int = 0) -> SamplerTable:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eqs. 12 and 16), with diffusers' choices where the paper leaves room.

    Each step turns x_t into

        sqrt(a_prev) clip(x_0) + sqrt(1 - a_prev - sigma^2) noise_hat + sigma z

    where x_0 and noise_hat are both linear in x_t and the model output, noise_hat is *not* derived again from the clipped
    x_0, and the previous timestep is t - train_steps // steps whatever the spacing.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        eta: 0 for the deterministic sampler, 1 for the noise of DDPM.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range, or the schedule cannot be sampled with them.
    """
    timesteps = training_timesteps(schedule, num_inference_steps, begin)
    alpha = visible(schedule, timesteps)
    previous = timesteps - schedule.train_steps // num_inference_steps
    alpha_previous = np.where(
        previous >= 0, schedule.alphas_cumprod[np.maximum(previous, 0)], schedule.final_alpha_cumprod
    )
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)
    variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - alpha / alpha_previous)
    sigma = eta * np.sqrt(variance)
    # Rounding may leave -1e-17 where the exact value is 0: eta = 1, last step.
    direction = np.sqrt(np.maximum(1.0 - alpha_previous - sigma**2, 0.0))
    of_x, of_m = noise_estimate(schedule.prediction_type, signal, noise)

    rows = blank_rows(len(timesteps))
    set_denoised(rows, schedule, signal, noise, clips=True, thresholds=True)
    assign(rows, Column.NEXT_X, x=direction * of_x, m=direction * of_m, d=np.sqrt(alpha_previous), noise=sigma)
    # Noise is drawn even where sigma is 0, to use up a generator as diffusers does.
    return on_unit_variance("ddim", timesteps, rows, signal, noise, np.full(len(timesteps), eta > 0))


def ddpm(schedule: NoiseSchedule, num_inference_steps: int, *, begin: int = 0) -> SamplerTable:
    """DDPM (Ho et al. 2020, arXiv 2006.11239, eqs. 7 and 15) with the small variance, between the timesteps that are visited.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range, or the schedule cannot be sampled with them.
    """
    timesteps = training_timesteps(schedule, num_inference_steps, begin)
    alpha = visible(schedule, timesteps)
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)
    alpha_previous = np.append(schedule.alphas_cumprod[timesteps[1:]], 1.0)
    beta = 1.0 - alpha / alpha_previous
    draws = timesteps > 0

    rows = blank_rows(len(timesteps))
    set_denoised(rows, schedule, signal, noise, clips=True, thresholds=True)
    assign(
        rows,
        Column.NEXT_X,
        x=np.sqrt(1.0 - beta) * (1.0 - alpha_previous) / (1.0 - alpha),
        d=np.sqrt(alpha_previous) * beta / (1.0 - alpha),
        noise=np.where(draws, np.sqrt((1.0 - alpha_previous) / (1.0 - alpha) * beta), 0.0),
    )
    return on_unit_variance("ddpm", timesteps, rows, signal, noise, draws)


def visible(schedule: NoiseSchedule, timesteps: NDArray[np.int64]) -> Float64:
    """The alphas_cumprod of timesteps at which the model's output says something about the picture.

    Raises:
        BadRequest: it predicts the noise of nothing but noise.
    """
    alpha = schedule.alphas_cumprod[timesteps]
    if schedule.prediction_type == "epsilon" and not alpha.all():
        raise BadRequest(
            "the schedule's last timestep is pure noise (rescale_betas_zero_snr), where a model with prediction_type"
            ' "epsilon" says nothing about the picture: expected "v_prediction" or "sample"',
            param="prediction_type",
        )
    return alpha
