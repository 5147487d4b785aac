"""The decoder behind a denoising loop, over static buffers, so that one CUDA graph can hold a whole image."""

from __future__ import annotations

import torch

from ldmrt.engines.protocol import Engine
from ldmrt.errors import EngineMismatch


class Decoding:
    """Turns the latents of a batch into pictures where they lie.

    Attributes:
        images: (slots, 3, H, W), the pictures that the last `work` made.

    Args:
        engine: the decoder, of any number of rows; it is bound to the buffers made here.
        latents: (slots, C, h, w) float32, read at every `work`.

    Raises:
        EngineMismatch: the engine is for latents of another size.
    """

    def __init__(self, engine: Engine, latents: torch.Tensor) -> None:
        given, made = engine.inputs["latents"], engine.outputs["image"]
        if given.shape[1:] != latents.shape[1:]:
            raise EngineMismatch(f"the decoder takes latents of {given.shape[1:]}, expected {tuple(latents.shape[1:])}")
        self._engine, self._latents = engine, latents
        # Rows that no latents fill keep the zeros.
        self._given = torch.zeros([int(size) for size in given.shape], dtype=given.dtype, device=latents.device)
        self._made = torch.zeros([int(size) for size in made.shape], dtype=made.dtype, device=latents.device)
        self.images = torch.zeros((len(latents), *self._made.shape[1:]), dtype=made.dtype, device=latents.device)
        engine.bind({"latents": self._given, "image": self._made})

    def work(self) -> None:
        """Decode all latents, as many at a time as the engine has rows. No synchronisation."""
        rows = len(self._given)
        for first in range(0, len(self._latents), rows):
            part = self._latents[first : first + rows]
            self._given[: len(part)].copy_(part)
            self._engine.enqueue()
            self.images[first : first + rows].copy_(self._made[: len(part)])
