"""Convolutions of 3 x 3, stride 1 and padding 1 in float32 on a CPU, by minimal filtering (Winograd 1980, "Arithmetic Complexity of
Computations"; Lavin and Gray 2015, arXiv 1509.09308).

A tile of 2 x 2 or 4 x 4 results is a product at each of 16 or 36 points, 2.25 or 4 times fewer multiplications than the sum over the
filter. What is added and subtracted on the way costs digits: of tiles of 2 about one bit, of tiles of 4 three (tests/kernels/test_winograd.py
holds the bounds). What is not finite in a pixel makes all results of the tiles that read it not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ldmrt.kernels import memory, native

Tile = Literal[2, 4]
# Columns of packed weights that lie side by side, as kernels/cpu/winograd.cpp reads them.
PANEL = 16
_TILES: tuple[Tile, ...] = (2, 4)

# Pixels from which a picture has so many tiles of 4 x 4 that weights of any number are worth reading at 36 points.
_LARGE = 1024
# Transforms of fewer weights' pixels take longer than the products that they save; more weights are read from memory each time.
_FEW_WEIGHTS, _MANY_WEIGHTS = 16 * 32, 512 * 512


def tile(weight: Sequence[int], height: int, width: int) -> Tile | None:
    """The tile by which a convolution in float32, stride 1 and padding 1, is the fastest; None if oneDNN is ahead.

    By the rows "convolution" of benchmarks/results/cpu_operators.jsonl. Weights at 36 points take four times as much memory as they
    are, at 16 points 1.8 times: many that few tiles share are better read at 16.

    Args:
        weight: the weights' shape.
        height: of the picture.
        width: of the picture.
    """
    out, channels, *sides = weight
    if (
        sides != [3, 3]
        or out % PANEL
        or channels % PANEL
        or out * channels < _FEW_WEIGHTS
        or not native.takes_winograd()
    ):
        return None
    return 4 if height * width >= _LARGE or out * channels <= _MANY_WEIGHTS else 2


def pack(weight: Tensor, size: Tile) -> Tensor:
    """From (O, C, 3, 3), float32 on the CPU, O and C multiples of 16, to (S, S, O / 16, C, 16): at S^2 points, S = size + 2.

    Raises:
        ValueError: the weight is another one.
    """
    out, channels, *sides = weight.shape
    if sides != [3, 3] or out % PANEL or channels % PANEL or weight.dtype != torch.float32 or size not in _TILES:
        raise ValueError(
            f"conv2d: weight is {tuple(weight.shape)} {weight.dtype}, which has no form for tiles of {size}"
        )
    packed = weight.new_empty(size + 2, size + 2, out // PANEL, channels, PANEL)
    native.run("ldmrt_winograd_pack", weight.contiguous(), packed, out, channels, size)
    return packed


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is as `pack` makes it. The body reads it unchecked, and a graph may give any tensor as a weight."""
    return (
        weight.dim() == 5
        and weight.shape[0] == weight.shape[1]
        and weight.shape[0] - 2 in _TILES
        and weight.shape[3] % PANEL == 0
        and weight.shape[4] == PANEL
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and native.serves(weight)
    )


def conv2d_winograd(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve (N, C, H, W), float32 on the CPU, with packed weights; (N, O, H, W), channels last.

    Raises:
        ValueError: weight is not of x's channels or dtype.
    """
    rows, channels, height, width = x.shape
    if weight.shape[3] != channels or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"conv2d: x is {tuple(x.shape)} {x.dtype}, the packed weight is of other channels or dtype")
    x = x.contiguous(memory_format=torch.channels_last)
    out = weight.shape[2] * PANEL
    result = memory.new_empty(x, (rows, height, width, out))
    if result.numel() > 0:
        native.run("ldmrt_winograd", x, weight, result, rows, height, width, channels, out, weight.shape[0] - 2)
    return result.permute(0, 3, 1, 2)
