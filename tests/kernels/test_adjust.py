"""Guidance rescale and dynamic thresholding against diffusers', slot by slot, through the update that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldmrt.kernels.adjust import rescale_guidance, threshold
from ldmrt.kernels.sampler import WIDTH, Basis, Column, sampler_step_reference
from tests.replay import Recorder

LATENT = (4, 6, 5)
TARGETS = (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED)
# Slots: guided, idle, not guided, guided. Rows of the model and of the table in another order than the slots.
GUIDANCE = torch.tensor([7.5, 3.0, 2.0, 4.0]), torch.tensor([4, -1, 0, 2]), torch.tensor([1, -1, -1, 5])
ROW = torch.tensor([2, 0, 3, 1])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(table: Tensor, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The state after `sampler_step` over this table, from a state that is always the same."""
    state: dict[str, Any] = {
        "x": x.clone(),
        "saved": normal(2, 4, *LATENT),
        "history": normal(3, 3, 4, *LATENT),
        "model_input": torch.zeros(6, *LATENT),
    }
    guidance = dict(zip(("guidance_scale", "cond_row", "uncond_row"), GUIDANCE, strict=True))
    sampler_step_reference(**state, **guidance, model_output=output, table=table, row=ROW, noise=None)
    return state


def random_table() -> Tensor:
    table = normal(1, 5, WIDTH)
    table[:, 5::7] = 0
    table[:, Column.CLIP] = torch.inf
    table[:, Column.PUSH] = 1
    table[:, Column.THRESHOLD_RATIO :] = 0
    return table


def rescaled(output: Tensor, amount: Tensor) -> Tensor:
    """Model outputs that without rescale give what these give with it: both rows of a slot, multiplied, by diffusers' function."""
    output = output.double()
    for slot, (scale, cond, uncond) in enumerate(zip(*(values.tolist() for values in GUIDANCE), strict=True)):
        if uncond >= 0:
            m = output[uncond] + scale * (output[cond] - output[uncond])
            factor = rescale_noise_cfg(m[None], output[cond][None], float(amount[slot]))[0] / m
            output[[cond, uncond]] *= factor.flatten()[0]
    return output.float()


def test_rescale_is_diffusers() -> None:
    output, amount = normal(5, 6, *LATENT), torch.tensor([0.7, 0.7, 0.7, 1.0])
    table, x = random_table(), normal(6, 4, *LATENT)
    expected = update(table, rescaled(output, amount), x)
    rescale_guidance(output, table, ROW, amount, *GUIDANCE)
    for name, value in update(table, output, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_slots_that_ask_for_nothing_are_unchanged_to_the_bit() -> None:
    table, output = random_table(), normal(5, 6, *LATENT)
    before = table.clone()
    rescale_guidance(output, table, ROW, torch.tensor([0.0, 0.7, 0.7, 0.7]), *GUIDANCE)
    changed = (table != before).any(1)
    assert changed.tolist() == [False, True, False, False, False]  # slot 3 alone is guided and asks
    ratio = before[1].nonzero()
    assert ((table[1] != 0).nonzero() == ratio).all()  # what was zero is zero


def test_threshold_is_diffusers() -> None:
    """Of slots with a ratio; the others are clipped, or left alone."""
    output, table, x = 2 * normal(5, 6, *LATENT), random_table(), normal(6, 4, *LATENT)
    table[:, Column.DENOISED_X], table[:, Column.DENOISED_M] = 0.4, -0.9
    ratios, limits = {0: 0.9, 3: 0.995}, {0: 1.7, 3: 1.2}
    for slot, ratio in ratios.items():
        table[ROW[slot], Column.THRESHOLD_RATIO], table[ROW[slot], Column.THRESHOLD_MAX] = ratio, limits[slot]
    table[ROW[2], Column.CLIP] = 0.5
    before = table.clone()
    threshold(x, output, table, ROW, *GUIDANCE)
    assert torch.equal(table[[0, 3, 4]], before[[0, 3, 4]])  # an idle slot, one that clips, and nobody's
    after = update(table, output, x)
    for slot, ratio in ratios.items():
        scale, cond, uncond = (values[slot] for values in GUIDANCE)
        m = output[uncond] + scale * (output[cond] - output[uncond])
        scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=limits[slot])
        d = scheduler._threshold_sample((0.4 * x[slot] - 0.9 * m)[None])[0]
        coefficients = before[ROW[slot]]
        history = normal(3, 3, 4, *LATENT)[:, slot]
        basis = [x[slot], m, d, normal(2, 4, *LATENT)[slot], *history]
        for target, found in zip(TARGETS, (after["x"], after["saved"], after["history"][0]), strict=True):
            expected = torch.stack([coefficients[target + k] * value for k, value in enumerate(basis)]).sum(0)
            torch.testing.assert_close(found[slot], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_stays_in_its_slot(poison: float) -> None:
    """And out of coefficients that are zero, such as those of a finished slot's row."""
    table, output, x = torch.zeros(5, WIDTH), normal(5, 6, *LATENT), normal(6, 4, *LATENT)
    table[:, Column.DENOISED_M] = 1.0
    table[:, Column.NEXT_X + Basis.D] = 1.0
    table[:, Column.THRESHOLD_RATIO], table[:, Column.THRESHOLD_MAX] = 0.9, 2.0
    table[ROW[0]] = 0.0
    output[4] = poison  # slot 0
    rescale_guidance(output, table, ROW, torch.ones(4), *GUIDANCE)
    threshold(x, output, table, ROW, *GUIDANCE)
    assert table.isfinite().all()
    assert not table[ROW[0]].any()


def test_both_can_be_captured() -> None:
    table, output, x = random_table(), normal(5, 6, *LATENT), normal(6, 4, *LATENT)
    table[:, Column.THRESHOLD_RATIO], table[:, Column.THRESHOLD_MAX] = 0.9, 2.0
    fresh, amount = table.clone(), torch.tensor([0.7, 0.0, 0.0, 0.2])

    def work() -> None:
        rescale_guidance(output, table, ROW, amount, *GUIDANCE)
        threshold(x, output, table, ROW, *GUIDANCE)

    replay = Recorder().record(work)
    output.copy_(normal(8, 6, *LATENT))
    table.copy_(fresh)
    work()
    expected = table.clone()
    table.copy_(fresh)
    replay()
    assert torch.equal(table, expected)
    assert not torch.equal(table, fresh)
