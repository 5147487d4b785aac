"""Blending against the papers' formula in float64, slot by slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels.blend import blend
from ldmrt.kernels.sampler import WIDTH, Column
from tests.replay import Recorder

LATENT = (4, 6, 5)
# Slots: guided, idle, not guided, guided but at a row that keeps nothing. Rows of the model and of the table in another order.
COND, UNCOND, ROW = torch.tensor([4, -1, 0, 2]), torch.tensor([1, -1, -1, 5]), torch.tensor([2, 0, 3, 1])
ASKED = (0, 2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    levels = normal(5, 5, 2)
    levels[1] = 0
    return {
        "x": normal(1, 4, *LATENT),
        "original": normal(2, 4, *LATENT),
        "noise": normal(3, 4, *LATENT),
        "mask": torch.rand(4, 1, *LATENT[1:], generator=torch.Generator().manual_seed(4)),
        "levels": levels,
        "table": normal(6, 5, WIDTH),
        "row": ROW.clone(),
        "cond_row": COND.clone(),
        "uncond_row": UNCOND.clone(),
        "model_input": normal(7, 6, *LATENT).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype: torch.dtype) -> None:
    given = state(dtype)
    x, model_input = given["x"].double(), given["model_input"].clone()
    for slot in ASKED:
        signal, noise = given["levels"][ROW[slot]].double()
        mask, scale = given["mask"][slot].double(), given["table"][ROW[slot], Column.NEXT_INPUT_SCALE]
        kept = signal * given["original"][slot].double() + noise * given["noise"][slot].double()
        x[slot] = (1 - mask) * kept + mask * x[slot]
        for row in (COND[slot], UNCOND[slot]):
            if row >= 0:
                model_input[row] = (scale * x[slot].float()).to(dtype)
    others = given["x"][[1, 3]].clone()
    blend(**given)
    # Three products and two sums in float32, of numbers up to 10.
    torch.testing.assert_close(given["x"].double(), x, rtol=0, atol=1e-5)
    # bfloat16 may round up where the float32 sum was rounded down.
    torch.testing.assert_close(
        given["model_input"], model_input, rtol=0 if dtype == torch.float32 else 2**-7, atol=1e-5
    )
    assert torch.equal(given["x"][[1, 3]], others)
    assert torch.equal(given["model_input"][[2, 3, 5]], model_input[[2, 3, 5]])


def test_what_nobody_keeps_cannot_reach_a_picture() -> None:
    given = state()
    expected = state()
    blend(**expected)
    for name in ("original", "noise", "mask"):
        given[name][[1, 3]] = torch.nan
    blend(**given)
    assert torch.equal(given["x"], expected["x"])
    assert torch.equal(given["model_input"], expected["model_input"])


def test_a_black_mask_gives_the_picture_to_the_bit() -> None:
    given = state()
    given["mask"].zero_()
    given["levels"][ROW[0]] = torch.tensor([1.0, 0.0])
    blend(**given)
    assert torch.equal(given["x"][0], given["original"][0])


def test_it_can_be_captured() -> None:
    given, expected = state(), state()
    replay = Recorder().record(lambda: blend(**given))
    for name, value in state().items():
        given[name].copy_(value)
    replay()
    blend(**expected)
    assert torch.equal(given["x"], expected["x"])
    assert torch.equal(given["model_input"], expected["model_input"])
