"""A denoising network over static buffers: what its step reads of the request and of the timestep, made once per request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.errors import EngineMismatch
from ldmrt.samplers.table import SamplerTable

Conditioning = Mapping[str, torch.Tensor]

# Inputs of a step that the request itself says: a ControlNet's for every step; once what is joined to the latents, by inpainting models and by
# upscaling ones.
SCALE = "conditioning_scale"
MASKED = ("mask", "masked_image_latents")
LOW_RES = "low_res_image"
JOINED = (*MASKED, LOW_RES)


class Parts(NamedTuple):
    """The engines of a denoising network (see `ldmrt.export.passes.hoist`).

    Attributes:
        context: turns the request's inputs into what the step reads of them (keys and values), once per request.
        schedule: turns timesteps, and perhaps the request's inputs, into what the step reads of them, once per request for all
            steps.
        step: the network's part that runs at every step.
    """

    context: Engine
    schedule: Engine
    step: Engine


class Network:
    """A network's parts, bound to buffers that keep their addresses. Steps of several row counts share them: each has the first rows.

    Args:
        parts: its engines; more steps may be added.
        rows: of the buffers, the most that a step may have.
        tokens: length of the text embeddings.
        entries: evaluations that each row has room for in the tables.
        device: where all of it lies.
        buffers: the inputs and outputs of the step that others write or read, of so many rows.

    Raises:
        EngineMismatch: the step reads something that nobody makes.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        rows: int,
        tokens: int,
        entries: int,
        device: torch.device,
        buffers: Mapping[str, torch.Tensor],
    ) -> None:
        self._parts, self._entries = parts, entries

        def empty(spec: TensorSpec) -> torch.Tensor:
            return torch.zeros((rows, *sizes(spec, tokens=tokens)[1:]), dtype=spec.dtype, device=device)

        inputs = {name: spec for name, spec in parts.step.inputs.items() if name not in buffers}
        constant = {*parts.context.outputs, *JOINED}
        self._contexts = {name: empty(spec) for name, spec in inputs.items() if name in constant}
        # What is another one at every step.
        changing = {*parts.schedule.outputs, SCALE}
        self._current = {name: empty(spec) for name, spec in inputs.items() if name in changing}
        missing = inputs.keys() - self._contexts.keys() - self._current.keys()
        if missing:
            raise EngineMismatch(f"the step reads {', '.join(sorted(missing))}, which no other engine makes")
        self._tables = {
            name: torch.zeros((rows * entries, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            for name, tensor in self._current.items()
        }
        self._buffers = {**buffers, **self._contexts, **self._current}
        self._steps: dict[int, Engine] = {}
        self.add(parts.step)

    def add(self, step: Engine) -> None:
        """Let `enqueue` run a step of another row count too."""
        rows = rows_of(step)
        step.bind({name: self._buffers[name][:rows] for name in (*step.inputs, *step.outputs)})
        self._steps[rows] = step

    def prepare(self, rows: Sequence[int], table: SamplerTable, conditionings: Sequence[Conditioning]) -> None:
        """Compute what the step reads of a request and its timesteps.

        Args:
            rows: the request's.
            table: the sampler.
            conditionings: for each row the network's request inputs by name, without the dimension of rows; a ControlNet's scale
                for each evaluation.
        """
        context = self._parts.context
        stacked = {
            name: torch.stack([one[name].to(spec.dtype) for one in conditionings])
            for name, spec in context.inputs.items()
        }
        made = context.run(stacked)
        made |= {name: torch.stack([one[name] for one in conditionings]) for name in JOINED if name in self._contexts}
        for name, tensor in made.items():
            for row, value in zip(rows, tensor, strict=True):
                self._contexts[name][row].copy_(value)
        for row, conditioning in zip(rows, conditionings, strict=True):
            timed = self._scheduled(table, conditioning)
            timed |= {SCALE: conditioning[SCALE]} if SCALE in self._tables else {}
            for name, tensor in timed.items():
                self._tables[name][row * self._entries : row * self._entries + len(tensor)].copy_(tensor)

    def _scheduled(self, table: SamplerTable, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """What the step reads of the timesteps, for all of a sampler's evaluations at once."""
        inputs = {}
        for name, spec in self._parts.schedule.inputs.items():
            if name == "timesteps":
                device = next(iter(self._current.values())).device
                inputs[name] = torch.from_numpy(table.timesteps).to(device=device, dtype=spec.dtype)
            else:
                value = conditioning[name].to(spec.dtype)
                inputs[name] = value.expand(table.evaluations, *value.shape)
        return self._parts.schedule.run(inputs)

    def move(self, row: int, to: int) -> None:
        """Copy what `prepare` made for a row to another one."""
        for tensor in self._contexts.values():
            tensor[to].copy_(tensor[row])
        for tensor in self._tables.values():
            by_row = tensor.view(-1, self._entries, *tensor.shape[1:])
            by_row[to].copy_(by_row[row])

    def enqueue(self, entry: torch.Tensor) -> None:
        """Run the step of as many rows as there are entries, each row at its own entry of the tables. No synchronisation.

        Args:
            entry: (rows,) int64, row * entries + evaluation.
        """
        for name, current in self._current.items():
            torch.index_select(self._tables[name], 0, entry, out=current[: len(entry)])
        self._steps[len(entry)].enqueue()


def rows_of(step: Engine) -> int:
    """The rows of a step's batch."""
    return sizes(step.inputs["latents"])[0]


def sizes(spec: TensorSpec, **free: int) -> tuple[int, ...]:
    """The shape of a tensor, its free dimensions given."""
    return tuple(free[size] if isinstance(size, str) else size for size in spec.shape)
