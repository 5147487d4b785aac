"""A GPU as the engines of other libraries than torch see it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ldmrt.kernels import launch


class Gpu:
    """A CUDA device, its memory, and torch's current stream on it.

    Attributes:
        device: torch's name for it, with its number.

    Args:
        device: a CUDA device; without a number the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    @property
    def name(self) -> str:
        """Such as `NVIDIA GeForce RTX 4090`."""
        return torch.cuda.get_device_name(self.device)

    @property
    def architecture(self) -> str:
        """Such as `sm_89`."""
        return f"sm_{launch.architecture(self.device)}"

    def active(self) -> AbstractContextManager[object]:
        """Within it the device is CUDA's current one, which is where libraries load and launch."""
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        """The handle of the current stream."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def synchronize(self) -> None:
        """Wait for all that was launched on it."""
        torch.cuda.synchronize(self.device)

    def capturing(self) -> bool:
        """Whether the current stream is being captured in a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def memory(self, size: int) -> torch.Tensor:
        """(size,) uint8, not initialised, at an address that is a multiple of 256."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)
