"""DPM-Solver++: solvers of the denoised estimate's exponential integral (Lu et al. 2022, arXiv 2211.01095).

Notation: s is the noise level, sigma / alpha of the paper, and lambda = -log s, so that exp(-h) = s_next / s.
"""

from __future__ import annotations

import numpy as np

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.levels import levels, solver_levels, timestep_of
from ldmrt.samplers.registry import SigmaSpacing
from ldmrt.samplers.sigma import ancestral, two_stages
from ldmrt.samplers.table import Float64, SamplerTable, assign, blank_rows, on_unit_variance, set_denoised
from ldmrt.schedule import NoiseSchedule


def dpm_2m(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), the first and the last step of first order.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        sigmas: the spacing of the noise levels.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range.
    """
    return _multistep("dpm++ 2m", schedule, num_inference_steps, sigmas, begin, stochastic=False)


def dpm_2m_sde(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 5). The arguments are those of `dpm_2m`.

    Noise is drawn in the last step too, where it has no weight, as in diffusers.
    """
    return _multistep("dpm++ 2m sde", schedule, num_inference_steps, sigmas, begin, stochastic=True)


def _multistep(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    spacing: SigmaSpacing | None,
    begin: int,
    *,
    stochastic: bool,
) -> SamplerTable:
    at = solver_levels(
        schedule, num_inference_steps, spacing, begin, rounded_karras=schedule.beta_schedule != "squaredcos_cap_v2"
    )
    signal = 1.0 / np.sqrt(1.0 + at.sigmas**2)
    here, there = at.sigmas[:-1], at.sigmas[1:]
    shrink = there / here
    kept = shrink**2 if stochastic else shrink
    of_x = signal[1:] / signal[:-1] * kept
    of_d = signal[1:] * (1.0 - kept)
    noise = signal[1:] * there * np.sqrt(1.0 - shrink**2) if stochastic else 0.0

    # D1 / 2 = (d - h1) / (2 r), r = h_before / h; of second order are all steps but the first and the last.
    half = np.zeros(len(here))
    step = -np.diff(np.log(here))
    half[1:-1] = step[1:] / step[:-1] / 2

    rows = blank_rows(len(here))
    level = signal[:-1], signal[:-1] * here
    set_denoised(rows, schedule, *level, thresholds=True)
    assign(rows, Column.NEXT_X, x=of_x, d=of_d * (1 + half), h1=-of_d * half, noise=noise)
    assign(rows, Column.PUSHED, d=1.0)
    return on_unit_variance(name, at.timesteps, rows, *level, np.full(len(here), stochastic))


def dpm_sde(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """SDE-DPM-Solver++ of second order in single steps (k-diffusion's sample_dpmpp_sde, with r = 1/2 and eta = 1).

    A step goes to the middle of its noise levels' logarithms, and from its start again to its end. Both add the noise of one
    Brownian path: that of the whole step is that of its first part, kept in h1, and fresh noise for the rest.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        sigmas: the spacing of the noise levels.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range.
    """
    at = levels(schedule, num_inference_steps, sigmas, begin)
    here, there = at.sigmas[:-1], at.sigmas[1:]
    middle = np.sqrt(here * there)  # 0 in the last step, which makes it Euler's
    rows, first, second = two_stages(schedule, here, middle[:-1])
    of_x, of_d, up = _stochastic(here, middle)
    assign(first, Column.NEXT_X, x=of_x, d=of_d, noise=up)
    assign(first, Column.NEXT_SAVED, x=1.0)
    assign(first, Column.PUSHED, noise=1.0)
    of_x, of_d, up = _stochastic(here[:-1], there[:-1])
    share = (here - middle)[:-1] / (here - there)[:-1]
    assign(second, Column.NEXT_X, saved=of_x, d=of_d, h1=up * np.sqrt(share), noise=up * np.sqrt(1 - share))
    return at.double(
        "dpm++ sde", rows, middle[:-1], timestep_of(schedule, middle[:-1]), first_noise=True, second_noise=True
    )


def _stochastic(here: Float64, there: Float64) -> tuple[Float64, Float64, Float64]:
    """The coefficients of x, of d and of noise in a step with eta = 1."""
    down, up = ancestral(here, there)
    return down / here, 1.0 - down / here, up
