"""The sampling loop: one step over static buffers, for images that may each be at another step.

A step is three things in a row: the `step` engine, behind those of ControlNets if there are any, the sampler's update (guidance, one
row of coefficients, the next model input), and the advance of the row indices. Its state lies in static buffers and nothing is read back, so that the same calls can be
captured as a CUDA graph; on the CPU they run as they are. Engines of several row counts share the buffers, each has the first rows: images join and leave, and every
step runs on the smallest that holds those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ldmrt.capture import Recorder, Work
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.errors import EngineMismatch
from ldmrt.network import Conditioning, Network, Parts, rows_of, sizes
from ldmrt.samplers.table import SamplerTable
from ldmrt.slots import Adjustments, Blend, Slots


@dataclass(frozen=True)
class _Admitted:
    """What the tables of a slot are made of, kept to make them again when the weights change."""

    table: SamplerTable
    conditionings: tuple[Conditioning, ...]
    controls: tuple[Conditioning, ...]


class _Captured(NamedTuple):
    """What a CUDA graph does: so many steps on the engines of so many rows, and what follows them."""

    rows: int
    adjustments: Adjustments
    steps: int
    then: Work | None


class Denoiser:
    """A batch of images being denoised. Every slot takes any sampler, with or without guidance: an image takes one row of the model's
    batch, or two.

    Attributes:
        rows: the most rows of a batch, as many as there are slots.
        evaluations: the most model evaluations of one image.
        slots: the state of the images.

    Args:
        context: see `ldmrt.network.Parts`, as for the next two.
        schedule: see there.
        step: see there; `add` adds more of them.
        rows: what buffers are made for, at least the step's.
        tokens: length of the text embeddings.
        evaluations: the most model evaluations of one image.
        device: where all of it lies.
        recorder: captures steps as CUDA graphs; None to launch their kernels one by one, as on a CPU.
        whole: whether steps that are made at once, and what follows them, become one graph.
        generation: counts the changes of the weights. What was computed from other weights is then computed anew, for the
            images that are under way too.
        controlnets: the parts of ControlNets, of as many rows as the step. Their residuals are summed; the step reads them.
    """

    def __init__(
        self,
        context: Engine,
        schedule: Engine,
        step: Engine,
        *,
        rows: int,
        tokens: int,
        evaluations: int,
        device: torch.device,
        recorder: Recorder | None = None,
        whole: bool = False,
        generation: Callable[[], int] = lambda: 0,
        controlnets: Sequence[Parts] = (),
    ) -> None:
        latents = step.inputs["latents"]
        _, *latent_shape = sizes(latents)
        self.rows, self.evaluations = rows, evaluations
        self.slots = Slots(
            rows,
            rows,
            (latent_shape[0], latent_shape[1], latent_shape[2]),
            entries=rows * (evaluations + 1),  # one more: the row on which a finished slot rests
            device=device,
            model_dtype=latents.dtype,
        )
        self._slot_of_row = torch.zeros(rows, dtype=torch.int64, device=device)
        # A row's entries of the schedule's tables are its own: its text may have a say in them.
        self._offset = torch.zeros(rows, dtype=torch.int64, device=device)
        self._entry = torch.zeros(rows, dtype=torch.int64, device=device)

        def empty(spec: TensorSpec) -> torch.Tensor:
            return torch.zeros((rows, *sizes(spec)[1:]), dtype=spec.dtype, device=device)

        def network(parts: Parts, buffers: Mapping[str, torch.Tensor]) -> Network:
            entries = self.slots.entries_per_slot
            buffers = {"latents": self.slots.model_input, **buffers}
            return Network(parts, rows=rows, tokens=tokens, entries=entries, device=device, buffers=buffers)

        def residuals() -> dict[str, torch.Tensor]:
            made = controlnets[0].step.outputs if controlnets else {}
            return {name: empty(spec) for name, spec in made.items()}

        # Those of the first ControlNet, to which the others' are added: one after the other in the same place.
        self._residuals, self._further = residuals(), residuals() if len(controlnets) > 1 else {}
        self._controlnets = [
            network(parts, self._further if number else self._residuals) for number, parts in enumerate(controlnets)
        ]
        output = next(iter(step.outputs.values()))
        self._output = empty(output)
        self._network = network(Parts(context, schedule, step), {output.name: self._output, **self._residuals})
        self._batches = [rows_of(step)]
        self._admitted: dict[int, _Admitted] = {}
        self._generation = generation
        self._made_at = generation()
        self._recorder, self._whole = recorder, whole
        self._replays: dict[_Captured, Work] = {}
        self._prepare_capture(self._batches[0])

    @property
    def batches(self) -> Sequence[int]:
        """The row counts of the engines, smallest first."""
        return self._batches

    def add(self, steps: Sequence[Engine]) -> None:
        """Run on engines of another row count too, where that is the smallest that holds the images.

        Args:
            steps: the network's, then each ControlNet's, of equally many rows, at most `rows`.
        """
        for network, step in zip((self._network, *self._controlnets), steps, strict=True):
            network.add(step)
        rows = rows_of(steps[0])
        self._batches = sorted({*self._batches, rows})
        self._prepare_capture(rows)

    @torch.inference_mode()
    def admit(
        self,
        slot: int,
        *,
        latents: torch.Tensor,
        table: SamplerTable,
        guidance_scale: float,
        cond: Conditioning,
        uncond: Conditioning | None,
        noise: torch.Tensor | None = None,
        guidance_rescale: float = 0.0,
        controls: Sequence[Conditioning] = (),
        blend: Blend | None = None,
    ) -> None:
        """Put an image into a free slot, and into the first rows that are free.

        Args:
            slot: which one.
            latents: (C, h, w) float32, standard normal noise.
            table: the sampler.
            guidance_scale: classifier-free guidance; ignored without `uncond`.
            cond: the network's request inputs by name, without the dimension of rows: `encoder_hidden_states` (tokens, width)
                and what else the model has.
            uncond: the same for the negative prompt, or None for no guidance.
            noise: (evaluations, C, h, w) float32 for a sampler that draws noise.
            guidance_rescale: how far to bring the deviation of the guided output back, 0 to 1; ignored without `uncond`.
            controls: for each ControlNet `controlnet_cond` (3, H, W) in [0, 1], and `conditioning_scale` (evaluations,).
            blend: what the image keeps of a picture; None for nothing.

        Raises:
            EngineMismatch: there is no row left for it, or the ControlNets are not as many.
            BadRequest: the slot is taken, or the sampler has more evaluations than the batch was made for.
        """
        conditionings = (cond,) if uncond is None else (cond, uncond)
        if len(controls) != len(self._controlnets):
            raise EngineMismatch(f"{len(controls)} controls were given for {len(self._controlnets)} ControlNets")
        rows = self.slots.free_rows[: len(conditionings)]
        if len(rows) < len(conditionings):
            raise EngineMismatch(
                f"{len(rows)} of {self.rows} rows are free, and the image takes {len(conditionings)}: guidance takes two"
            )
        self._refresh()
        self.slots.admit(
            slot,
            latents=latents,
            table=table,
            guidance_scale=guidance_scale,
            cond_row=rows[0],
            uncond_row=None if uncond is None else rows[1],
            noise=noise,
            guidance_rescale=guidance_rescale,
            blend=blend,
        )
        try:
            self._admitted[slot] = _Admitted(table, conditionings, tuple(controls))
            self._prepare(slot)
        except BaseException:
            self.release(slot)
            raise

    def step(self, least_rows: int = 0) -> None:
        """One model evaluation and one sampler update for every admitted slot.

        Args:
            least_rows: run on engines of at least so many rows, however few images there are.
        """
        self.steps(1, least_rows=least_rows)

    @torch.inference_mode()
    def steps(self, count: int, then: Work | None = None, *, least_rows: int = 0) -> None:
        """Several steps.

        Args:
            count: how many.
            then: what is to follow them on the device, under the conditions of `ldmrt.capture.Recorder.record`.
            least_rows: see `step`.
        """
        self._refresh()
        rows = self._gather(least_rows)
        adjustments = self.slots.adjustments
        if self._whole:
            self._replay(_Captured(rows, adjustments, count, then))()
        else:
            one = self._replay(_Captured(rows, adjustments, 1, None))
            for _ in range(count):
                one()
            if then is not None:
                then()
        for _ in range(count):
            self.slots.stepped()

    def latents(self, slot: int) -> torch.Tensor:
        """(C, h, w) float32: the slot's latents as they are now, in the static buffer."""
        return self.slots.x[slot]

    @torch.inference_mode()
    def combined(self, slot: int, of_latents: float, of_output: float) -> torch.Tensor:
        """(C, h, w) float32: a sum of the slot's latents and of what the model said at the last step, after guidance, with these factors."""
        cond, *uncond = (self._output[row].float() for row in self.slots.rows_of(slot))
        output = torch.lerp(uncond[0], cond, self.slots.guidance_scale[slot]) if uncond else cond
        return of_latents * self.latents(slot) + of_output * output

    def release(self, slot: int) -> None:
        """Give a slot up; its rows are left alone from now on."""
        self.slots.release(slot)
        self._admitted.pop(slot, None)

    # ------------------------------------------------------------------------------------------------ the device's part

    def _replay(self, captured: _Captured) -> Work:
        """What does it on the device: a graph, recorded when it is first asked for, or the calls themselves."""
        work = partial(self._work, captured)
        if self._recorder is None:
            return work
        if captured not in self._replays:
            with self.slots.paused():  # images may be under way, and a graph is tried before it is recorded
                self._replays[captured] = self._recorder.record(work)
        return self._replays[captured]

    @torch.inference_mode()
    def _prepare_capture(self, rows: int) -> None:
        """Capture a plain step ahead, so that no image waits for it."""
        if not self._whole:
            self._replay(_Captured(rows, Adjustments(), 1, None))

    def _work(self, captured: _Captured) -> None:
        """What a graph holds. It leaves free slots untouched, however often it runs."""
        rows, adjustments, steps, then = captured
        for _ in range(steps):
            entry = self._entry[:rows]
            torch.index_select(self.slots.row, 0, self._slot_of_row[:rows], out=entry)
            entry.add_(self._offset[:rows])
            for number, controlnet in enumerate(self._controlnets):
                controlnet.enqueue(entry)
                if number:
                    for name, residual in self._residuals.items():
                        residual[:rows].add_(self._further[name][:rows])
            self._network.enqueue(entry)
            self.slots.update(self._output, adjustments)
        if then is not None:
            then()

    # ------------------------------------------------------------------------------------------------ rows

    def _gather(self, least_rows: int) -> int:
        """The rows of the smallest engine that holds the images, which are moved into its rows if need be."""
        slots = self.slots
        taken = {row: slot for slot in slots.active for row in slots.rows_of(slot)}
        needed = max(len(taken), least_rows)
        rows = next((rows for rows in self._batches if rows >= needed), None)
        if rows is None:
            raise EngineMismatch(f"{needed} rows are to be run, and the engines at hand have {self._batches}: add one")
        free = iter(slots.free_rows)
        for row in sorted(row for row in taken if row >= rows):
            to = next(free)
            slots.move(taken[row], row, to)
            for network in (self._network, *self._controlnets):
                network.move(row, to)
            self._lead(taken[row], to)
        return rows

    def _lead(self, slot: int, row: int) -> None:
        """Lead a row to the entries of a slot's tables."""
        self._slot_of_row[row] = slot
        self._offset[row] = (row - slot) * self.slots.entries_per_slot

    def _refresh(self) -> None:
        """Make the tables of the images under way anew, if the weights have changed since."""
        if self._generation() != self._made_at:
            self._made_at = self._generation()
            for slot in self._admitted:
                self._prepare(slot)

    def _prepare(self, slot: int) -> None:
        """Compute what the step reads of a slot's request and timesteps, into the static buffers."""
        admitted, rows = self._admitted[slot], self.slots.rows_of(slot)
        self._network.prepare(rows, admitted.table, admitted.conditionings)
        for controlnet, control in zip(self._controlnets, admitted.controls, strict=True):
            controlnet.prepare(rows, admitted.table, [{**one, **control} for one in admitted.conditionings])
        for row in rows:
            self._lead(slot, row)
