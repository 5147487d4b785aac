"""A GPU and a library for the tests of TensorRT engines, where neither is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ldmrt.engines.gpu import Gpu
from ldmrt.engines.tensorrt import Library
from tests.engines.fake_tensorrt import ALIGNMENT, Cuda
from tests.replay import Recorder

FAKE = ("tests.engines.fake_tensorrt",)
RTX = Library("tensorrt-rtx", FAKE, "tensorrt-rtx", (1, 4), ("sm_86", "sm_89"), compiles_at_run_time=True)
TENSORRT = Library("tensorrt", FAKE, "tensorrt", (1, 4), None, compiles_at_run_time=False)


class FakeGpu(Gpu):
    """The CPU, called a GPU.

    Attributes:
        blocks: the sizes of the memory that was asked for.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.blocks: list[int] = []

    @property
    def name(self) -> str:
        return Cuda.name

    @property
    def architecture(self) -> str:
        return Cuda.architecture

    def active(self) -> AbstractContextManager[object]:
        return _active()

    def stream(self) -> int:
        return Cuda.stream

    def synchronize(self) -> None:
        Cuda.idle = True

    def capturing(self) -> bool:
        return Cuda.capturing

    def memory(self, size: int) -> torch.Tensor:
        self.blocks.append(size)
        whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % ALIGNMENT
        return whole[start : start + size]


@contextmanager
def _active() -> Iterator[None]:
    before, Cuda.active = Cuda.active, True
    try:
        yield
    finally:
        Cuda.active = before


class CapturingRecorder(Recorder):
    """Also says when it captures, on a stream of its own."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        runs = 0

        def counted() -> None:
            nonlocal runs
            runs += 1
            before = Cuda.stream
            Cuda.stream, Cuda.capturing = 9, runs == 3
            try:
                work()
            finally:
                Cuda.stream, Cuda.capturing = before, False

        return super().record(counted)
