"""The state of the sampling loop: buffers that keep their addresses, and the slots in them.

A slot is a place for one image being made. Each has its own latents, sampler table, guidance and step count, so images that
began at different times are stepped together. Model rows are not slots: a slot has one row of the model's batch for its
prompt and, with guidance, one more for its negative prompt.

Nothing here is allocated after `__init__` but small temporaries on admission, so a captured step stays valid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldmrt.errors import BadRequest
from ldmrt.kernels.adjust import rescale_guidance, threshold
from ldmrt.kernels.sampler import HISTORY, WIDTH, advance, sampler_step
from ldmrt.samplers.table import SamplerTable, blank_rows


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
        noise: (entries, C, H, W) float32, parallel to `table`; None without `with_noise`.
        row: (capacity,) int64, the row of `table` that each slot is at.
        last_row: (capacity,) int64, the row where it stays: one that changes nothing, behind its sampler's rows.
        guidance_scale: (capacity,) float32.
        guidance_rescale: (capacity,) float32; None without `with_rescale`.
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
        *,
        with_noise: bool = False,
        with_rescale: bool = False,
        with_thresholds: bool = False,
    ) -> None:
        """Allocate everything.

        Args:
            capacity: slots.
            rows: rows of the model's batch, at least one for each slot.
            latent_shape: (C, H, W).
            entries: rows of the table, divided evenly among the slots; each needs its sampler's evaluations and one more.
            device: where the buffers are.
            model_dtype: of `model_input`.
            with_noise: allocate `noise`, for samplers that draw some at each step.
            with_rescale: allocate `guidance_rescale`, and look at it in every update.
            with_thresholds: look in every update for rows that ask for dynamic thresholding.

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
        self.noise: Tensor | None = latents(entries) if with_noise else None
        self.table = torch.from_numpy(blank_rows(entries)).to(device=device, dtype=torch.float32)
        self.row = torch.arange(capacity, device=device) * self.entries_per_slot
        self.last_row = self.row.clone()
        self.guidance_scale = torch.ones(capacity, dtype=torch.float32, device=device)
        self.guidance_rescale = torch.zeros_like(self.guidance_scale) if with_rescale else None
        self._with_thresholds = with_thresholds
        self.cond_row = indices(-1)
        self.uncond_row = indices(-1)
        # What the host knows without asking the device: evaluations admitted and made, and model rows in use, by slot.
        self._evaluations = [0] * capacity
        self._made = [0] * capacity
        self._rows_of: list[tuple[int, ...]] = [()] * capacity

    @property
    def free(self) -> list[int]:
        """The slots that hold nothing."""
        return [slot for slot in range(self.capacity) if not self._rows_of[slot]]

    @property
    def active(self) -> list[int]:
        """The slots that were admitted and not released."""
        return [slot for slot in range(self.capacity) if self._rows_of[slot]]

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

        Raises:
            BadRequest: the table, the noise or the rescale does not fit, a shape is wrong, or the slot or a row is taken.
        """
        rows = (cond_row,) if uncond_row is None else (cond_row, uncond_row)
        self._check(slot, latents, table, rows, noise)
        self._check_room(table, guidance_rescale)
        first = slot * self.entries_per_slot
        last = first + table.evaluations

        # The row behind the sampler's own changes nothing, so a finished slot may be stepped on with the others.
        entries = np.concatenate([table.coefficients, blank_rows(1)]).astype(np.float32)
        self.table[first : last + 1].copy_(torch.from_numpy(entries))
        if self.noise is not None and table.uses_noise and noise is not None:
            self.noise[first:last].copy_(noise)

        self.x[slot].copy_(latents).mul_(table.initial_noise_scale)
        self.saved[slot].zero_()
        self.history[:, slot].zero_()
        self.row[slot] = first
        self.last_row[slot] = last
        self.guidance_scale[slot] = guidance_scale
        if self.guidance_rescale is not None:
            self.guidance_rescale[slot] = guidance_rescale
        self.cond_row[slot] = cond_row
        self.uncond_row[slot] = -1 if uncond_row is None else uncond_row
        for row in rows:
            self.model_input[row].copy_(self.x[slot] * table.initial_input_scale)
        self._evaluations[slot] = table.evaluations
        self._made[slot] = 0
        self._rows_of[slot] = rows

    def release(self, slot: int) -> None:
        """Free a slot and its model rows; its latents stay until the next admission. Releasing a free slot does nothing."""
        self.cond_row[slot] = -1
        self.uncond_row[slot] = -1
        self.row[slot] = self.last_row[slot]
        self._rows_of[slot] = ()
        self._evaluations[slot] = self._made[slot] = 0

    def update(self, model_output: Tensor) -> None:
        """The sampler's part of a step on the device: every admitted slot's next latents and model input, and its next row.

        Args:
            model_output: (rows, C, H, W) of the model's dtype.
        """
        guidance = self.guidance_scale, self.cond_row, self.uncond_row
        if self.guidance_rescale is not None:
            rescale_guidance(model_output, self.table, self.row, self.guidance_rescale, *guidance)
        if self._with_thresholds:
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
            if self.noise is None:
                raise BadRequest(f"{table.name} draws noise at each step, for which no room was made", param="sampler")
            expected = (table.evaluations, *self.latent_shape)
            if noise is None or tuple(noise.shape) != expected:
                found_noise = "missing" if noise is None else f"of shape {tuple(noise.shape)}"
                raise BadRequest(f"the sampler's noise is {found_noise}, expected shape {expected}")

    def _check_room(self, table: SamplerTable, guidance_rescale: float) -> None:
        if guidance_rescale and self.guidance_rescale is None:
            raise BadRequest("guidance is to be rescaled, for which no room was made", param="guidance_rescale")
        if table.thresholds and not self._with_thresholds:
            raise BadRequest(f"{table.name} is to threshold, for which no room was made", param="sampler")
