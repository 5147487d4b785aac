"""The original module as the oracle, and the inputs that it and the engines are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

import numpy as np
import torch

from ldmrt.verify import Tensors, Trial


def reference_outputs(
    module: torch.nn.Module, trials: Sequence[Trial], names: Sequence[str], stop: Event | None = None
) -> list[Tensors]:
    """What the original module, in float32, makes of each trial.

    Raises:
        InterruptedError: `stop` was set meanwhile.
    """

    def check(_layer: torch.nn.Module, _inputs: object) -> None:
        if stop is not None and stop.is_set():
            raise InterruptedError

    for layer in module.modules():
        layer.register_forward_pre_hook(check)
    with torch.inference_mode():
        return [trial.expected or dict(zip(names, module(*trial.inputs.values()), strict=True)) for trial in trials]


def sample_picture(width: int, height: int) -> torch.Tensor:
    """A smooth picture with hard edges, (1, 3, height, width) in [-1, 1]: what an image encoder meets, unlike noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / width, y / height
    red = 0.5 + 0.5 * np.sin(6.0 * u + 2.0 * v)
    green = np.where((u - 0.5) ** 2 + (v - 0.45) ** 2 < 0.07, 0.9, 0.25 + 0.4 * v)
    blue = np.where((np.floor(8 * u) + np.floor(8 * v)) % 2 == 0, 0.2, 0.7) * (0.5 + 0.5 * u)
    return torch.from_numpy(np.stack([red, green, blue])[None] * 2 - 1).float()


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers from a seed, float32."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
