"""What a sampler is here: a table, made once on the host in float64, with one row for each evaluation of the model.

A row holds every number that the update of the latents needs; its columns are `ldmrt.kernels.sampler.Column`. The sampling
loop then has no arithmetic of its own: it reads a row and applies it, on any device, whatever the sampler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldmrt.kernels.sampler import WIDTH, Basis, Column
from ldmrt.schedule import NoiseSchedule, PredictionType

Float64 = NDArray[np.float64]
# For each row, or for all.
Coefficient = Float64 | float


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler for one schedule and number of steps: one row per evaluation of the model.

    Attributes:
        name: of the sampler, as `ldmrt.samplers.registry.resolve` gives it.
        timesteps: float64 (evaluations,), the timestep given to the model.
        coefficients: float64 (evaluations, WIDTH); the columns are `ldmrt.kernels.sampler.Column`.
        steps: int64 (evaluations,), the index of the step, as the user counts them, that this evaluation completes; -1
            for an evaluation in the middle of a step.
        draws_noise: bool (evaluations,), the rows for which fresh standard normal noise is to be drawn.
        initial_input_scale: the first model input is the initial x times this.
        initial_noise_scale: the initial x is standard normal noise times this.
        levels: float64 (evaluations + 1, 2), the level of x at every evaluation, and behind the last: the first of these times the
            picture, and the second times standard normal noise.
    """

    name: str
    timesteps: Float64
    coefficients: Float64
    steps: NDArray[np.int64]
    draws_noise: NDArray[np.bool_]
    levels: Float64
    initial_input_scale: float = 1.0
    initial_noise_scale: float = 1.0

    @property
    def evaluations(self) -> int:
        """How often the model runs."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether any row draws noise."""
        return bool(self.draws_noise.any())

    @property
    def thresholds(self) -> bool:
        """Whether any row asks for dynamic thresholding."""
        return bool((self.coefficients[:, Column.THRESHOLD_RATIO] > 0).any())

    @property
    def num_steps(self) -> int:
        """How many steps it makes, as the user counts them."""
        return int(self.steps.max()) + 1

    @property
    def step_timesteps(self) -> Float64:
        """The timesteps at which its steps begin, float64 (num_steps,)."""
        begins: Float64 = self.timesteps[np.append(True, self.steps[:-1] >= 0)]
        return begins

    def first_steps(self, count: int) -> SamplerTable:
        """The same, ended after so many steps."""
        rows = int(np.flatnonzero(self.steps == count - 1)[0]) + 1
        return replace(
            self,
            timesteps=self.timesteps[:rows],
            coefficients=self.coefficients[:rows],
            steps=self.steps[:rows],
            draws_noise=self.draws_noise[:rows],
            levels=self.levels[: rows + 1],
        )


def on_unit_variance(
    name: str,
    timesteps: ArrayLike,
    rows: Float64,
    signal: Float64,
    noise: Float64,
    draws_noise: NDArray[np.bool_] | None = None,
) -> SamplerTable:
    """The table of a sampler with one evaluation a step, on latents of unit variance.

    Args:
        name: of the sampler.
        timesteps: (n,).
        rows: (n, WIDTH).
        signal: (n,) or more: at evaluation i the latents are signal[i] x_0 + noise[i] n.
        noise: the same.
        draws_noise: (n,); None for a sampler that draws none.
    """
    return SamplerTable(
        name=name,
        timesteps=np.asarray(timesteps, dtype=np.float64),
        coefficients=rows,
        steps=np.arange(len(rows), dtype=np.int64),
        draws_noise=np.zeros(len(rows), dtype=np.bool_) if draws_noise is None else draws_noise,
        levels=to_clean(signal[: len(rows)], noise[: len(rows)]),
    )


def to_clean(signal: ArrayLike, noise: ArrayLike) -> Float64:
    """`SamplerTable.levels` of a sampler that ends at a clean picture, of the levels of its evaluations, (n,) each."""
    return np.stack([np.append(signal, 1.0), np.append(noise, 0.0)], axis=1)


def blank_rows(count: int) -> Float64:
    """Rows that change nothing, float64 (count, WIDTH): next x = x, next saved = saved, no push, no clip, scale 1."""
    rows = np.zeros((count, WIDTH), dtype=np.float64)
    rows[:, Column.CLIP] = math.inf
    rows[:, Column.NEXT_X + Basis.X] = 1.0
    rows[:, Column.NEXT_SAVED + Basis.SAVED] = 1.0
    rows[:, Column.NEXT_INPUT_SCALE] = 1.0
    return rows


def assign(
    rows: Float64,
    target: Column,
    *,
    x: Coefficient = 0.0,
    m: Coefficient = 0.0,
    d: Coefficient = 0.0,
    saved: Coefficient = 0.0,
    h1: Coefficient = 0.0,
    h2: Coefficient = 0.0,
    h3: Coefficient = 0.0,
    noise: Coefficient = 0.0,
) -> None:
    """Say what a target of some rows is made of, in place; what is not named takes no part.

    Args:
        rows: (n, WIDTH), or a view of them.
        target: NEXT_X, NEXT_SAVED or PUSHED; what is PUSHED is pushed.
        x: the coefficient, for all rows or (n,) for each, as are the others; see `ldmrt.kernels.sampler`.
        m: of the model's output.
        d: of the denoised estimate, as `set_denoised` has said how it is made.
        saved: of the saved x.
        h1: of what was pushed last.
        h2: of what was pushed before.
        h3: and before that.
        noise: of the noise drawn for the row.
    """
    for offset, coefficient in enumerate((x, m, d, saved, h1, h2, h3, noise)):
        rows[:, target + offset] = coefficient
    if target is Column.PUSHED:
        rows[:, Column.PUSH] = 1.0


def denoised(prediction: PredictionType, signal: Float64, noise: Float64) -> tuple[Coefficient, Coefficient]:
    """The coefficients of x and of the model's output in its estimate of x_0, where x = signal x_0 + noise n.

    What the model is given is x / sqrt(signal^2 + noise^2), of unit variance, to which v refers (arXiv 2202.00512, appendix D).
    """
    if prediction == "epsilon":
        return 1.0 / signal, -noise / signal
    if prediction == "v_prediction":
        power = signal**2 + noise**2
        return signal / power, -noise / np.sqrt(power)
    return 0.0, 1.0


def noise_estimate(prediction: PredictionType, signal: Float64, noise: Float64) -> tuple[Coefficient, Coefficient]:
    """The coefficients of x and of the model's output in its estimate of the noise, where signal^2 + noise^2 = 1."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return noise, signal
    return 1.0 / noise, -signal / noise


def set_denoised(
    rows: Float64,
    schedule: NoiseSchedule,
    signal: Float64,
    noise: Float64,
    *,
    clips: bool = False,
    thresholds: bool = False,
) -> None:
    """Say how d is made in some rows, in place, where x = signal x_0 + noise n.

    Args:
        rows: (n, WIDTH), or a view of them.
        schedule: of the model.
        signal: (n,).
        noise: (n,).
        clips: whether the sampler clips d if the model is configured so.
        thresholds: whether it thresholds d if the model is configured so, which goes before clipping.
    """
    rows[:, Column.DENOISED_X], rows[:, Column.DENOISED_M] = denoised(schedule.prediction_type, signal, noise)
    if thresholds and schedule.thresholding:
        rows[:, Column.THRESHOLD_RATIO] = schedule.dynamic_thresholding_ratio
        rows[:, Column.THRESHOLD_MAX] = schedule.sample_max_value
    elif clips:
        rows[:, Column.CLIP] = schedule.clip_sample_range
