"""From a sampler's name to its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ldmrt.samplers.consistency import lcm, tcd
from ldmrt.samplers.ddim import ddim, ddpm
from ldmrt.samplers.dpm import dpm_2m, dpm_2m_sde, dpm_sde
from ldmrt.samplers.pndm import pndm
from ldmrt.samplers.registry import resolve
from ldmrt.samplers.sigma import euler, euler_ancestral, heun, kdpm2, kdpm2_ancestral, lms
from ldmrt.samplers.span import WHOLE, Span
from ldmrt.samplers.table import SamplerTable
from ldmrt.samplers.unipc import unipc
from ldmrt.schedule import NoiseSchedule

# By the names of `ldmrt.samplers.registry.SAMPLERS`; with `eta` or `sigmas`, where that says so, as the last argument.
_MAKERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "kdpm2": kdpm2,
    "kdpm2-ancestral": kdpm2_ancestral,
    "dpm++ 2m": dpm_2m,
    "dpm++ 2m sde": dpm_2m_sde,
    "dpm++ sde": dpm_sde,
    "unipc": unipc,
    "lcm": lcm,
    "tcd": tcd,
}


def sampler_table(
    name: str, schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0, span: Span = WHOLE
) -> SamplerTable:
    """The table of a sampler.

    Args:
        name: any that `ldmrt.samplers.registry.resolve` knows.
        schedule: of the model to be sampled.
        num_inference_steps: steps as the user counts them; a sampler may evaluate the model more often.
        eta: how much noise, from 0 to 1, of a sampler that has this parameter.
        span: which of the steps are made.

    Raises:
        BadRequest: there is no such sampler, its arguments are out of range, or it has no eta; or the span has no step.
    """
    choice = resolve(name)
    choice.check_eta(eta)
    options = {"eta": eta} if choice.sampler.eta else {"sigmas": choice.sigmas} if choice.sampler.sigmas else {}
    make = partial(_MAKERS[choice.sampler.name], schedule, num_inference_steps, **options)
    table = make()
    begin, end = span.steps(table.step_timesteps, schedule.train_steps)
    if begin:
        table = make(begin=begin)
    return replace(table.first_steps(end - begin), name=choice.name)
