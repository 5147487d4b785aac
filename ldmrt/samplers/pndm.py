"""PNDM: a linear multistep method on the noise, between training timesteps."""

from __future__ import annotations

import numpy as np

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.levels import training_timesteps
from ldmrt.samplers.table import SamplerTable, assign, blank_rows, noise_estimate, to_clean
from ldmrt.schedule import NoiseSchedule

# Adams-Bashforth: the weights of the newest output and of the ones before it.
_WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: NoiseSchedule, num_inference_steps: int, *, begin: int = 0) -> SamplerTable:
    """PNDM (Liu et al. 2022, arXiv 2202.09778, eqs. 9 and 12) without Runge-Kutta steps: PLMS, as Stable Diffusion is configured.

    The first step is made twice: to the second timestep, and with the mean of both outputs from the start again. The linear
    combination is of the outputs, whatever the model predicts.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps; there is one more evaluation, but for 1.
        begin: how many of the first steps are left out. The first of the others is then the one that is made twice.

    Raises:
        BadRequest: the steps are out of range, or the schedule cannot be sampled with them.
    """
    visited = training_timesteps(schedule, num_inference_steps, begin)
    timesteps = np.concatenate([visited[:1], visited[1:2], visited[1:]])
    stride = schedule.train_steps // num_inference_steps
    start, end = timesteps.copy(), timesteps - stride
    if len(visited) > 1:  # the second evaluation is at the end of its step
        start[1], end[1] = timesteps[1] + stride, timesteps[1]
    alphas = 1.0 / (1.0 + schedule.sigmas**2)
    alpha = alphas[start]
    alpha_end = np.where(end >= 0, alphas[np.maximum(end, 0)], schedule.final_alpha_cumprod)
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)
    of_x, of_m = noise_estimate(schedule.prediction_type, signal, noise)
    of_noise = -(alpha_end - alpha) / (alpha * np.sqrt(1.0 - alpha_end) + np.sqrt(alpha * (1.0 - alpha) * alpha_end))
    of_start = np.sqrt(alpha_end / alpha) + of_noise * of_x
    of_output = of_noise * of_m

    rows = blank_rows(len(timesteps))
    for index, row in enumerate(rows[:, None]):
        kept, output = of_start[index], of_output[index]
        if index == 1:
            assign(row, Column.NEXT_X, saved=kept, m=output / 2, h1=output / 2)
            continue
        weights = _WEIGHTS[min(max(index - 1, 0), 3)]
        past = {f"h{age}": weight * output for age, weight in enumerate(weights[1:], start=1)}
        assign(row, Column.NEXT_X, x=kept, m=weights[0] * output, **past)
        assign(row, Column.PUSHED, m=1.0)
    assign(rows[:1], Column.NEXT_SAVED, x=1.0)
    steps = np.arange(len(timesteps), dtype=np.int64)
    return SamplerTable(
        name="pndm",
        timesteps=timesteps.astype(np.float64),
        coefficients=rows,
        steps=steps - 1 if len(visited) > 1 else steps,
        draws_noise=np.zeros(len(timesteps), dtype=np.bool_),
        levels=to_clean(np.sqrt(alphas[timesteps]), np.sqrt(1.0 - alphas[timesteps])),
    )
