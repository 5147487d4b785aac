"""A network in float32 that learns from a copy of it in bfloat16."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Twin(Generic[Network]):
    """A network, the average of its weights, and the copy that its gradients come from.

    The forward and backward passes run on a copy in bfloat16: casting once a step costs less than autocast's at each use. What does not
    require a gradient stays as it is.

    Attributes:
        model: the network, in float32.
        average: an exponential moving average of it.
        worker: the copy in bfloat16.
        weights: the worker's weights that are trained.
        optimizer: of the network's.
        step: how many steps have been made.
    """

    def __init__(self, model: Network, peak: float) -> None:
        self.model = model
        model.train()
        self.masters: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.average = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.masters, peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.worker = copy.deepcopy(model).bfloat16()
        self.weights = [weight for weight in self.worker.parameters() if weight.requires_grad]
        self._copies: list[Tensor] = [*self.weights]
        self._averages: list[Tensor] = [weight for weight in self.average.parameters() if weight.requires_grad]
        self.step = 0

    def refresh(self) -> None:
        """Make the copy anew of the network, as after loading a checkpoint."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self.masters)

    @torch.no_grad()
    def learn(self) -> None:
        """One step by the gradients of the copy's weights."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._averages, self.masters, 1 - decay)
        self.refresh()
        self.step += 1
