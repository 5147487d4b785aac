"""Pictures put together of tiles that overlap, for latents that are too large for the decoder's memory.

A decoder normalizes groups of channels over the whole picture, and its first layers attend to all of it. A tile has statistics of its own, so
tiles differ a little where they meet, and no way of cutting gives the picture that is decoded whole; a decoder without such layers would give
it exactly, but for the pixels that see a tile's edge. What differs is blended: each pixel is a mean of the tiles that have it, and a
tile's weight falls in a straight line from its inside to its edge, over all of the overlap.

All tiles are as large as the engine is made for: those at the end are moved back, where diffusers cuts smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from ldmrt.memory_plan import Size

# The least share of a tile that its neighbour has too; diffusers' is the same.
_OVERLAP = 4


@dataclass(frozen=True)
class Tiling:
    """How latents are cut.

    Attributes:
        size: width and height of the latents, in cells.
        tile: width and height of a tile, no larger than `size`.
    """

    size: Size
    tile: Size

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where tiles start in x and in y, in cells: spread evenly, the first at 0 and the last at the end."""
        return tuple(_starts(whole, part) for whole, part in zip(self.size, self.tile, strict=True))  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The first cell of every tile, (x, y)."""
        return ((x, y) for y in self.starts[1] for x in self.starts[0])

    def cut(self, latents: torch.Tensor) -> torch.Tensor:
        """(C, h, w) to (tiles, C, tile's h, tile's w)."""
        width, height = self.tile
        return torch.stack([latents[:, y : y + height, x : x + width] for x, y in self])

    def blend(self, tiles: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, H', W'), decoded, to the picture (3, H, W) of their dtype; computed in float32."""
        cell = tiles.shape[-1] // self.tile[0]
        width, height = (cell * side for side in self.size)
        picture = torch.zeros((tiles.shape[1], height, width), dtype=torch.float32, device=tiles.device)
        across, down = (self._shares(axis, cell).to(tiles.device) for axis in (0, 1))
        count = len(self.starts[0])
        for number, (tile, (x, y)) in enumerate(zip(tiles, self, strict=True)):
            share = down[number // count, :, None] * across[number % count]
            place = picture[:, cell * y : cell * y + tile.shape[1], cell * x : cell * x + tile.shape[2]]
            place.add_(tile.float() * share)
        return picture.to(tiles.dtype)

    def _shares(self, axis: int, cell: int) -> torch.Tensor:
        """(tiles along an axis, pixels of a tile) float32: how much of each pixel comes from each tile. In float64 they add up to 1."""
        starts, length = [cell * start for start in self.starts[axis]], cell * self.tile[axis]
        whole = cell * self.size[axis]
        position = torch.arange(length, dtype=torch.float64) + 0.5
        weights = torch.ones((len(starts), length), dtype=torch.float64)
        for number, (first, second) in enumerate(pairwise(starts)):
            overlap = first + length - second
            weights[number] *= ((length - position) / overlap).clamp(max=1)
            weights[number + 1] *= (position / overlap).clamp(max=1)
        total = torch.zeros(whole, dtype=torch.float64)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + length] += weight
        shares = [weight / total[start : start + length] for start, weight in zip(starts, weights, strict=True)]
        return torch.stack(shares).float()


def _starts(whole: int, part: int) -> tuple[int, ...]:
    overlap = max(1, part // _OVERLAP) if part > 1 else 0
    count = 1 if whole == part else -(-(whole - overlap) // (part - overlap))
    return tuple(round(number * (whole - part) / max(1, count - 1)) for number in range(count))
