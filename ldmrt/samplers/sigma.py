"""Samplers of the probability flow in noise levels: Euler, Heun, DPM2 and linear multistep, with ancestral noise or without.

Latents are x_0 + sigma n here, not of unit variance (Karras et al. 2022, arXiv 2206.00364); the model is given them by
1 / sqrt(1 + sigma^2). Their derivative by sigma is (x - d) / sigma.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.polynomial.polynomial import Polynomial, polyfromroots

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.levels import levels, timestep_of
from ldmrt.samplers.registry import SigmaSpacing
from ldmrt.samplers.table import Float64, SamplerTable, assign, blank_rows, set_denoised
from ldmrt.schedule import NoiseSchedule

_LMS_ORDER = 4


def euler(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """Euler's method (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn).

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        sigmas: the spacing of the noise levels.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range.
    """
    at = levels(schedule, num_inference_steps, sigmas, begin)
    rows = _rows(schedule, at.sigmas[:-1])
    assign(rows, Column.NEXT_X, **_move(at.sigmas[:-1], at.sigmas[1:]))
    return at.single("euler", rows)


def euler_ancestral(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """Euler's method below the next noise level, and noise up to it (k-diffusion's sample_euler_ancestral).

    The arguments are those of `euler`. Noise is drawn in the last step too, where it has no weight, as in diffusers.
    """
    at = levels(schedule, num_inference_steps, sigmas, begin)
    down, up = ancestral(at.sigmas[:-1], at.sigmas[1:])
    rows = _rows(schedule, at.sigmas[:-1])
    assign(rows, Column.NEXT_X, noise=up, **_move(at.sigmas[:-1], down))
    return at.single("euler-ancestral", rows, noise=True)


def lms(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """The linear multistep method of order 4: the polynomial through the last derivatives, integrated over the step.

    The arguments are those of `euler`.
    """
    at = levels(schedule, num_inference_steps, sigmas, begin)
    here = at.sigmas[:-1]
    rows = _rows(schedule, here)
    assign(rows, Column.PUSHED, x=1 / here, d=-1 / here)
    for index in range(len(here)):
        newest, *past = _multistep_weights(at.sigmas, index)
        older = {f"h{age}": weight for age, weight in enumerate(past, start=1)}
        assign(rows[index : index + 1], Column.NEXT_X, x=1 + newest / here[index], d=-newest / here[index], **older)
    return at.single("lms", rows)


def _multistep_weights(sigmas: Float64, index: int) -> list[float]:
    """Of the derivatives at sigmas[index], sigmas[index - 1], ...: Lagrange's polynomials, integrated."""
    nodes = sigmas[index::-1][:_LMS_ORDER]
    weights = []
    for number, node in enumerate(nodes):
        others = np.delete(nodes, number)
        integral = (Polynomial(polyfromroots(others)) / float(np.prod(node - others))).integ()
        weights.append(float(integral(sigmas[index + 1]) - integral(sigmas[index])))
    return weights


def heun(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 1): the mean of the derivatives at both ends of a step.

    The arguments are those of `euler`. The last step is Euler's.
    """
    at = levels(schedule, num_inference_steps, sigmas, begin)
    here, there = at.sigmas[:-1], at.sigmas[1:]
    rows, first, second = two_stages(schedule, here, there[:-1], clips=True)
    assign(first, Column.NEXT_X, **_move(here, there))
    assign(first, Column.NEXT_SAVED, x=1.0)
    assign(first, Column.PUSHED, x=1 / here, d=-1 / here)
    half = (there[:-1] - here[:-1]) / 2
    assign(second, Column.NEXT_X, saved=1.0, h1=half, x=half / there[:-1], d=-half / there[:-1])
    return at.double("heun", rows, there[:-1], at.timesteps[1:])


def kdpm2(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927) in noise levels: the derivative in the middle of a step.

    The arguments are those of `euler`. The middle is that of the levels' logarithms; the last step is Euler's.
    """
    return _kdpm2("kdpm2", schedule, num_inference_steps, sigmas, begin, noise=False)


def kdpm2_ancestral(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """`kdpm2` below the next noise level, and noise up to it."""
    return _kdpm2("kdpm2-ancestral", schedule, num_inference_steps, sigmas, begin, noise=True)


def _kdpm2(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    sigmas: SigmaSpacing | None,
    begin: int,
    *,
    noise: bool,
) -> SamplerTable:
    at = levels(schedule, num_inference_steps, sigmas, begin)
    here, there = at.sigmas[:-1], at.sigmas[1:]
    down, up = ancestral(here, there) if noise else (there, np.zeros_like(there))
    middle = np.sqrt(here * down)  # 0 in the last step, which makes it Euler's
    rows, first, second = two_stages(schedule, here, middle[:-1])
    assign(first, Column.NEXT_X, **_move(here, middle))
    assign(first, Column.NEXT_SAVED, x=1.0)
    slope = (down - here)[:-1] / middle[:-1]
    assign(second, Column.NEXT_X, saved=1.0, x=slope, d=-slope, noise=up[:-1])
    if sigmas == "karras":  # in diffusers these samplers round, but not in the middles
        at = replace(at, timesteps=at.timesteps.round())
    return at.double(name, rows, middle[:-1], timestep_of(schedule, middle[:-1]), second_noise=noise)


# ---------------------------------------------------------------------------------------------------- parts


def ancestral(here: Float64, there: Float64) -> tuple[Float64, Float64]:
    """The noise level to step down to, and the noise to add to reach the next one, for each step (k-diffusion)."""
    return there**2 / here, there * np.sqrt(1.0 - (there / here) ** 2)


def _move(here: Float64, there: Float64) -> dict[str, Any]:
    """What x is after a step of Euler's method: x + (there - here) (x - d) / here."""
    return {"x": there / here, "d": 1 - there / here}


def _rows(schedule: NoiseSchedule, sigmas: Float64) -> Float64:
    rows = blank_rows(len(sigmas))
    set_denoised(rows, schedule, np.ones_like(sigmas), sigmas)
    return rows


def two_stages(
    schedule: NoiseSchedule, here: Float64, inner: Float64, *, clips: bool = False
) -> tuple[Float64, Float64, Float64]:
    """Rows of steps of two evaluations, the last one of one: all of them, the first of each step, and the second.

    Args:
        schedule: of the model.
        here: (n,) noise levels of the first evaluations.
        inner: (n - 1,) those of the second ones.
        clips: see `set_denoised`.
    """
    rows = blank_rows(2 * len(here) - 1)
    first, second = rows[0::2], rows[1::2]
    set_denoised(first, schedule, np.ones_like(here), here, clips=clips)
    set_denoised(second, schedule, np.ones_like(inner), inner, clips=clips)
    return rows, first, second
