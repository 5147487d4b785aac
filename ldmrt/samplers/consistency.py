"""Samplers of consistency models: they jump to the denoised estimate, or near it, and add noise again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldmrt.errors import BadRequest
from ldmrt.kernels.sampler import Column
from ldmrt.samplers.ddim import visible
from ldmrt.samplers.table import SamplerTable, assign, blank_rows, noise_estimate, on_unit_variance, set_denoised
from ldmrt.schedule import NoiseSchedule

# The deviation of the data that the boundary conditions are scaled by.
_SIGMA_DATA = 0.5


def lcm(schedule: NoiseSchedule, num_inference_steps: int, *, begin: int = 0) -> SamplerTable:
    """Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.original_inference_steps.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range, or the schedule cannot be sampled with them.
    """
    timesteps = _skipped(schedule, num_inference_steps)[begin:]
    alpha = visible(schedule, timesteps)
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)
    alpha_next = np.append(schedule.alphas_cumprod[timesteps[1:]], 1.0)
    time = timesteps * schedule.timestep_scaling
    skip = _SIGMA_DATA**2 / (time**2 + _SIGMA_DATA**2)
    out = time / np.sqrt(time**2 + _SIGMA_DATA**2)

    rows = blank_rows(len(timesteps))
    set_denoised(rows, schedule, signal, noise, clips=True, thresholds=True)
    kept = np.sqrt(alpha_next)
    assign(rows, Column.NEXT_X, x=kept * skip, d=kept * out, noise=np.sqrt(1.0 - alpha_next))
    return on_unit_variance("lcm", timesteps, rows, signal, noise, _all_but_the_last(len(timesteps)))


def tcd(schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0, *, begin: int = 0) -> SamplerTable:
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159, algorithm 4).

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.original_inference_steps.
        eta: gamma of the paper: 0 for no noise, 1 for multistep consistency sampling.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range, or the schedule cannot be sampled with them.
    """
    timesteps = _skipped(schedule, num_inference_steps)[begin:]
    alpha = visible(schedule, timesteps)
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)
    following = np.append(timesteps[1:], 0)
    landing = np.floor((1 - eta) * following).astype(np.int64)
    alpha_next, alpha_landing = schedule.alphas_cumprod[following], schedule.alphas_cumprod[landing]
    ratio = alpha_next / alpha_landing
    of_x, of_m = noise_estimate(schedule.prediction_type, signal, noise)
    grown, drift = np.sqrt(ratio * alpha_landing), np.sqrt(ratio * (1.0 - alpha_landing))

    rows = blank_rows(len(timesteps))
    set_denoised(rows, schedule, signal, noise)
    assign(rows, Column.NEXT_X, x=drift * of_x, m=drift * of_m, d=grown, noise=np.sqrt(1.0 - ratio))
    draws = _all_but_the_last(len(timesteps)) & (eta > 0)
    return on_unit_variance("tcd", timesteps, rows, signal, noise, draws)


def _all_but_the_last(count: int) -> NDArray[np.bool_]:
    return np.arange(count) < count - 1


def _skipped(schedule: NoiseSchedule, count: int) -> NDArray[np.int64]:
    """Timesteps from noisy to clean, int64 (count,): some of those that the model was distilled at."""
    original = schedule.original_inference_steps
    if not 1 <= count <= original:
        raise BadRequest(
            f"num_inference_steps is {count}, expected 1 to {original}, the steps that the model was distilled with"
            " (original_inference_steps)",
            param="num_inference_steps",
        )
    if original > schedule.train_steps:
        raise BadRequest(
            f"original_inference_steps is {original}, expected at most {schedule.train_steps}",
            param="original_inference_steps",
        )
    distilled = np.arange(original, 0, -1) * (schedule.train_steps // original) - 1
    return distilled[np.floor(np.linspace(0, original, count, endpoint=False)).astype(np.int64)]
