"""GPU work recorded once as a CUDA graph and replayed with one call.

Launching the thousand kernels of a U-Net one by one from Python takes longer than they run; a graph launches them all in
microseconds. A graph replays addresses, not tensors: what it reads and writes must be static buffers, and weights may change only
in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], None]

# Libraries choose algorithms and allocate workspaces at their first calls, which must not happen while recording.
_WARM_UPS = 2


class Recorder:
    """Records work on one GPU. The graphs share a memory pool: they run one after the other, never at once. What runs beside them needs a
    recorder of its own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # torch's handle, whose type differs between versions

    def record(self, work: Work) -> Callable[[], None]:
        """Run the work a few times, then record it.

        Args:
            work: launches on the current stream; it must not wait for the device, and running it more often than asked must
                do no harm. Temporaries come from the shared pool.

        Returns:
            What replays it on the current stream.
        """
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                work()
            return graph.replay
