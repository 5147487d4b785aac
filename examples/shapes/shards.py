"""Gradients of a batch computed by parts, each part on one core.

The networks are so small that splitting every operation over the cores costs more in waiting
than it gains; splitting the batch needs one meeting a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]


class Shards:
    """Splits batches in equal parts and averages the parts' gradients."""

    def __init__(self, device: str, cores: int, *, autocast: bool = True) -> None:
        self._device = device
        self._autocast = autocast
        self._count = cores if device == "cpu" else 1
        if self._count > 1:
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._count)

    def backward(
        self,
        weights: Sequence[nn.Parameter],
        losses: Callable[[Batch], Losses],
        batch: Batch,
    ) -> Losses:
        """Set the gradients of a batch's mean loss.

        Args:
            weights: The trained parameters; their ``grad`` is replaced.
            losses: From a part of the batch to its mean losses; ``total`` is differentiated.
            batch: Tensors with the samples along their first axis.

        Returns:
            The losses over the whole batch, detached.
        """

        def work(part: int) -> tuple[tuple[Tensor | None, ...], Losses]:
            piece = {key: value.chunk(self._count)[part] for key, value in batch.items()}
            with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
                found = losses(piece)
            gradients = torch.autograd.grad(found["total"], weights, allow_unused=True)
            return gradients, {key: value.detach().float() for key, value in found.items()}

        results = list(self._pool.map(work, range(self._count)))
        for index, weight in enumerate(weights):
            parts = [result[0][index] for result in results]
            gradient = parts[0]
            if gradient is not None:
                for part in parts[1:]:
                    if part is not None:
                        gradient = gradient + part
                gradient = gradient / self._count
            weight.grad = gradient
        return {key: torch.stack([found[key] for _, found in results]).mean() for key in results[0][1]}
