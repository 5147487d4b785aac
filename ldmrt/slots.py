"""The state of the sampling loop: buffers that keep their addresses, and the slots in them.

A slot is a place for one image being made. Each has its own latents, sampler table, guidance and step count, so images that
began at different times are stepped together. Model rows are not slots: a slot has one row of the model's batch for its
prompt and, with guidance, one more for its negative prompt.

Nothing here is allocated after `__init__` but small temporaries on admission, so a captured step stays valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldmrt.errors import BadRequest
from ldmrt.kernels.adjust import rescale_guidance, threshold
from ldmrt.kernels.blend import blend
from ldmrt.kernels.sampler import HISTORY, WIDTH, advance, sampler_step
from ldmrt.samplers.table import SamplerTable, blank_rows


class Adjustments(NamedTuple):
    """What `ldmrt.kernels.adjust` has to do before an update, and `ldmrt.kernels.blend` after it.

    Attributes:
        rescales: whether guidance is rescaled for some image.
        thresholds: whether some image's sampler thresholds.
        blends: whether some image keeps a part of a picture.
    """

    rescales: bool = False
    thresholds: bool = False
    blends: bool = False


class Blend(NamedTuple):
    """What an image keeps of a picture: see `ldmrt.kernels.blend`.

    Attributes:
        original: (C, H, W) float32, the picture's latents.
        noise: (C, H, W) float32, standard normal.
        mask: (1, H, W) float32, 1 for what is drawn anew, 0 for what stays.
    """

    original: Tensor
    noise: Tensor
    mask: Tensor


class Slots:
    """The static buffers of `ldmrt.kernels.sampler.sampler_step`, and what is admitted to them.

    Attributes:
        capacity: slots.
        rows: rows of the model's batch.
        entries_per_slot: rows of `table` that belong to a slot: slot s has those from s * entries_per_slot.
        x: (capacity, C, H, W) float32, the latents.
        saved: (capacity, C, H, W) float32, an x kept from an earlier evaluation.
        history: (3, capacity, C, H, W) float32, values of earlier evaluations.
        table: (entries, WIDTH) float32, see `ldmrt.kernels.sampler.Column`.
        noise: (entries, C, H, W) float32, parallel to `table`.
        levels: (entries, 2) float32, parallel to `table`: what of a picture and of noise is kept behind each evaluation; zeros for nothing.
        blends: (capacity, C, H, W), the same again, (capacity, 1, H, W) float32: what is kept, as of `Blend`.
        row: (capacity,) int64, the row of `table` that each slot is at.
        last_row: (capacity,) int64, the row where it stays: one that changes nothing, behind its sampler's rows.
        guidance_scale: (capacity,) float32.
        guidance_rescale: (capacity,) float32.
        cond_row: (capacity,) int64, the model row of the prompt; -1 for a slot that is free.
        uncond_row: (capacity,) int64, the model row of the negative prompt; -1 without guidance.
        model_input: (rows, C, H, W) of the model's dtype, what the model gets next.
    """

    def __init__(
        self,
        capacity: int,
        rows: int,
        latent_shape: tuple[int, int, int],
        entries: int,
        device: torch.device | str,
        model_dtype: torch.dtype,
    ) -> None:
        """Allocate everything.

        Args:
            capacity: slots.
            rows: rows of the model's batch, at least one for each slot.
            latent_shape: (C, H, W).
            entries: rows of the table, divided evenly among the slots; each needs its sampler's evaluations and one more.
            device: where the buffers are.
            model_dtype: of `model_input`.

        Raises:
            BadRequest: the numbers leave no room for a sampler of one evaluation in each slot.
        """
        if capacity < 1 or rows < capacity:
            raise BadRequest(f"{capacity} slots with {rows} model rows: expected at least one slot, and a row for each")
        if entries < 2 * capacity:
            raise BadRequest(f"{entries} table entries for {capacity} slots: expected {2 * capacity} or more")
        self.capacity = capacity
        self.rows = rows
        self.latent_shape = latent_shape
        self.entries_per_slot = entries // capacity

        def latents(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*lead, *latent_shape, dtype=dtype, device=device)

        def indices(value: int) -> Tensor:
            return torch.full((capacity,), value, dtype=torch.int64, device=device)

        self.x = latents(capacity)
        self.saved = latents(capacity)
        self.history = latents(HISTORY, capacity)
        self.model_input = latents(rows, dtype=model_dtype)
        self.noise = latents(entries)
        self.blends = Blend(latents(capacity), latents(capacity), latents(capacity)[:, :1].clone())
        self.levels = torch.zeros((entries, 2), dtype=torch.float32, device=device)
        self.table = torch.from_numpy(blank_rows(entries)).to(device=device, dtype=torch.float32)
        self.row = torch.arange(capacity, device=device) * self.entries_per_slot
        self.last_row = self.row.clone()
        self.guidance_scale = torch.ones(capacity, dtype=torch.float32, device=device)
        self.guidance_rescale = torch.zeros_like(self.guidance_scale)
        self.cond_row = indices(-1)
        self.uncond_row = indices(-1)
        # What the host knows without asking the device, by slot: evaluations admitted and made, model rows in use, adjustments.
        self._evaluations = [0] * capacity
        self._made = [0] * capacity
        self._rows_of: list[tuple[int, ...]] = [()] * capacity
        self._adjustments = [Adjustments()] * capacity

    @property
    def free(self) -> list[int]:
        """The slots that hold nothing."""
        return [slot for slot in range(self.capacity) if not self._rows_of[slot]]

    @property
    def active(self) -> list[int]:
        """The slots that were admitted and not released."""
        return [slot for slot in range(self.capacity) if self._rows_of[slot]]

    @property
    def free_rows(self) -> list[int]:
        """The model rows that no slot has."""
        taken = {row for rows in self._rows_of for row in rows}
        return [row for row in range(self.rows) if row not in taken]

    @property
    def adjustments(self) -> Adjustments:
        """What the images that are here ask for."""
        return Adjustments(*(any(asked) for asked in zip(*self._adjustments, strict=True)))

    def rows_of(self, slot: int) -> tuple[int, ...]:
        """The model rows of a slot: of its prompt and, with guidance, of its negative prompt; none if it is free."""
        return self._rows_of[slot]

    def admit(
        self,
        slot: int,
        *,
        latents: Tensor,
        table: SamplerTable,
        guidance_scale: float,
        cond_row: int,
        uncond_row: int | None = None,
        noise: Tensor | None = None,
        guidance_rescale: float = 0.0,
        blend: Blend | None = None,
    ) -> None:
        """Put an image into a free slot, ready for its first evaluation.

        Args:
            slot: 0 to capacity - 1.
            latents: (C, H, W) float32, standard normal noise, on any device; the table's initial scale is applied here.
            table: the sampler.
            guidance_scale: the weight of m_cond - m_uncond; without meaning when uncond_row is None.
            cond_row: the model row for the prompt.
            uncond_row: the model row for the negative prompt; None without guidance.
            noise: (evaluations, C, H, W) float32, standard normal; what a table that `uses_noise` needs.
            guidance_rescale: see `ldmrt.kernels.adjust.rescale_guidance`; without meaning when uncond_row is None.
            blend: what is kept of a picture, on any device; None for nothing.

        Raises:
            BadRequest: the table or the noise does not fit, a shape is wrong, or the slot or a row is taken.
        """
        rows = (cond_row,) if uncond_row is None else (cond_row, uncond_row)
        self._check(slot, latents, table, rows, noise)
        first = slot * self.entries_per_slot
        last = first + table.evaluations

        # The row behind the sampler's own changes nothing, so a finished slot may be stepped on with the others.
        entries = np.concatenate([table.coefficients, blank_rows(1)]).astype(np.float32)
        self.table[first : last + 1].copy_(torch.from_numpy(entries))
        if table.uses_noise and noise is not None:
            self.noise[first:last].copy_(noise)
        self.levels[first : last + 1].zero_()
        if blend is not None:
            self.levels[first:last].copy_(torch.from_numpy(table.levels[1:].astype(np.float32)))
            for buffers, one in zip(self.blends, blend, strict=True):
                buffers[slot].copy_(one)

        self.x[slot].copy_(latents).mul_(table.initial_noise_scale)
        self.saved[slot].zero_()
        self.history[:, slot].zero_()
        self.row[slot] = first
        self.last_row[slot] = last
        self.guidance_scale[slot] = guidance_scale
        self.guidance_rescale[slot] = guidance_rescale
        self.cond_row[slot] = cond_row
        self.uncond_row[slot] = -1 if uncond_row is None else uncond_row
        for row in rows:
            self.model_input[row].copy_(self.x[slot] * table.initial_input_scale)
        self._evaluations[slot] = table.evaluations
        self._made[slot] = 0
        self._rows_of[slot] = rows
        self._adjustments[slot] = Adjustments(
            guidance_rescale > 0 and uncond_row is not None, table.thresholds, blend is not None
        )

    def move(self, slot: int, row: int, to: int) -> None:
        """Give a slot a free model row in the place of one of its own."""
        rows = self._rows_of[slot]
        (self.cond_row if row == rows[0] else self.uncond_row)[slot] = to
        self.model_input[to].copy_(self.model_input[row])
        self._rows_of[slot] = tuple(to if one == row else one for one in rows)

    def release(self, slot: int) -> None:
        """Free a slot and its model rows; its latents stay until the next admission. Releasing a free slot does nothing."""
        self.cond_row[slot] = -1
        self.uncond_row[slot] = -1
        self.row[slot] = self.last_row[slot]
        self._rows_of[slot] = ()
        self._evaluations[slot] = self._made[slot] = 0
        self._adjustments[slot] = Adjustments()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For the device all slots are free until the end of the block: updates move no image."""
        kept = [(tensor, tensor.clone()) for tensor in (self.cond_row, self.row)]
        self.cond_row.fill_(-1)
        yield
        for tensor, before in kept:
            tensor.copy_(before)

    def update(self, model_output: Tensor, adjustments: Adjustments) -> None:
        """The sampler's part of a step on the device: every admitted slot's next latents and model input, and its next row.

        Args:
            model_output: (rows, C, H, W) of the model's dtype.
            adjustments: at least what the slots ask for; those that do not ask come to no harm.
        """
        guidance = self.guidance_scale, self.cond_row, self.uncond_row
        if adjustments.rescales:
            rescale_guidance(model_output, self.table, self.row, self.guidance_rescale, *guidance)
        if adjustments.thresholds:
            threshold(self.x, model_output, self.table, self.row, *guidance)
        sampler_step(
            self.x,
            self.saved,
            self.history,
            model_output,
            self.table,
            self.row,
            self.noise,
            *guidance,
            self.model_input,
        )
        if adjustments.blends:
            blend(
                self.x,
                *self.blends,
                self.levels,
                self.table,
                self.row,
                self.cond_row,
                self.uncond_row,
                self.model_input,
            )
        advance(self.row, self.last_row)

    def stepped(self) -> None:
        """Count one evaluation for each slot: to be called by the host each time the device steps."""
        for slot in self.active:
            self._made[slot] = min(self._made[slot] + 1, self._evaluations[slot])

    def made(self, slot: int) -> int:
        """Evaluations made for the image in this slot."""
        return self._made[slot]

    def done(self, slot: int) -> bool:
        """Whether the image in this slot is complete, from the host's own count: the device is not asked."""
        return bool(self._rows_of[slot]) and self._made[slot] == self._evaluations[slot]

    def _check(
        self, slot: int, latents: Tensor, table: SamplerTable, rows: tuple[int, ...], noise: Tensor | None
    ) -> None:
        if not 0 <= slot < self.capacity:
            raise BadRequest(f"slot is {slot}, expected 0 to {self.capacity - 1}")
        if self._rows_of[slot]:
            raise BadRequest(f"slot {slot} is taken: release it first")
        taken = {row for rows_of in self._rows_of for row in rows_of}
        for index, row in enumerate(rows):
            if not 0 <= row < self.rows:
                raise BadRequest(f"model row is {row}, expected 0 to {self.rows - 1}")
            if row in taken or row in rows[:index]:
                raise BadRequest(f"model row {row} is taken: no two may share one")
        if table.coefficients.shape != (table.evaluations, WIDTH):
            found = table.coefficients.shape
            raise BadRequest(f"the sampler's table has shape {found}, expected ({table.evaluations}, {WIDTH})")
        if table.evaluations >= self.entries_per_slot:
            raise BadRequest(
                f"the sampler evaluates the model {table.evaluations} times, expected at most {self.entries_per_slot - 1}:"
                " ask for fewer steps",
                param="num_inference_steps",
            )
        if tuple(latents.shape) != self.latent_shape:
            raise BadRequest(
                f"latents have shape {tuple(latents.shape)}, expected {self.latent_shape}", param="latents"
            )
        if table.uses_noise:
            expected = (table.evaluations, *self.latent_shape)
            if noise is None or tuple(noise.shape) != expected:
                found_noise = "missing" if noise is None else f"of shape {tuple(noise.shape)}"
                raise BadRequest(f"the sampler's noise is {found_noise}, expected shape {expected}")
