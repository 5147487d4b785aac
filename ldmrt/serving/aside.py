"""Where a batcher has its pictures decoded: between two steps, or beside the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
Work = Callable[[], Tensors]


class Pending(Protocol):
    """Tensors that are being made."""

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        ...

    def result(self) -> Tensors:
        """The tensors, on the CPU.

        Raises:
            Exception: whatever the work has raised.
        """
        ...


class Aside(Protocol):
    """Something that does work for a thread that does not wait for it."""

    def begin(self, work: Work) -> Pending:
        """Do some work, after all that was begun before."""
        ...


class AtOnce:
    """Does the work there and then: on a CPU nothing is gained by doing two things at a time."""

    def begin(self, work: Work) -> Pending:
        """It is done when this returns."""
        return _Made(tuple(tensor.cpu() for tensor in work()))


class _Made:
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def ready(self) -> bool:
        return True

    def result(self) -> Tensors:
        return self._tensors


class OwnStream:
    """Launches the work on a stream of its own, so that the GPU does it beside what is launched on the caller's afterwards. Not yet run on
    a GPU.

    The work must not wait for the GPU, nor use memory that the caller's stream writes meanwhile: its CUDA graphs need a pool of their own
    (`ldmrt.loader.EngineLoader.set_apart`).

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, work: Work) -> Pending:
        """It runs after what the current stream has been given until now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            made = work()
            found = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in made
            )
            done.record(self._stream)
        return _Launched(found, done, (work, made))


class _Launched:
    """Attributes that nothing reads keep what the GPU reads: its memory must not be given to others before it is done."""

    def __init__(self, found: Tensors, done: torch.cuda.Event, kept: object) -> None:
        self._found, self._done, self._kept = found, done, kept

    def ready(self) -> bool:
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def result(self) -> Tensors:
        self._done.synchronize()
        self._kept = None
        return self._found
