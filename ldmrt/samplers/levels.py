"""Which timesteps and noise levels a sampler visits, counted and rounded as diffusers does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldmrt.errors import BadRequest
from ldmrt.kernels.sampler import Column
from ldmrt.samplers.registry import SigmaSpacing
from ldmrt.samplers.table import Float64, SamplerTable, to_clean
from ldmrt.schedule import NoiseSchedule, TimestepSpacing

_KARRAS_RHO = 7.0


def training_timesteps(schedule: NoiseSchedule, count: int, begin: int = 0) -> NDArray[np.int64]:
    """Training timesteps to visit, from noisy to clean, int64 (count - begin,), without the first `begin`; spaced by default as
    "leading".
    """
    return _spaced(schedule, count, "leading", whole=True).astype(np.int64)[begin:]


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels from noisy to clean, for one part of picture.

    Attributes:
        timesteps: float64 (count,), what the model is told.
        sigmas: float64 (count + 1,), the last of them 0.
        initial_noise_scale: of standard normal noise, for latents x_0 + sigma n to begin with.
    """

    timesteps: Float64
    sigmas: Float64
    initial_noise_scale: float = 1.0

    def single(self, name: str, rows: Float64, *, noise: bool = False) -> SamplerTable:
        """The table of a sampler with one evaluation a step, on latents x_0 + sigma n.

        Args:
            name: of the sampler.
            rows: (count, WIDTH), but for the scale of the model's input.
            noise: whether each of them draws noise.
        """
        rows[:, Column.NEXT_INPUT_SCALE] = _unit(self.sigmas[1:])
        draws_noise = np.full(len(rows), noise)
        return self._table(name, self.timesteps, self.sigmas[:-1], rows, np.arange(len(rows)), draws_noise)

    def double(
        self,
        name: str,
        rows: Float64,
        sigmas: Float64,
        timesteps: Float64,
        *,
        first_noise: bool = False,
        second_noise: bool = False,
    ) -> SamplerTable:
        """The table of a sampler with two evaluations a step but for the last, on latents x_0 + sigma n.

        Args:
            name: of the sampler.
            rows: (2 * count - 1, WIDTH), but for the scale of the model's input.
            sigmas: (count - 1,), the noise levels of the second evaluations.
            timesteps: (count - 1,), their timesteps.
            first_noise: whether the first evaluations draw noise, but for the last.
            second_noise: whether the second ones do.
        """
        rows[0::2, Column.NEXT_INPUT_SCALE] = _unit(np.append(sigmas, 0.0))
        rows[1::2, Column.NEXT_INPUT_SCALE] = _unit(self.sigmas[1:-1])
        number = np.arange(len(rows))
        draws_noise = np.where(number % 2 == 0, first_noise, second_noise)
        draws_noise[-1] = False
        steps = np.where(number % 2 == 1, number // 2, -1)
        steps[-1] = number[-1] // 2
        visited, at = np.empty(len(rows)), np.empty(len(rows))
        visited[0::2], visited[1::2] = self.timesteps, timesteps
        at[0::2], at[1::2] = self.sigmas[:-1], sigmas
        return self._table(name, visited, at, rows, steps, draws_noise)

    def _table(
        self,
        name: str,
        timesteps: Float64,
        sigmas: Float64,
        rows: Float64,
        steps: NDArray[np.int64],
        draws_noise: NDArray[np.bool_],
    ) -> SamplerTable:
        return SamplerTable(
            name=name,
            timesteps=timesteps,
            coefficients=rows,
            steps=steps,
            draws_noise=draws_noise,
            levels=to_clean(np.ones_like(sigmas), sigmas),
            initial_input_scale=float(_unit(self.sigmas[0])),
            initial_noise_scale=self.initial_noise_scale,
        )


def levels(schedule: NoiseSchedule, count: int, spacing: SigmaSpacing | None, begin: int = 0) -> Levels:
    """As the samplers of Karras et al. 2022 (arXiv 2206.00364) take them in diffusers: from the first timestep to the last.

    Args:
        schedule: of the model.
        count: of levels above 0.
        spacing: instead of the levels of the schedule's timesteps, those between the first and the last of them.
        begin: how many of the first are left out.
    """
    timesteps = _spaced(schedule, count, "linspace", whole=False)
    sigmas = np.interp(timesteps, np.arange(schedule.train_steps), schedule.sigmas)
    if spacing is not None:
        sigmas = _between(sigmas[0], sigmas[-1], count, spacing)
        timesteps = timestep_of(schedule, sigmas)
    first = float(sigmas.max())
    leading = schedule.timestep_spacing == "leading"
    scale = (first**2 + 1) ** 0.5 if leading else first
    return Levels(timesteps[begin:], np.append(sigmas, 0.0)[begin:], scale)


def solver_levels(
    schedule: NoiseSchedule,
    count: int,
    spacing: SigmaSpacing | None,
    begin: int = 0,
    *,
    rounded_karras: bool = True,
) -> Levels:
    """As DPM-Solver and UniPC take them in diffusers: one more timestep, the last, is left out; all are whole.

    Args:
        schedule: of the model.
        count: of levels above 0.
        spacing: instead of the levels of the schedule's timesteps, those between its noisiest and its cleanest.
        begin: how many of the first are left out.
        rounded_karras: round the timesteps of Karras' levels, or cut their fractions off, as those of others are.
    """
    if spacing is None:
        unvisited = 0 if schedule.timestep_spacing == "trailing" else 1
        timesteps = _spaced(schedule, count, "linspace", whole=True, unvisited=unvisited)
        sigmas = np.interp(timesteps, np.arange(schedule.train_steps), schedule.sigmas)
    else:
        sigmas = _between(schedule.sigmas[-1], schedule.sigmas[0], count, spacing)
        timesteps = timestep_of(schedule, sigmas)
        # The noisiest level is the last timestep's, whichever way its logarithm was rounded.
        timesteps = timesteps.round() if spacing == "karras" and rounded_karras else np.trunc(timesteps + 1e-6)
    return Levels(timesteps[begin:], np.append(sigmas, 0.0)[begin:])


def timestep_of(schedule: NoiseSchedule, sigmas: Float64) -> Float64:
    """The timesteps of noise levels, between those of training by their logarithms."""
    return np.interp(np.log(sigmas), np.log(schedule.sigmas), np.arange(schedule.train_steps))


def _unit(sigmas: Float64) -> Float64:
    """What x_0 + sigma n is multiplied by for unit variance."""
    result: Float64 = 1.0 / np.sqrt(1.0 + sigmas**2)
    return result


def _between(high: float, low: float, count: int, spacing: SigmaSpacing) -> Float64:
    """Noise levels from high to low: Karras et al. 2022, eq. 5, or evenly in their logarithms."""
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(high), np.log(low), count))
    ramp = np.linspace(high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO), count)
    return ramp**_KARRAS_RHO


