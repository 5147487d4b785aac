"""Latents to pixels: by a call, or over static buffers behind a denoising loop, so that one CUDA graph can hold a whole image."""

from __future__ import annotations

import torch

from ldmrt.engines.protocol import Engine
from ldmrt.errors import EngineMismatch
from ldmrt.loader import EngineLoader
from ldmrt.tiling import Tiling


class Decoding:
    """Turns the latents of a batch into pictures where they lie.

    Attributes:
        images: (slots, 3, H, W), the pictures that the last `work` made.

    Args:
        engine: the decoder, of any number of rows; bound to the buffers made here whenever it works.
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

    def work(self) -> None:
        """Decode all latents, as many at a time as the engine has rows. No synchronisation."""
        # Here, not when it is made: others may have bound the engine in between, and a capture keeps what is bound now.
        self._engine.bind({"latents": self._given, "image": self._made})
        rows = len(self._given)
        for first in range(0, len(self._latents), rows):
            part = self._latents[first : first + rows]
            self._given[: len(part)].copy_(part)
            self._engine.enqueue()
            self.images[first : first + rows].copy_(self._made[: len(part)])


def decode(loader: EngineLoader, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pictures of latents, as many at a time as the bundle's decoders of that size take; in tiles, if memory is planned so.

    Args:
        loader: gives the decoders.
        latents: (n, C, h, w) float32, on any device.
        size: (width, height) in pixels.

    Returns:
        (n, 3, height, width), on the loader's device, in the decoder's precision.

    Raises:
        EngineMismatch: there is no decoder.
    """
    if loader.plan is not None and loader.plan.tile not in (None, size):
        tile = loader.plan.tile
        cells = latents.shape[-1], latents.shape[-2]
        tiling = Tiling(cells, (tile[0] * cells[0] // size[0], tile[1] * cells[1] // size[1]))
        return torch.stack([tiling.blend(decode(loader, tiling.cut(one), tile)) for one in latents])
    records = loader.records("decoder", size)
    decoded = []
    done = 0
    while done < len(latents):
        left = len(latents) - done
        record = max((r for r in records if (r.rows or 1) <= left), key=lambda r: r.rows or 1, default=records[0])
        rows = record.rows or 1
        engine = loader.load(record)
        batch = torch.zeros((rows, *latents.shape[1:]), dtype=engine.inputs["latents"].dtype, device=loader.device)
        batch[: min(rows, left)].copy_(latents[done : done + rows])
        decoded.append(engine.run({"latents": batch})["image"][: min(rows, left)])
        done += rows
    return torch.cat(decoded)
