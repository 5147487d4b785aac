"""Parts of a sampler's steps: counted as diffusers counts them, and right from wherever they begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldmrt.errors import BadRequest
from ldmrt.noise import draw
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.samplers.span import Span
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from tests.samplers.oracle import SEED, SHAPE, STABLE_DIFFUSION, TOLERANCE, build, ours, theirs

# diffusers' schedulers make arrays of tensors in ways that NumPy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = 8
# diffusers begins these two in the middle as if they had a past: PNDM then tells the model a later timestep than the latents are at,
# LMS weighs derivatives that it does not have. Ours begin there as they begin everywhere.
WITH_A_PAST = ("pndm", "lms")


def schedule_of(name: str, config: dict[str, Any] = STABLE_DIFFUSION) -> NoiseSchedule:
    return NoiseSchedule.from_config(config | {"_class_name": SAMPLERS[name].scheduler})


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("begin", [1, 5, 7])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in WITH_A_PAST])
def test_begun_as_diffusers_begins_them(name: str, begin: int) -> None:
    options = {"algorithm_type": "sde-dpmsolver++"} if name == "dpm++ 2m sde" else {}
    scheduler = build(SAMPLERS[name].scheduler, STABLE_DIFFUSION | options)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * scheduler.order)
    table = sampler_table(name, schedule_of(name), STEPS, span=Span(strength=(STEPS - begin) / STEPS))
    assert table.num_steps == STEPS - begin
    expected = theirs(scheduler, table.timesteps.tolist(), eta=0.0, picture=latents(1), begin=begin)
    for found, other in zip(ours(table, latents(1)), expected, strict=True):
        assert float((found - other).norm() / other.norm()) < TOLERANCE


@pytest.mark.parametrize("begin", [0, 3, 7])
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.noise or sampler.eta])
def test_a_model_that_knows_the_picture_sees_the_same_noise_in_it(
    name: str, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every consistent method then stays on the line from the noise to the picture; not so one with a past that it has not had."""
    picture, noise = latents(1), draw([SEED], SHAPE, sampler_table(name, schedule_of(name), STEPS)).start
    schedule = schedule_of(name, STABLE_DIFFUSION | {"timestep_spacing": "leading"})  # whole timesteps
    table = sampler_table(name, schedule, STEPS, span=Span(strength=(STEPS - begin) / STEPS))
    errors = []

    def noise_in(x: torch.Tensor, timestep: float) -> torch.Tensor:
        sigma = float(np.exp(np.interp(timestep, np.arange(schedule.train_steps), np.log(schedule.sigmas))))
        found: torch.Tensor = (x * (1 + sigma**2) ** 0.5 - picture) / sigma
        errors.append(float((found - noise).norm() / noise.norm()))
        return found

    monkeypatch.setattr("tests.samplers.oracle.model", noise_in)
    list(ours(table, picture))
    # float32, divided by levels down to 0.04, of which more than one evaluation makes something.
    assert max(errors) < 1e-4, errors


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("steps", [1, 4, 20, 25])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++ 2m", "unipc"])
def test_steps_are_counted_as_in_diffusers(name: str, steps: int, share: float) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    scheduler = build(SAMPLERS[name].scheduler, STABLE_DIFFUSION)
    pipe: Any = SimpleNamespace(scheduler=scheduler)
    counts = []
    for start in (None, share):
        scheduler.set_timesteps(steps)
        counts.append(StableDiffusionXLImg2ImgPipeline.get_timesteps(pipe, steps, share, "cpu", start)[1])
    # Their filter of denoising_end, which stands in the middle of a pipeline.
    counts.append(int((scheduler.timesteps >= round(1000 - share * 1000)).sum()))
    spans = (Span(strength=share), Span(denoising_start=share), Span(denoising_end=share))
    for count, span in zip(counts, spans, strict=True):
        if count:
            assert sampler_table(name, schedule_of(name), steps, span=span).num_steps == count
        else:
            with pytest.raises(BadRequest, match=f"of {steps} steps is no step at all"):
                sampler_table(name, schedule_of(name), steps, span=span)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_parts_are_the_whole(name: str) -> None:
    """Of a method without a past; one that has some begins anew."""
    whole = sampler_table(name, schedule_of(name), STEPS)
    first, second = (
        sampler_table(name, schedule_of(name), STEPS, span=span)
        for span in (Span(denoising_end=0.6), Span(denoising_start=0.6))
    )
    assert first.num_steps + second.num_steps == STEPS == whole.num_steps
    assert np.array_equal(np.concatenate([first.step_timesteps, second.step_timesteps]), whole.step_timesteps)
    rows = first.evaluations
    assert np.array_equal(first.coefficients, whole.coefficients[:rows])
    if name not in (*WITH_A_PAST, "dpm++ 2m", "dpm++ 2m sde", "unipc"):
        assert np.array_equal(second.coefficients, whole.coefficients[rows:])
        assert np.array_equal(second.timesteps, whole.timesteps[rows:])


def test_a_picture_gets_the_noise_of_the_first_step() -> None:
    table: SamplerTable = sampler_table("ddim", schedule_of("ddim"), STEPS, span=Span(strength=0.5))
    alpha = schedule_of("ddim").alphas_cumprod[int(table.timesteps[0])]
    assert np.allclose(table.levels[0], (alpha**0.5, (1 - alpha) ** 0.5))
