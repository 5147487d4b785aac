"""A sampler's table and diffusers' scheduler, driven with the same model and the same generators, side by side."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from torch import Tensor

from ldmrt.beginning import Beginning
from ldmrt.noise import draw
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from ldmrt.slots import Slots

SHAPE = (4, 8, 8)
SEED = 5

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}

# diffusers keeps alphas_cumprod in float32: 1 - a at small t then carries a relative error of 2**-24 / 1e-3 = 6e-5, and
# its square root, of which noise levels are made, half of that. The tables are made in float64, so this is the distance
# from diffusers, not from the formula.
TOLERANCE = 1e-4
# With our alphas_cumprod in float64 in its place: noise levels and sums are still float32, and divisions by small levels
# and differences of near ones make some units of it.
CLOSE = 3e-5
# From pure noise, at a level of 4096, theirs subtract float32 numbers of that size to get one of size 1: 4096 * 2**-24 is 2.4e-4.
FROM_PURE_NOISE = 5e-4


def model(x: Tensor, timestep: float) -> Tensor:
    """Stands in for a U-Net: not linear, bounded, and another function at every timestep."""
    made: Tensor = torch.tanh(1.1 * x + 0.3 * np.sin(timestep / 90)) * (0.7 + 0.2 * np.cos(timestep / 170))
    return made


def ours(table: SamplerTable, picture: Tensor | None = None) -> Iterator[Tensor]:
    """The latents (1, C, h, w) after each evaluation, as the sampling loop makes them on a CPU, from noise or from a picture's latents."""
    drawn = draw([SEED], SHAPE, table)
    starts, table = Beginning().start(picture, drawn, table)
    slots = Slots(1, 1, SHAPE, table.evaluations + 1, "cpu", torch.float32)
    noise = None if drawn.steps is None else drawn.steps[0]
    slots.admit(0, latents=starts[0], table=table, guidance_scale=1.0, cond_row=0, noise=noise)
    for timestep in table.timesteps.tolist():
        slots.update(model(slots.model_input, timestep), slots.adjustments)
        yield slots.x.clone()


def theirs(
    scheduler: Any, timesteps: list[float], *, eta: float, picture: Tensor | None = None, begin: int = 0
) -> Iterator[Tensor]:
    """The latents after each evaluation, as diffusers' pipelines make them; the model is told `timesteps`. From noise, or from a picture's
    latents without the first `begin` steps.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    known = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}
    noise = torch.randn(1, *SHAPE, generator=generator)
    visited = scheduler.timesteps[begin * scheduler.order :]
    x = noise * scheduler.init_noise_sigma if picture is None else scheduler.add_noise(picture, noise, visited[:1])
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Brownian(generator)
    for told, timestep in zip(timesteps, visited, strict=True):
        output = model(scheduler.scale_model_input(x, timestep), told)
        x = scheduler.step(output, timestep, x, **options).prev_sample
        yield x


class Brownian:
    """A Brownian path over noise levels, from a generator: what torchsde's tree is for, in the order in which it is asked here."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._start = self._end = torch.tensor(torch.inf)
        self._moved = torch.zeros(1, *SHAPE)

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """The path's change from one level to a lower one, by the root of their distance."""
        if start != self._start:
            self._start = self._end = start
            self._moved = torch.zeros(1, *SHAPE)
        fresh = torch.randn(1, *SHAPE, generator=self._generator)
        self._moved = self._moved + (self._end - end).sqrt() * fresh
        self._end = end
        return self._moved / (start - end).sqrt()


def compare(
    name: str,
    config: dict[str, Any],
    steps: int,
    *,
    eta: float = 0.0,
    options: dict[str, Any] | None = None,
    off_by_one: bool = False,
) -> None:
    """Step both, and check timesteps and latents after every evaluation: as diffusers is, and on our alphas_cumprod.

    Args:
        name: of our sampler.
        config: of the noise schedule.
        steps: how many.
        eta: of both.
        options: of diffusers' scheduler alone.
        off_by_one: the first timestep may differ by one. Cut off instead of rounded, a float32 next to 999 is 999 or 998.
    """
    sampler = next(one for one in SAMPLERS.values() if name.startswith(one.name) and name[len(one.name) :] in _SPACINGS)
    spacing = {f"use{name[len(sampler.name) :].replace(' ', '_')}_sigmas": True} if name != sampler.name else {}
    scheduler = build(sampler.scheduler, config | spacing | (options or {}))
    schedule = NoiseSchedule.from_config(config | {"_class_name": sampler.scheduler})
    table = sampler_table(name, schedule, steps, eta)
    told = table.timesteps.tolist()
    for tolerance in (FROM_PURE_NOISE,) if schedule.zero_terminal_snr else (TOLERANCE, CLOSE):
        if tolerance == CLOSE:
            scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
            scheduler.final_alpha_cumprod = torch.tensor(schedule.final_alpha_cumprod)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # it would look its place up, and of equal timesteps take the second
        difference = np.abs(table.timesteps - scheduler.timesteps.double().numpy())
        # Between whole timesteps theirs are float32.
        assert difference[1:].max(initial=0) < 2e-3
        assert difference[0] < (1.5 if off_by_one else 2e-3)
        for index, (found, expected) in enumerate(zip(ours(table), theirs(scheduler, told, eta=eta), strict=True)):
            error = float((found - expected).norm() / expected.norm())
            assert error < tolerance, f"{name}, {config}, evaluation {index} of {steps} steps: error {error:.1e}"


_SPACINGS = ("", " karras", " exponential")


def build(name: str, config: dict[str, Any]) -> Any:
    """A scheduler of diffusers. Making some of them takes long, so one for each set of betas is made and configured anew."""
    cls = scheduler_class(name)
    known = inspect.signature(cls.__init__).parameters
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known}
    made_of = {key: value for key, value in config.items() if "beta" in key or key == "set_alpha_to_one"}
    scheduler = copy.copy(_made(cls, tuple(sorted(made_of.items()))))
    scheduler.register_to_config(**config)
    return scheduler


@cache
def _made(cls: Callable[..., Any], made_of: tuple[tuple[str, Any], ...]) -> Any:
    return cls(**dict(made_of))


@cache
def scheduler_class(name: str) -> Any:
    """A scheduler's class, of the two that need packages which are not installed too; we need nothing else of those."""
    if name == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        module: Any = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
        module.integrate = mock.Mock(quad=_integral)
        return module.LMSDiscreteScheduler
    if name == "DPMSolverSDEScheduler" and importlib.util.find_spec("torchsde") is None:
        with mock.patch.dict(sys.modules, torchsde=mock.Mock()):
            return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    return getattr(diffusers, name)


def _integral(function: Callable[[float], Any], low: Tensor, high: Tensor, epsrel: float) -> tuple[float, float]:
    """Gauss' rule of eight points, which is exact for the polynomials that it is asked for here."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (float(high) + float(low)) / 2, (float(high) - float(low)) / 2
    return half * sum(
        weight * float(function(middle + half * node)) for node, weight in zip(nodes, weights, strict=True)
    ), epsrel
