"""Every sampler against diffusers' scheduler, after every evaluation; and what holds of all tables."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from ldmrt.errors import BadRequest
from ldmrt.kernels.sampler import HISTORY, WIDTH, Column
from ldmrt.samplers.make import _MAKERS, sampler_table
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.samplers.span import Span
from ldmrt.schedule import NoiseSchedule
from tests.samplers.oracle import STABLE_DIFFUSION, compare

# diffusers' schedulers make arrays of tensors in ways that NumPy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = (1, 4, 20, 50)
SCHEDULE = NoiseSchedule.from_config(STABLE_DIFFUSION)

# What diffusers' class must be told to be ours.
OPTIONS: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},
    "dpm++ 2m sde": {"algorithm_type": "sde-dpmsolver++"},
}
# Ours takes what a model predicts apart in one place; some of theirs do not know all of it.
NO_SAMPLE = ("pndm", "euler-ancestral", "kdpm2", "kdpm2-ancestral", "dpm++ sde")
# Ours takes noise levels of any spacing; theirs does not.
NO_SIGMAS = ("euler-ancestral",)
# Theirs say nothing about the timesteps that they skip to.
NO_SPACING = ("lcm", "tcd")
WHOLE = ("dpm++ 2m", "dpm++ 2m sde", "unipc")


def predictions(name: str) -> tuple[str, ...]:
    return ("epsilon", "v_prediction") if name in NO_SAMPLE else ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_diffusers(name: str, steps: int) -> None:
    spacings = (None,) if name in NO_SPACING or steps > 20 else (None, "leading", "linspace", "trailing")
    for prediction, spacing in product(predictions(name), spacings):
        config = STABLE_DIFFUSION | {"prediction_type": prediction} | ({"timestep_spacing": spacing} if spacing else {})
        compare(name, config, steps, options=OPTIONS.get(name))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [name for name, one in SAMPLERS.items() if one.sigmas and name not in NO_SIGMAS])
def test_noise_levels_of_karras_and_exponential(name: str, steps: int) -> None:
    spacings = ("leading",) if steps > 20 else ("leading", "trailing")
    for sigmas, prediction, spacing in product(("karras", "exponential"), predictions(name), spacings):
        config = STABLE_DIFFUSION | {"prediction_type": prediction, "timestep_spacing": spacing}
        off_by_one = sigmas == "exponential" and name in WHOLE
        compare(f"{name} {sigmas}", config, steps, options=OPTIONS.get(name), off_by_one=off_by_one)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", [name for name, one in SAMPLERS.items() if one.eta])
def test_eta_draws_in_their_order(name: str, eta: float) -> None:
    for steps, prediction in product(STEPS, predictions(name)):
        compare(name, STABLE_DIFFUSION | {"prediction_type": prediction}, steps, eta=eta)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "name", ["ddpm", "euler", "euler-ancestral", "dpm++ 2m", "dpm++ 2m sde", "unipc", "lcm", "tcd"]
)
def test_zero_terminal_snr(name: str, steps: int) -> None:
    """Of the classes that know it; the others here take the last level as these do."""
    for prediction in predictions(name)[1:]:
        config = {"prediction_type": prediction, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        compare(name, STABLE_DIFFUSION | config, steps, options=OPTIONS.get(name))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "lcm"])
def test_clip_sample(name: str) -> None:
    for steps, prediction in product(STEPS, predictions(name)):
        config = {"prediction_type": prediction, "clip_sample": True, "clip_sample_range": 0.8}
        compare(name, STABLE_DIFFUSION | config, steps)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++ 2m", "dpm++ 2m sde", "unipc", "lcm"])
def test_dynamic_thresholding(name: str) -> None:
    for steps, prediction, clip in product((1, 4, 20), predictions(name), (False, True)):
        config = {
            "prediction_type": prediction,
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 1.7,
            "clip_sample": clip,  # thresholding goes before it
        }
        compare(name, STABLE_DIFFUSION | config, steps, options=OPTIONS.get(name))


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "leading"},
        {"trained_betas": tuple(np.linspace(0.001, 0.02, 1000).tolist())},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"set_alpha_to_one": False},
    ],
    ids=lambda config: next(iter(config)) + "=" + str(next(iter(config.values())))[:20],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_other_schedules(name: str, config: dict[str, Any]) -> None:
    compare(name, STABLE_DIFFUSION | config, 7, options=OPTIONS.get(name))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
def test_what_the_registry_says_is_so(sampler: Any) -> None:
    assert SAMPLERS.keys() == _MAKERS.keys()
    for steps in (1, 2, 3, 17, 50):
        table = sampler_table(sampler.name.upper(), SCHEDULE, steps, 0.5 if sampler.eta else 0.0)
        expected = {"n": steps, "n + 1": steps + (steps > 1), "2n - 1": 2 * steps - 1}[sampler.evaluations]
        assert table.name == sampler.name
        assert table.evaluations == expected
        assert table.coefficients.shape == (expected, WIDTH)
        assert table.coefficients.dtype == table.timesteps.dtype == np.float64
        assert [step for step in table.steps.tolist() if step >= 0] == list(range(steps))
        assert table.steps[-1] == steps - 1
        assert table.uses_noise == (sampler.noise and (steps > 1 or table.draws_noise[0]))
        finite = np.delete(table.coefficients, Column.CLIP, axis=1)
        assert np.isfinite(finite).all()
        # No noise is left, and what comes next is not scaled.
        assert table.coefficients[-1, Column.NEXT_INPUT_SCALE] == 1.0


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
def test_a_model_that_knows_the_answer_is_believed(sampler: Any) -> None:
    """If the denoised estimate is right and always the same, so is the picture, whatever the path to it."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": "sample", "set_alpha_to_one": True})
    for name in (sampler.name, f"{sampler.name} karras") if sampler.sigmas else (sampler.name,):
        table = sampler_table(name, schedule, 12)
        x, saved, history, truth = 0.7 * table.initial_noise_scale, 0.0, [0.0] * 3, 0.4
        for c in table.coefficients:
            d = c[Column.DENOISED_X] * x + c[Column.DENOISED_M] * truth
            basis = np.array([x, truth, d, saved, *history, 0.0])
            x, saved, pushed = (
                float(c[first : first + 8] @ basis) for first in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED)
            )
            history = [pushed, *history[:2]] if c[Column.PUSH] else history
        # LCM's boundary conditions and TCD's last timestep leave a little of x.
        assert x == pytest.approx(truth, abs={"lcm": 1e-3, "tcd": 0.05}.get(sampler.name, 1e-9))


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_steps(name: str) -> None:
    for steps in (0, -1, 1001):
        with pytest.raises(BadRequest, match="expected 1 to") as caught:
            sampler_table(name, SCHEDULE, steps)
        assert caught.value.param == "num_inference_steps"


