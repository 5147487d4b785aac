"""Pictures to latents, several batches side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


def encode_all(encode: Callable[[Tensor], Tensor], batches: Iterator[Tensor], device: str, cores: int) -> Tensor:
    """The latents (N, C, h, w), float32 on the CPU, of batches of pictures.

    Args:
        encode: a batch (n, 3, H, W) in [-1, 1] to its latents.
        batches: the pictures, drawn while others are encoded.
        device: where `encode` runs.
        cores: how many batches are encoded at a time on a CPU.
    """

    def work(pictures: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return encode(pictures.to(device)).float().cpu()

    workers = cores if device == "cpu" else 1
    found: list[Tensor] = []
    with ThreadPoolExecutor(workers) as pool:
        queue: deque[Future[Tensor]] = deque()
        for pictures in batches:
            queue.append(pool.submit(work, pictures))
            if len(queue) > 2 * workers:
                found.append(queue.popleft().result())
        found += [future.result() for future in queue]
    return torch.cat(found).contiguous()