def _spaced(
    schedule: NoiseSchedule, count: int, default: TimestepSpacing, *, whole: bool, unvisited: int = 0
) -> Float64:
    """Timesteps from noisy to clean, (count,), of so many and some that come after them."""
    last, most = schedule.train_steps - 1, schedule.train_steps - unvisited
    if not 1 <= count <= most:
        raise BadRequest(f"num_inference_steps is {count}, expected 1 to {most}", param="num_inference_steps")
    points = count + unvisited
    timesteps: NDArray[np.floating[Any]]
    spacing = schedule.timestep_spacing or default
    if spacing == "linspace":
        timesteps = np.linspace(0, last, points)[::-1]
        timesteps = timesteps.round() if whole else timesteps
    elif spacing == "leading":
        timesteps = np.arange(points)[::-1] * (schedule.train_steps // points) + float(schedule.steps_offset)
    else:
        # A step that is not exact in binary can make this one element too long.
        timesteps = np.arange(schedule.train_steps, 0, -schedule.train_steps / count).round() - 1
    visited = timesteps[:count].astype(np.float64)
    if visited[0] > last:
        raise BadRequest(
            f"{count} steps with steps_offset {schedule.steps_offset} begin at timestep {visited[0]:.0f}, but the model"
            f" was trained up to {last}: ask for fewer steps",
            param="num_inference_steps",
        )
    return visited