@pytest.mark.parametrize("eta", [-0.1, 1.1, np.nan])
def test_bad_eta(eta: float) -> None:
    with pytest.raises(BadRequest, match="expected a number from 0 to 1") as caught:
        sampler_table("ddim", SCHEDULE, 4, eta)
    assert caught.value.param == "eta"
    with pytest.raises(BadRequest, match=r"eta is 0\.5, but euler has none: leave it out, or use ddim, tcd"):
        sampler_table("euler", SCHEDULE, 4, 0.5)


def test_distilled_steps() -> None:
    with pytest.raises(BadRequest, match="is 51, expected 1 to 50, the steps that the model was distilled with"):
        sampler_table("lcm", SCHEDULE, 51)
    schedule = NoiseSchedule(train_steps=20)
    with pytest.raises(BadRequest, match="original_inference_steps is 50, expected at most 20"):
        sampler_table("tcd", schedule, 4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_the_noise_of_nothing_but_noise(name: str) -> None:
    schedule = NoiseSchedule(zero_terminal_snr=True, timestep_spacing="trailing")
    with pytest.raises(BadRequest, match="pure noise"):
        sampler_table(name, schedule, 4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("begin", [0, 2])
def test_the_levels_are_those_of_the_latents(name: str, begin: int) -> None:
    """With a model that knows the picture the latents are, at every evaluation, so much of the picture and so much noise as the levels say:
    in float64 the coefficients of the picture, of the first noise and of each that is drawn, through the rows of the table.
    """
    table = sampler_table(name, SCHEDULE, 7, span=Span(strength=1 - begin / 7))
    count = table.evaluations
    picture, *drawn = np.eye(2 + count)
    x = table.levels[0, 0] * picture + table.levels[0, 1] * drawn[0]
    saved, history = np.zeros_like(x), [np.zeros_like(x)] * HISTORY
    for index, row in enumerate(table.coefficients):
        signal, noise = table.levels[index]
        assert x[0] == pytest.approx(signal, rel=1e-4), index
        assert np.linalg.norm(x[1:]) == pytest.approx(noise, rel=1e-4), index
        # The model's word makes d the picture; what PNDM reads of it is the noise that is there.
        of_x, of_m = row[Column.DENOISED_X], row[Column.DENOISED_M]
        m = (x - signal * picture) / noise if name == "pndm" else (picture - of_x * x) / of_m
        basis = [x, m, picture, saved, *history, drawn[1 + index]]

        def combined(first: Column, row: Any = row, basis: Any = basis) -> Any:
            return sum(row[first + offset] * value for offset, value in enumerate(basis))

        x, saved, pushed = (combined(first) for first in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED))
        if row[Column.PUSH]:
            history = [pushed, *history[:-1]]
    assert table.levels[-1].tolist() == [1.0, 0.0]
