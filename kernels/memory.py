"""Memory for the large results of operators on a CPU, kept and used again.

malloc gives large blocks back to the system as soon as they are freed, and the system hands out the next ones page by page, each
filled with zeros when it is first touched: for a norm over a picture of 512 x 512 this takes as long as the norm. Here blocks stay,
and lie on huge pages where the system has them.
"""

from __future__ import annotations

import bisect
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGE = 1 << 20  # bytes: malloc keeps smaller blocks by itself
_HUGE_PAGE = 2 << 20

_Block = npt.NDArray[np.uint8]


class Pool:
    """Blocks of memory, lent one by one. Together they never exceed the most that was lent at one time.

    Attributes:
        lent: bytes of the blocks that are in use.
        free: bytes of those that wait for their next use.
    """

    def __init__(self) -> None:
        self.lent = self.free = self._most = 0
        self._blocks: list[_Block] = []  # free, by size
        # Blocks on their way back: a loan ends wherever its last reference goes, which may be in the middle of `lend`.
        self._returned: deque[_Block] = deque()
        self._lock = threading.Lock()

    def lend(self, nbytes: int) -> _Block:
        """At least `nbytes`. The block comes back by itself when nothing refers to the array any more."""
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                bisect.insort(self._blocks, block, key=len)
                self.lent -= block.size
                self.free += block.size
            taken = self._take(size)
            block = _map(size) if taken is None else taken
            self.lent += block.size
            self._most = max(self._most, self.lent)
            while self.lent + self.free > self._most:
                self.free -= self._blocks.pop(0).size
        loan = block[:]
        weakref.finalize(loan, self._returned.append, block).atexit = False
        return loan

    def _take(self, size: int) -> _Block | None:
        """The smallest free block that is large enough, unless half of it would lie idle."""
        place = bisect.bisect_left(self._blocks, size, key=len)
        if place == len(self._blocks) or self._blocks[place].size > 2 * size:
            return None
        self.free -= self._blocks[place].size
        return self._blocks.pop(place)


_pool = Pool()


def new_empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of `x`'s dtype, where `x` is."""
    nbytes = math.prod(shape) * x.element_size()
    if nbytes < LARGE or x.device.type != "cpu":
        return x.new_empty(tuple(shape))
    return torch.from_numpy(_pool.lend(nbytes))[:nbytes].view(x.dtype).view(tuple(shape))


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor of `x`'s shape, dtype and order in memory, where `x` is."""
    if x.is_contiguous():
        return new_empty(x, x.shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        rows, channels, height, width = x.shape
        return new_empty(x, (rows, height, width, channels)).permute(0, 3, 1, 2)
    return torch.empty_like(x)


def _map(size: int) -> _Block:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
