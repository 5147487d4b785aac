"""A map of a photo's edges, as ControlNets of the kind `canny` are trained on: Canny's detector (Canny 1986, "A computational approach to edge
detection", IEEE PAMI 8(6)), with what OpenCV leaves out and rounds, so that the map is what users of those know to the pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmrt.conditioning import Picture, read

# tan(22.5 degrees) in fixed point, of so many bits behind the point; that of 67.5 degrees is 2 more.
_SHIFT = 15
_TAN = round((2**0.5 - 1) * 2**_SHIFT)


def canny(picture: Picture, low: float = 100.0, high: float = 200.0) -> Image.Image:
    """Edges, white on black, in RGB.

    The gradient is Sobel's, of 3 x 3 pixels, without smoothing before it; its size |dx| + |dy|, of the colour in which it is largest.

    Args:
        picture: a PIL image, or (H, W, 3) uint8.
        low: a pixel with a gradient above it is part of an edge if the edge has one above `high`.
        high: see there.

    Raises:
        BadRequest: it is no picture.
    """
    dx, dy = _gradient(np.asarray(read(picture, param="control_image"), dtype=np.int32))
    size = abs(dx) + abs(dy)
    thin = _is_ridge(dx, dy, size) & (size > low)
    edges = _connected(thin, thin & (size > high))
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def _gradient(pixels: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's, (H, W) each, of the colour that changes most; at the border pixels are repeated."""
    p = np.pad(pixels, [(1, 1), (1, 1), (0, 0)], mode="edge")
    columns, rows = p[:-2] + 2 * p[1:-1] + p[2:], p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    both = np.stack([columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]])
    colour = abs(both).sum(0).argmax(-1)
    dx, dy = np.take_along_axis(both, colour[None, ..., None], axis=-1)[..., 0]
    return dx, dy


def _is_ridge(dx: NDArray[np.int32], dy: NDArray[np.int32], size: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is larger than that of the pixel before it along its own direction, and no smaller than that of the one behind."""
    around = np.pad(size, 1)
    height, width = size.shape

    def beside(down: int, right: int) -> NDArray[np.int32]:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = abs(dx), abs(dy) << _SHIFT
    flat, steep = y < x * _TAN, y > x * (_TAN + (2 << _SHIFT))
    rising = (dx ^ dy) < 0
    falling_ridge = (size > beside(-1, -1)) & (size > beside(1, 1))
    rising_ridge = (size > beside(-1, 1)) & (size > beside(1, -1))
    return np.where(
        flat,
        (size > beside(0, -1)) & (size >= beside(0, 1)),
        np.where(
            steep,
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            np.where(rising, rising_ridge, falling_ridge),
        ),
    )


def _connected(pixels: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels that a way of neighbours leads to from a seed; each is looked at once."""
    left = np.pad(pixels & ~seeds, 1).ravel()
    found = np.pad(seeds, 1).ravel()
    stride = pixels.shape[1] + 2
    neighbours = np.array([down * stride + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right])
    newest: NDArray[Any] = np.flatnonzero(found)
    while newest.size:
        reached = (newest[:, None] + neighbours).ravel()
        newest = np.unique(reached[left[reached]])
        left[newest], found[newest] = False, True
    return found.reshape(-1, stride)[1:-1, 1:-1]
