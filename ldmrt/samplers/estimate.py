"""What an image under way is going to be, as far as the model has said: for previews."""

from __future__ import annotations

import math

import numpy as np

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.table import SamplerTable, denoised
from ldmrt.schedule import NoiseSchedule

_LEAST_ALPHA = 1e-9


def estimate(table: SamplerTable, schedule: NoiseSchedule, made: int) -> tuple[float, float]:
    """The coefficients of the latents and of the model's last output in the estimate of x_0, after some evaluations.

    The latents are taken to hold as much noise as the next evaluation expects, and that noise to be what the model last said. This is
    exact for samplers that add none (DDIM: Song et al. 2020, arXiv 2010.02502, eq. 9) with a model that predicts noise or the picture.

    Args:
        table: the sampler.
        schedule: of the model.
        made: evaluations, 1 or more.
    """
    if made == table.evaluations:
        return 1.0, 0.0
    # Where nothing is left of the picture, at the very first timestep, nothing can be estimated either.
    alphas = np.maximum(schedule.alphas_cumprod, _LEAST_ALPHA)
    levels = np.log(alphas) - np.log1p(-alphas)
    level = np.interp(table.timesteps[made], np.arange(len(levels)), levels)
    signal, noise = (np.asarray(math.sqrt(1 / (1 + math.exp(sign * level)))) for sign in (-1, 1))
    of_input, of_output = denoised(schedule.prediction_type, signal, noise)
    # Of unit variance is what the model is given.
    scale = table.coefficients[made - 1, Column.NEXT_INPUT_SCALE]
    return float(of_input * scale), float(of_output)
