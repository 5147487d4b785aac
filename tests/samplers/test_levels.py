"""Timesteps and noise levels: counted as diffusers counts, and spaced by the papers' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from ldmrt.errors import BadRequest
from ldmrt.samplers.levels import levels, solver_levels, timestep_of, training_timesteps
from ldmrt.schedule import NoiseSchedule
from tests.samplers.oracle import STABLE_DIFFUSION

SCHEDULE = NoiseSchedule.from_config(STABLE_DIFFUSION)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_of_every_count(spacing: Any) -> None:
    oracle = DDIMScheduler(timestep_spacing=spacing)
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for steps in range(1, 1001):
        oracle.set_timesteps(steps)
        # diffusers' arange yields an extra element, timestep -1, at a few counts of "trailing"
        assert training_timesteps(schedule, steps).tolist() == oracle.timesteps.tolist()[:steps]


def test_noise_levels_fall_to_zero() -> None:
    for make in (levels, solver_levels):
        for spacing in (None, "karras", "exponential"):
            at = make(SCHEDULE, 30, spacing)
            assert at.sigmas.shape == (31,)
            assert (np.diff(at.sigmas) < 0).all()
            assert at.sigmas[-1] == 0
            assert at.sigmas[0] <= SCHEDULE.sigmas[-1] * (1 + 1e-12)
            assert (np.diff(at.timesteps) <= 0).all()


def test_karras_levels_are_even_in_their_seventh_root() -> None:
    steps = np.diff(levels(SCHEDULE, 10, "karras").sigmas[:-1] ** (1 / 7))
    np.testing.assert_allclose(steps, steps[0])


def test_exponential_levels_are_even_in_their_logarithm() -> None:
    steps = np.diff(np.log(levels(SCHEDULE, 10, "exponential").sigmas[:-1]))
    np.testing.assert_allclose(steps, steps[0])


def test_the_solvers_begin_at_the_last_timestep() -> None:
    for count in range(1, 60):
        assert solver_levels(SCHEDULE, count, "exponential").timesteps[0] == 999


def test_the_timestep_of_a_level_of_training() -> None:
    at = np.array([0.0, 12.0, 700.0, 999.0])
    np.testing.assert_allclose(timestep_of(SCHEDULE, SCHEDULE.sigmas[at.astype(int)]), at)
    np.testing.assert_allclose(timestep_of(SCHEDULE, np.array([1e-9, 1e9])), [0.0, 999.0])


def test_bad_counts() -> None:
    for make, most in ((levels, 1000), (solver_levels, 999)):
        for count in (0, most + 1):
            with pytest.raises(BadRequest, match=f"is {count}, expected 1 to {most}") as caught:
                make(SCHEDULE, count, None)
            assert caught.value.param == "num_inference_steps"
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"timestep_spacing": "leading"})
    with pytest.raises(BadRequest, match="begin at timestep 1000, but the model was trained up to 999"):
        training_timesteps(schedule, 1000)
