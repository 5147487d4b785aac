"""Ancestral Euler over noise levels that diffusers' class does not take, against k-diffusion's loop in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldmrt.noise import draw
from ldmrt.samplers.levels import levels
from ldmrt.samplers.sigma import euler_ancestral
from ldmrt.schedule import NoiseSchedule
from tests.samplers.oracle import SEED, SHAPE, STABLE_DIFFUSION, model, ours


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_euler_ancestral_over_other_levels(spacing: Any, steps: int) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    table = euler_ancestral(schedule, steps, spacing)
    sigmas = levels(schedule, steps, spacing).sigmas
    starts, noises, *_ = draw([SEED], SHAPE, table)
    assert noises is not None
    x = starts.double() * sigmas[0]
    for index, found in enumerate(ours(table)):
        here, there = sigmas[index : index + 2]
        noise_estimate = model(x / np.sqrt(here**2 + 1), table.timesteps[index])
        up = min(there, np.sqrt(there**2 * (here**2 - there**2) / here**2))
        down = np.sqrt(there**2 - up**2)
        x = x + (down - here) * noise_estimate + up * noises[:, index]
        # Float32 sums, and a network that doubles their rounding at some steps.
        assert float((found - x).norm() / x.norm()) < 1e-5
