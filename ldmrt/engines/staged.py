"""An engine that is in memory only while it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ldmrt.engines.protocol import Engine, TensorSpec


class StagedEngine:
    """Stands for an engine that runs once per request (see `ldmrt.engines.protocol.Engine`), whether that is loaded or not.

    Args:
        load: loads it: now, since it has to be asked what it takes, and when it is used after `unload`.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = load()
        self._inputs, self._outputs = dict(self._engine.inputs), dict(self._engine.outputs)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._outputs

    def unload(self) -> None:
        """Let the engine go, and what it was bound to."""
        self._engine = None

    def bind(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Bind one tensor to every input and output, until it is unloaded."""
        self._loaded().bind(buffers)

    def enqueue(self) -> None:
        """Run on the bound buffers."""
        self._loaded().enqueue()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors."""
        return self._loaded().run(inputs)

    def _loaded(self) -> Engine:
        if self._engine is None:
            self._engine = self._load()
        return self._engine
