"""What every engine kind offers to the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output of an engine.

    Attributes:
        name: the tensor's name, in the field's terms (`latents`, `timesteps`, ...).
        shape: its dimensions; a string stands for a free dimension of that name (`rows`, `tokens`).
        dtype: its element type.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


class Engine(Protocol):
    """One component compiled for one set of static shapes.

    Two ways to run it. `bind` then `enqueue`, for the sampling loop: the buffers keep their addresses for the
    engine's life, so a CUDA graph can hold the call. `run`, for what happens once per request: new outputs every time,
    free dimensions allowed where the engine has them.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name, in the order of the graph."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name, in the order of the graph."""
        ...

    def bind(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Bind one tensor to every input and output, once.

        Raises:
            EngineMismatch: a name, shape or dtype is not the engine's.
        """
        ...

    def enqueue(self) -> None:
        """Run on the current stream: read the bound inputs, write the bound outputs. No synchronisation."""
        ...

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once on `inputs` and return new output tensors by name.

        Raises:
            EngineMismatch: a name, shape or dtype is not the engine's.
        """
        ...
