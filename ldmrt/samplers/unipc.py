"""UniPC: a predictor that is corrected, once the model has spoken about what was predicted."""

from __future__ import annotations

import math

import numpy as np

from ldmrt.kernels.sampler import Column
from ldmrt.samplers.levels import solver_levels
from ldmrt.samplers.registry import SigmaSpacing
from ldmrt.samplers.table import Float64, SamplerTable, assign, blank_rows, on_unit_variance, set_denoised
from ldmrt.schedule import NoiseSchedule


def unipc(
    schedule: NoiseSchedule, num_inference_steps: int, sigmas: SigmaSpacing | None = None, *, begin: int = 0
) -> SamplerTable:
    """UniPC of order 2 with B(h) = exp(h) - 1, on the denoised estimate (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2).

    The corrected x is made of the last corrected one, which is saved, and of denoised estimates: of the predicted x nothing is
    left but the model's word on it. So correcting and predicting are one row. The first and the last step are of first order.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        sigmas: the spacing of the noise levels.
        begin: how many of the first steps are left out.

    Raises:
        BadRequest: the steps are out of range.
    """
    at = solver_levels(schedule, num_inference_steps, sigmas, begin)
    signal = 1.0 / np.sqrt(1.0 + at.sigmas**2)
    noise = signal * at.sigmas
    count = len(at.timesteps)
    rows = blank_rows(count)
    set_denoised(rows, schedule, signal[:-1], noise[:-1], thresholds=True)
    assign(rows, Column.PUSHED, d=1.0)
    order = 0
    for index in range(count):
        # What the corrected x is made of.
        corrected = {"x": 1.0}
        if index:
            kept, grown = _first_order(signal, noise, index)
            newest, older = _corrector(at.sigmas, index) if order == 2 else (0.5, 0.0)
            corrected = {
                "saved": kept,
                "h1": grown * (1 - newest - older),
                "h2": grown * older,
                "d": grown * newest,
            }
        # And the predicted one.
        order = min(2, index + 1, count - index)
        kept, grown = _first_order(signal, noise, index + 1)
        slope = 0.5 / _ratio(at.sigmas, index + 1) if order == 2 else 0.0
        predicted = {name: kept * value for name, value in corrected.items()}
        predicted["d"] = predicted.get("d", 0.0) + grown * (1 - slope)
        predicted["h1"] = predicted.get("h1", 0.0) + grown * slope
        row = rows[index : index + 1]
        assign(row, Column.NEXT_SAVED, **corrected)
        assign(row, Column.NEXT_X, **predicted)
    return on_unit_variance("unipc", at.timesteps, rows, signal, noise)


def _first_order(signal: Float64, noise: Float64, index: int) -> tuple[float, float]:
    """The coefficients of x and of the denoised estimate in a step of first order to a level from the one before it."""
    kept = noise[index] / noise[index - 1]
    return float(kept), float(signal[index] - signal[index - 1] * kept)


def _ratio(sigmas: Float64, index: int) -> float:
    """Where the estimate before lies (r of the paper), in steps to level `index` from the level before."""
    h = math.log(sigmas[index - 1] / sigmas[index])
    return math.log(sigmas[index - 1] / sigmas[index - 2]) / h


def _corrector(sigmas: Float64, index: int) -> tuple[float, float]:
    """The weights of the estimates at level `index` and two before it, in units of first order's; the rest is the last one's.

    They make the step exact for estimates that are polynomials of second degree in lambda: paper, eq. 9, with
    phi_2 and phi_3 of -h by B(h).
    """
    h = -math.log(sigmas[index - 1] / sigmas[index])
    r = _ratio(sigmas, index)
    b = math.expm1(h)
    phi_2 = b / h - 1
    phi_3 = phi_2 / h - 0.5
    older, newest = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_2 / b, 2 * phi_3 / b])
    return float(newest), float(older / r)
