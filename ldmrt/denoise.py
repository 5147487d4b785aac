"""The sampling loop: one step over static buffers, for images that may each be at another step.

A step is three things in a row: the `step` engine, behind those of ControlNets if there are any, the sampler's update (guidance, one
row of coefficients, the next model input), and the advance of the row indices. Its state lies in static buffers and nothing is read back, so that the same calls can be
captured as a CUDA graph; on the CPU they run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ldmrt.capture import Recorder, Work
from ldmrt.engines.protocol import Engine
from ldmrt.errors import EngineMismatch
from ldmrt.network import Conditioning, Network, Parts, sizes
from ldmrt.samplers.table import SamplerTable
from ldmrt.slots import Slots


@dataclass(frozen=True)
class _Admitted:
    """What the tables of a slot are made of, kept to make them again when the weights change."""

    table: SamplerTable
    conditionings: tuple[Conditioning, ...]
    controls: tuple[Conditioning, ...]


class Denoiser:
    """A batch of images being denoised.

    Args:
        context: see `ldmrt.network.Parts`, as for the next two.
        schedule: see there.
        step: see there; its row count is the batch's.
        capacity: images at a time. An image takes one row, or two with guidance.
        tokens: length of the text embeddings.
        evaluations: the most model evaluations of one image.
        with_noise: whether samplers that draw noise may be admitted.
        with_rescale: whether guidance may be rescaled.
        with_thresholds: whether samplers that threshold may be admitted.
        device: where all of it lies.
        recorder: captures the step as a CUDA graph; None to launch its kernels one by one, as on a CPU.
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
        capacity: int,
        tokens: int,
        evaluations: int,
        with_noise: bool,
        with_rescale: bool = False,
        with_thresholds: bool = False,
        device: torch.device,
        recorder: Recorder | None = None,
        generation: Callable[[], int] = lambda: 0,
        controlnets: Sequence[Parts] = (),
    ) -> None:
        latents = step.inputs["latents"]
        rows, *latent_shape = sizes(latents)
        self.capacity, self.tokens, self.rows = capacity, tokens, rows
        self.slots = Slots(
            capacity,
            rows,
            (latent_shape[0], latent_shape[1], latent_shape[2]),
            entries=capacity * (evaluations + 1),  # one more: the row on which a finished slot rests
            device=device,
            model_dtype=latents.dtype,
            with_noise=with_noise,
            with_rescale=with_rescale,
            with_thresholds=with_thresholds,
        )
        self._slot_of_row = torch.zeros(rows, dtype=torch.int64, device=device)
        # A row's entries of the schedule's tables are its own: its text may have a say in them.
        self._offset = torch.zeros(rows, dtype=torch.int64, device=device)
        self._entry = torch.zeros(rows, dtype=torch.int64, device=device)
        output = next(iter(step.outputs.values()))
        self._output = torch.zeros(sizes(output), dtype=output.dtype, device=device)

        def network(parts: Parts, buffers: Mapping[str, torch.Tensor]) -> Network:
            entries = self.slots.entries_per_slot
            buffers = {"latents": self.slots.model_input, **buffers}
            return Network(parts, tokens=tokens, entries=entries, device=device, buffers=buffers)

        def residuals() -> dict[str, torch.Tensor]:
            made = controlnets[0].step.outputs if controlnets else {}
            return {name: torch.zeros(sizes(spec), dtype=spec.dtype, device=device) for name, spec in made.items()}

        # Those of the first ControlNet, to which the others' are added: one after the other in the same place.
        self._residuals, self._further = residuals(), residuals() if len(controlnets) > 1 else {}
        self._controlnets = [
            network(parts, self._further if number else self._residuals) for number, parts in enumerate(controlnets)
        ]
        self._network = network(Parts(context, schedule, step), {output.name: self._output, **self._residuals})
        self._admitted: dict[int, _Admitted] = {}
        self._generation = generation
        self._made_at = generation()
        self._recorder = recorder
        self._replays: dict[tuple[int, Work | None], Work] = {}
        self.capture(1)

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
    ) -> None:
        """Put an image into a slot.

        Args:
            slot: which one; whatever it held is given up.
            latents: (C, h, w) float32, standard normal noise.
            table: the sampler.
            guidance_scale: classifier-free guidance; ignored without `uncond`.
            cond: the network's request inputs by name, without the dimension of rows: `encoder_hidden_states` (tokens, width)
                and what else the model has.
            uncond: the same for the negative prompt, or None for no guidance.
            noise: (evaluations, C, h, w) float32 for a sampler that draws noise.
            guidance_rescale: how far to bring the deviation of the guided output back, 0 to 1; ignored without `uncond`.
            controls: for each ControlNet `controlnet_cond` (3, H, W) in [0, 1], and `conditioning_scale` (evaluations,).

        Raises:
            EngineMismatch: there is no row left for it, or the ControlNets are not as many.
            BadRequest: the sampler has more evaluations than the batch was made for.
        """
        per_image = self.rows // self.capacity
        conditionings = (cond,) if uncond is None else (cond, uncond)
        if len(conditionings) > per_image:
            raise EngineMismatch(
                f"a batch of {self.capacity} in {self.rows} rows has no room for guidance, which takes two rows an image"
            )
        if len(controls) != len(self._controlnets):
            raise EngineMismatch(f"{len(controls)} controls were given for {len(self._controlnets)} ControlNets")
        first = slot * per_image
        rows = slice(first, first + len(conditionings))
        admitted = _Admitted(table, conditionings, tuple(controls))
        self._refresh()
        self._prepare(slot, admitted)
        self._slot_of_row[rows] = slot
        self.slots.admit(
            slot,
            latents=latents,
            table=table,
            guidance_scale=guidance_scale,
            cond_row=first,
            uncond_row=None if uncond is None else first + 1,
            noise=noise,
            guidance_rescale=guidance_rescale,
        )
        self._admitted[slot] = admitted

    def step(self) -> None:
        """One model evaluation and one sampler update for every admitted slot."""
        self.steps(1)

    @torch.inference_mode()
    def steps(self, count: int, then: Work | None = None) -> None:
        """Several steps: one call of the GPU where so many were captured, else one each.

        Args:
            count: how many.
            then: what is to follow them on the device; in the same graph, if it was captured so.
        """
        self._refresh()
        whole = self._replays.get((count, then))
        if whole is not None:
            whole()
        else:
            one = self._replays.get((1, None), self._work)
            for _ in range(count):
                one()
            if then is not None:
                then()
        for _ in range(count):
            self.slots.stepped()

    @torch.inference_mode()
    def capture(self, count: int, then: Work | None = None) -> None:
        """Capture `count` steps as one CUDA graph, if there is a recorder; `steps(count, then)` replays it from then on.

        Args:
            count: how many.
            then: launches what is to follow them, under the conditions of `ldmrt.capture.Recorder.record`.

        Raises:
            EngineMismatch: images are under way, which the trial runs would move on.
        """
        if self._recorder is None or (count, then) in self._replays:
            return
        if self.slots.active:
            raise EngineMismatch("the step cannot be captured while images are under way: release them first")

        def work() -> None:
            for _ in range(count):
                self._work()
            if then is not None:
                then()

        self._replays[count, then] = self._recorder.record(work)

    def _work(self) -> None:
        """What the device does for a step. It leaves free slots untouched, however often it runs."""
        slots = self.slots
        torch.index_select(slots.row, 0, self._slot_of_row, out=self._entry)
        self._entry.add_(self._offset)
        for number, controlnet in enumerate(self._controlnets):
            controlnet.enqueue(self._entry)
            if number:
                for name, residual in self._residuals.items():
                    residual.add_(self._further[name])
        self._network.enqueue(self._entry)
        slots.update(self._output)

    def latents(self, slot: int) -> torch.Tensor:
        """(C, h, w) float32: the slot's latents as they are now, in the static buffer."""
        return self.slots.x[slot]

    def release(self, slot: int) -> None:
        """Give a slot up; its rows are left alone from now on."""
        self.slots.release(slot)
        self._admitted.pop(slot, None)

    def _refresh(self) -> None:
        """Make the tables of the images under way anew, if the weights have changed since."""
        if self._generation() != self._made_at:
            self._made_at = self._generation()
            for slot, admitted in self._admitted.items():
                self._prepare(slot, admitted)

    def _prepare(self, slot: int, admitted: _Admitted) -> None:
        """Compute what the step reads of a slot's request and timesteps, into the static buffers."""
        first = slot * (self.rows // self.capacity)
        self._network.prepare(first, admitted.table, admitted.conditionings)
        for controlnet, control in zip(self._controlnets, admitted.controls, strict=True):
            controlnet.prepare(first, admitted.table, [{**one, **control} for one in admitted.conditionings])
        for row in range(first, first + len(admitted.conditionings)):
            self._offset[row] = (row - slot) * self.slots.entries_per_slot
