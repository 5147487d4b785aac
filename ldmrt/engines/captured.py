"""An engine whose runs are replayed CUDA graphs, one for each set of input shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.parameters import fitting

# Shapes for which graphs are kept; what was used longest ago goes first.
_KEPT = 8


class Records(Protocol):
    """What `ldmrt.capture.Recorder` does."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work, record it, and return what replays it."""
        ...


@dataclass(frozen=True)
class _Recording:
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    replay: Callable[[], None]


class CapturedEngine:
    """Wraps an engine that runs once per request (see `ldmrt.engines.protocol.Engine`): text encoder, context, decoder.

    `run` copies its inputs to static buffers, replays, and returns copies; `bind` and `enqueue` are the engine's own, for whoever
    captures more than this engine.

    Args:
        engine: the engine; its kernels can be captured.
        recorder: the recorder of its device.
    """

    def __init__(self, engine: Engine, recorder: Records) -> None:
        self._engine = engine
        self._recorder = recorder
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._engine.outputs

    def bind(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Bind one tensor to every input and output."""
        self._engine.bind(buffers)

    def enqueue(self) -> None:
        """Run on the bound buffers, kernel by kernel."""
        self._engine.enqueue()

    def record_with(self, recorder: Records) -> None:
        """Let its graphs be made by another recorder, which may mean anew."""
        self._recorder = recorder
        self._recordings.clear()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors.

        Raises:
            EngineMismatch: an input does not fit.
        """
        sizes: dict[str, int] = {}
        given = {name: fitting("input", spec, inputs.get(name), sizes) for name, spec in self.inputs.items()}
        key = tuple(tensor.shape for tensor in given.values())
        recording = self._recordings.pop(key, None) or self._record(given)
        self._recordings[key] = recording
        while len(self._recordings) > _KEPT:
            del self._recordings[next(iter(self._recordings))]
        with torch.inference_mode():
            for name, tensor in given.items():
                recording.inputs[name].copy_(tensor)
            recording.replay()
            return {name: tensor.clone() for name, tensor in recording.outputs.items()}

    def _record(self, given: Mapping[str, torch.Tensor]) -> _Recording:
        with torch.inference_mode():
            inputs = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in given.items()}
            made = self._engine.run(inputs)
            # Kept outside the graph's pool, where another graph could write over them.
            outputs = {name: torch.empty_like(tensor) for name, tensor in made.items()}

            def work() -> None:
                for name, tensor in self._engine.run(inputs).items():
                    outputs[name].copy_(tensor)

            return _Recording(inputs, outputs, self._recorder.record(work))
