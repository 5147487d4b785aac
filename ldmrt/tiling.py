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
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from ldmrt.memory_plan import Size

_OVERLAP = 4  # as diffusers'


@dataclass(frozen=True)
class Tiling:
    """How latents are cut.

    Attributes:
        size: width and height of the latents, in cells.
        tile: width and height of a tile, no larger than `size`.
        overlap: the least share of a tile that its neighbour has too, one part of so many.
    """

    size: Size
    tile: Size
    overlap: int = _OVERLAP

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where tiles start in x and in y, in cells: spread evenly, the first at 0 and the last at the end."""
        across, down = (_starts(*sides, self.overlap) for sides in zip(self.size, self.tile, strict=True))
        return across, down

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
        for number, tile in enumerate(tiles):
            self.lay(number, tile, picture)
        return picture.to(tiles.dtype)

    def lay(self, number: int, tile: torch.Tensor, picture: torch.Tensor) -> None:
        """Add a tile's share to a picture that begins with zeros and has them all in the end.

        Args:
            number: of the tile.
            tile: (..., tile's H, tile's W), decoded.
            picture: (..., H, W) float32, of the same device.
        """
        cell = tile.shape[-1] // self.tile[0]
        row, column = divmod(number, len(self.starts[0]))
        sides = zip(self.starts, self.tile, self.size, strict=True)
        across, down = (_shares(*one, cell).to(tile.device) for one in sides)
        x, y = cell * self.starts[0][column], cell * self.starts[1][row]
        place = picture[..., y : y + tile.shape[-2], x : x + tile.shape[-1]]
        place.add_(tile.float() * (down[row, :, None] * across[column]))


@lru_cache(maxsize=16)
def _shares(starts: tuple[int, ...], length: int, whole: int, cell: int) -> torch.Tensor:
    """(tiles along an axis, pixels of a tile) float32: how much of each pixel comes from each tile. In float64 they add up to 1.

    Args:
        starts: the first cell of each tile.
        length: of a tile, in cells.
        whole: of the picture, in cells.
        cell: in pixels.
    """
    starts, length, whole = tuple(cell * start for start in starts), cell * length, cell * whole
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


def _starts(whole: int, part: int, share: int) -> tuple[int, ...]:
    overlap = max(1, part // share) if part > 1 else 0
    count = 1 if whole == part else -(-(whole - overlap) // (part - overlap))
    return tuple(round(number * (whole - part) / max(1, count - 1)) for number in range(count))
