"""The memory that TensorRT engines keep activations in while they run."""

from __future__ import annotations

import torch

from ldmrt.engines.gpu import Gpu


class ActivationMemory:
    """One block for all engines of a bundle on a GPU. They run one after the other on one stream, so none needs what another left.

    A CUDA graph holds the address of the block, so an engine keeps the block that it took. What is loaded before the first block is taken
    shares that one; an engine that is loaded later and needs more gets a larger block, which those after it share.

    Attributes:
        gpu: where the memory is.

    Args:
        gpu: where the memory is to be.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._size = 1  # an engine that needs none is given an address all the same
        self._block: torch.Tensor | None = None

    def reserve(self, size: int) -> None:
        """Let every block from now on have at least `size` bytes. Nothing is allocated yet."""
        self._size = max(self._size, size)

    def block(self) -> torch.Tensor:
        """(bytes,) uint8, as large as the largest size reserved so far. Whoever uses it must keep it; not to be called under capture.

        Raises:
            torch.OutOfMemoryError: there is not enough memory.
        """
        if self._block is None or len(self._block) < self._size:
            self._block = self.gpu.memory(self._size)
        return self._block
