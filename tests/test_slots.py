"""Slots under the sampler's kernel: at different steps side by side, each as it would be alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldmrt.errors import BadRequest
from ldmrt.kernels.sampler import Basis, Column
from ldmrt.samplers.ddim import ddim
from ldmrt.samplers.table import SamplerTable, blank_rows
from ldmrt.schedule import NoiseSchedule
from ldmrt.slots import Adjustments, Blend, Slots

LATENT = (4, 3, 5)
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def random_latents(seed: int, *lead: int) -> Tensor:
    return torch.randn(*lead, *LATENT, generator=torch.Generator().manual_seed(seed))


def model(inputs: Tensor, prompts: Tensor) -> Tensor:
    """Stands in for a U-Net: not linear, and each row depends on its input and its prompt only."""
    return torch.tanh(inputs.float() * 1.3 + prompts.view(-1, 1, 1, 1)).to(inputs.dtype)


def with_memory(evaluations: int) -> SamplerTable:
    """A made-up sampler that uses what DDIM does not: saved x, history, input scales and two evaluations a step."""
    rng = np.random.default_rng(evaluations)
    rows = blank_rows(evaluations)
    for first in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED):
        rows[:, first : first + len(Basis)] = rng.uniform(-0.4, 0.4, (evaluations, len(Basis)))
        rows[:, first + Basis.NOISE] = 0.0
    rows[:, Column.DENOISED_X] = 0.7
    rows[:, Column.PUSH] = np.arange(evaluations) % 2
    rows[:, Column.NEXT_INPUT_SCALE] = rng.uniform(0.5, 1.5, evaluations)
    return SamplerTable(
        name="with_memory",
        timesteps=np.arange(evaluations, dtype=np.float64)[::-1].copy(),
        coefficients=rows,
        steps=np.where(np.arange(evaluations) % 2, np.arange(evaluations) // 2, -1),
        draws_noise=np.zeros(evaluations, dtype=np.bool_),
        levels=rng.uniform(0.1, 1.0, (evaluations + 1, 2)),
        initial_input_scale=0.3,
        initial_noise_scale=2.0,
    )


class Loop:
    """Slots with the stand-in model, stepped on the CPU."""

    def __init__(self, capacity: int, rows: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.slots = Slots(capacity, rows, LATENT, capacity * 32, "cpu", dtype)
        self.prompts = torch.zeros(rows)

    def admit(
        self,
        slot: int,
        cond_row: int,
        uncond_row: int | None,
        *,
        image: int,
        table: SamplerTable,
        blend: Blend | None = None,
    ) -> None:
        """Admit the image of that number: its latents, prompts, noise and guidance follow from it."""
        self.prompts[cond_row] = 0.1 * image
        if uncond_row is not None:
            self.prompts[uncond_row] = -0.5
        self.slots.admit(
            slot,
            latents=random_latents(image),
            table=table,
            guidance_scale=1.5 + image,
            cond_row=cond_row,
            uncond_row=uncond_row,
            noise=random_latents(100 + image, table.evaluations) if table.uses_noise else None,
            blend=blend,
        )

    def step(self) -> None:
        s = self.slots
        s.update(model(s.model_input, self.prompts), s.adjustments)
        s.stepped()


def kept(seed: int) -> Blend:
    """A picture under a soft mask."""
    mask = torch.rand(1, *LATENT[1:], generator=torch.Generator().manual_seed(seed))
    return Blend(random_latents(200 + seed), random_latents(300 + seed), mask)


def alone(
    image: int,
    table: SamplerTable,
    *,
    guided: bool,
    dtype: torch.dtype = torch.float32,
    blend: Blend | None = None,
) -> Tensor:
    loop = Loop(1, 2, dtype=dtype)
    loop.admit(0, 0, 1 if guided else None, image=image, table=table, blend=blend)
    while not loop.slots.done(0):
        loop.step()
    return loop.slots.x[0].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_side_by_side_are_as_each_alone(dtype: torch.dtype) -> None:
    # step of admission, slot, conditional row, unconditional row, table
    plan: list[tuple[int, int, int, int | None, SamplerTable]] = [
        (0, 1, 4, 0, ddim(SCHEDULE, 7)),
        (0, 0, 2, None, ddim(SCHEDULE, 1)),
        (2, 2, 1, 5, ddim(SCHEDULE, 4, eta=0.8)),
        (3, 0, 2, 3, with_memory(8)),
        (8, 1, 0, None, with_memory(5)),
        (9, 2, 5, 4, ddim(SCHEDULE, 20, eta=1.0)),
    ]
    loop = Loop(3, 6, dtype=dtype)
    made: dict[int, Tensor] = {}
    held: dict[int, int] = {}
    for step in range(40):
        for image, (begin, slot, cond_row, uncond_row, table) in enumerate(plan):
            if begin == step:
                loop.admit(slot, cond_row, uncond_row, image=image, table=table)
                held[slot] = image
        for slot in loop.slots.active:
            if loop.slots.done(slot):
                made[held[slot]] = loop.slots.x[slot].clone()
                loop.slots.release(slot)
        loop.step()
    assert sorted(made) == list(range(len(plan)))
    for image, (_, _, _, uncond_row, table) in enumerate(plan):
        expected = alone(image, table, guided=uncond_row is not None, dtype=dtype)
        assert torch.equal(made[image], expected), f"image {image}"
        assert expected.isfinite().all()


def test_ddim_in_a_slot_is_the_loop_written_out() -> None:
    table = ddim(SCHEDULE, 10)
    x = random_latents(3).double()
    for row in table.coefficients:
        cond, uncond = torch.tanh(x * 1.3 + 0.3), torch.tanh(x * 1.3 - 0.5)
        m = uncond + 4.5 * (cond - uncond)
        d = row[Column.DENOISED_X] * x + row[Column.DENOISED_M] * m
        x = row[Column.NEXT_X + Basis.M] * m + row[Column.NEXT_X + Basis.D] * d
    torch.testing.assert_close(alone(3, table, guided=True).double(), x, rtol=1e-4, atol=1e-5)


def test_a_finished_slot_may_be_stepped_on() -> None:
    loop = Loop(1, 2)
    loop.admit(0, 0, 1, image=1, table=ddim(SCHEDULE, 3, eta=1.0))
    for _ in range(3):
        assert not loop.slots.done(0)
        loop.step()
    assert loop.slots.done(0)
    final = loop.slots.x.clone()
    for _ in range(40):
        loop.step()
    assert torch.equal(loop.slots.x, final)
    assert loop.slots.made(0) == 3
    assert loop.slots.row.tolist() == loop.slots.last_row.tolist() == [3]


def test_admission_writes_the_first_model_input_and_leaves_others_alone() -> None:
    loop = Loop(2, 4)
    slots = loop.slots
    loop.admit(0, 3, None, image=1, table=ddim(SCHEDULE, 3))
    before = {name: getattr(slots, name).clone() for name in ("x", "table", "model_input", "noise")}
    table = with_memory(4)
    loop.admit(1, 0, 2, image=2, table=table)
    assert torch.equal(slots.x[1], random_latents(2) * 2.0)
    for row in (0, 2):
        assert torch.equal(slots.model_input[row], slots.x[1] * 0.3)
    assert torch.equal(slots.x[0], before["x"][0])
    assert torch.equal(slots.model_input[[1, 3]], before["model_input"][[1, 3]])
    assert torch.equal(slots.table[:32], before["table"][:32])
    assert torch.equal(slots.table[32:36], torch.from_numpy(table.coefficients).float())
    assert torch.equal(slots.table[36], torch.from_numpy(blank_rows(1)[0]).float())
    assert slots.row.tolist() == [0, 32]
    assert slots.last_row.tolist() == [3, 36]
    assert slots.cond_row.tolist() == [3, 0]
    assert slots.uncond_row.tolist() == [-1, 2]
    assert slots.guidance_scale.tolist() == [2.5, 3.5]


def test_buffers_keep_their_addresses() -> None:
    loop = Loop(2, 4)

    def addresses() -> list[int]:
        buffers = [value for value in vars(loop.slots).values() if isinstance(value, Tensor)]
        return [tensor.data_ptr() for tensor in (*buffers, *loop.slots.blends)]

    before = addresses()
    assert len(before) == 16
    for image in range(3):
        loop.admit(0, 0, 1, image=image, table=ddim(SCHEDULE, 2, eta=1.0), blend=kept(image))
        loop.step()
        loop.step()
        loop.slots.release(0)
    assert addresses() == before


def test_free_and_active() -> None:
    loop = Loop(3, 4)
    assert loop.slots.free == [0, 1, 2]
    assert not loop.slots.done(0)
    loop.admit(1, 2, None, image=0, table=ddim(SCHEDULE, 1))
    assert loop.slots.active == [1]
    loop.step()
    assert loop.slots.done(1)
    loop.slots.release(1)
    loop.slots.release(1)
    assert loop.slots.free == [0, 1, 2]
    assert not loop.slots.done(1)
    assert loop.slots.cond_row.tolist() == [-1, -1, -1]


def test_adjustments_are_those_of_the_images_that_are_here() -> None:
    slots = Loop(3, 4).slots
    thresholding = ddim(replace(SCHEDULE, thresholding=True), 2)
    for slot, rows, table, rescale in ((0, (0, 1), ddim(SCHEDULE, 2), 0.5), (1, (2,), thresholding, 0.5)):
        slots.admit(
            slot, latents=random_latents(slot), table=table, guidance_scale=2.0, cond_row=rows[0],
            uncond_row=rows[1] if len(rows) > 1 else None, guidance_rescale=rescale,
        )  # fmt: skip
    slots.admit(2, latents=random_latents(2), table=ddim(SCHEDULE, 2), guidance_scale=1.0, cond_row=3, blend=kept(1))
    assert slots.adjustments == (True, True, True)
    slots.release(0)
    assert slots.adjustments == (False, True, True)  # without guidance there is nothing to rescale
    slots.release(2)
    assert slots.adjustments == (False, True, False)
    slots.release(1)
    assert slots.adjustments == (False, False, False)


def test_a_picture_is_kept_beside_images_that_keep_none() -> None:
    """Whatever runs beside it, and however long it is stepped on when it is finished: a soft mask is laid on once a step."""
    table, expected = ddim(SCHEDULE, 3, eta=0.5), [alone(1, ddim(SCHEDULE, 3, eta=0.5), guided=True, blend=kept(1))]
    expected.append(alone(2, with_memory(6), guided=False))
    loop = Loop(2, 4)
    loop.admit(0, 3, 1, image=1, table=table, blend=kept(1))
    loop.admit(1, 0, None, image=2, table=with_memory(6))
    for _ in range(6):
        loop.step()
    for slot, one in enumerate(expected):
        assert torch.equal(loop.slots.x[slot], one)
    # The slot's next image keeps nothing.
    loop.slots.release(0)
    loop.admit(0, 3, 1, image=1, table=table)
    for _ in range(3):
        loop.step()
    assert torch.equal(loop.slots.x[0], alone(1, table, guided=True))


def test_a_model_row_is_moved() -> None:
    """An image goes on as if nothing had happened, and its former rows are free."""
    table, expected = ddim(SCHEDULE, 4, eta=0.5), alone(3, ddim(SCHEDULE, 4, eta=0.5), guided=True)
    loop = Loop(2, 4)
    loop.admit(1, 3, 2, image=3, table=table)
    loop.step()
    loop.prompts[0], loop.prompts[1] = loop.prompts[2], loop.prompts[3]
    loop.slots.move(1, 2, 0)
    loop.slots.move(1, 3, 1)
    assert loop.slots.rows_of(1) == (1, 0)
    assert loop.slots.free_rows == [2, 3]
    for _ in range(3):
        loop.step()
    assert torch.equal(loop.slots.x[1], expected)


def test_nothing_moves_while_paused() -> None:
    loop = Loop(2, 4)
    loop.admit(0, 0, 1, image=0, table=ddim(SCHEDULE, 4, eta=0.5), blend=kept(0))
    loop.step()
    slots = loop.slots
    names = ("x", "saved", "history", "table", "row", "cond_row", "uncond_row", "model_input")
    before = {name: getattr(slots, name).clone() for name in names}
    with slots.paused():
        for _ in range(2):
            slots.update(torch.ones_like(slots.model_input), Adjustments(rescales=True, thresholds=True, blends=True))
    for name in names:
        assert torch.equal(getattr(slots, name), before[name]), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"slot": 2}, "slot is 2, expected 0 to 1"),
        ({"slot": 0}, "slot 0 is taken"),
        ({"cond_row": 4}, "model row is 4, expected 0 to 3"),
        ({"cond_row": -1}, "model row is -1"),
        ({"cond_row": 0}, "model row 0 is taken"),
        ({"uncond_row": 2}, "model row 2 is taken: no two may share one"),
        ({"latents": torch.zeros(1, *LATENT)}, "latents have shape (1, 4, 3, 5), expected (4, 3, 5)"),
        ({"table": ddim(SCHEDULE, 32)}, "evaluates the model 32 times, expected at most 31"),
        ({"table": ddim(SCHEDULE, 2, eta=1.0)}, "noise is missing, expected shape (2, 4, 3, 5)"),
        ({"table": ddim(SCHEDULE, 2, eta=1.0), "noise": torch.zeros(LATENT)}, "noise is of shape (4, 3, 5)"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], says: str) -> None:
    loop = Loop(2, 4)
    loop.admit(0, 0, 1, image=0, table=ddim(SCHEDULE, 3))
    before = loop.slots.table.clone()
    fields: dict[str, Any] = {
        "slot": 1,
        "latents": random_latents(0),
        "table": ddim(SCHEDULE, 31),
        "guidance_scale": 1.0,
    }
    fields |= {"cond_row": 2, "uncond_row": None}
    with pytest.raises(BadRequest) as caught:
        loop.slots.admit(**(fields | changes))
    assert says in str(caught.value)
    assert torch.equal(loop.slots.table, before)
    assert loop.slots.active == [0]
    loop.slots.admit(**fields)


@pytest.mark.parametrize(("capacity", "rows", "entries"), [(0, 1, 8), (2, 1, 8), (2, 2, 3)])
def test_sizes_without_room(capacity: int, rows: int, entries: int) -> None:
    with pytest.raises(BadRequest):
        Slots(capacity, rows, LATENT, entries, "cpu", torch.float32)
