"""Convolutions by minimal filtering against float64, with every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import native, winograd
from ldmrt.kernels.convolution import arranged_weight, conv2d
from tests.kernels.levels import at_levels
from tests.kernels.oracle import HALF_UNIT, assert_rounded, relative_error

Body = Callable[[Tensor, Tensor], Tensor]
bodies = pytest.mark.parametrize("body", at_levels(winograd.conv2d_winograd))
sizes = pytest.mark.parametrize("size", [2, 4])

# x (rows, channels, height, width), and channels of the result: tiles that the picture does not fill, one pixel, odd numbers of panels,
# blocks of tiles that threads share or have alone, sums of many terms.
SHAPES = [
    ((2, 32, 8, 8), 32),
    ((2, 32, 7, 5), 48),
    ((1, 16, 1, 1), 16),
    ((3, 48, 9, 14), 176),
    ((2, 16, 97, 66), 16),
    ((1, 1280, 4, 4), 32),
]
# From pixels to points, and from points to results (Lavin and Gray 2015, arXiv 1509.09308, section 4.1 and 4.3), and of the weights.
PIXELS: dict[int, list[list[float]]] = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
RESULTS: dict[int, list[list[float]]] = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}
WEIGHTS: dict[int, list[list[float]]] = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}


@pytest.fixture(autouse=True)
def _native() -> None:
    if not native.available():
        pytest.skip(str(native.why_not()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(shape: tuple[int, ...], out: int) -> tuple[Tensor, Tensor]:
    x = random(*shape).contiguous(memory_format=torch.channels_last)
    return x, random(out, shape[1], 3, 3, seed=1) / (3 * math.sqrt(shape[1]))


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def weights_at_points(weight: Tensor, size: int) -> Tensor:
    each = matrix(WEIGHTS[size])
    return torch.einsum("ay,ocyx,bx->aboc", each, weight.double(), each)


def magnitude(x: Tensor, weight: Tensor, size: int) -> Tensor:
    """The sum of the magnitudes of all that a result is summed up from: rounding is relative to it."""
    height, width = x.shape[2:]
    more = [-height % size, -width % size]
    padded = F.pad(x.double().abs(), (1, 1 + more[1], 1, 1 + more[0]))
    tiles = padded.unfold(2, size + 2, size).unfold(3, size + 2, size)
    pixels, results = matrix(PIXELS[size]).abs(), matrix(RESULTS[size]).abs()
    points = torch.einsum("ay,nchwyx,bx->abnchw", pixels, tiles, pixels)
    products = torch.einsum("abnchw,aboc->abnohw", points, weights_at_points(weight, size).abs())
    found = torch.einsum("ya,xb,abnohw->nohywx", results, results, products)
    return found.flatten(4, 5).flatten(2, 3)[..., :height, :width]


def assert_right(found: Tensor, x: Tensor, weight: Tensor, size: int) -> None:
    """Each sum over channels rounds once for each term, the sums of tiles before and after at most 8 times in each of 2 directions."""
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    error = (x.shape[1] + 32) * HALF_UNIT[torch.float32] * magnitude(x, weight, size)
    assert_rounded(found, expected, error)


@bodies
@sizes
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_against_float64(body: Body, shape: tuple[int, ...], out: int, size: winograd.Tile) -> None:
    x, weight = given(shape, out)
    packed = winograd.pack(weight, size)
    assert winograd.is_packed(packed)
    found = body(x, packed)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_right(found, x, weight, size)
    # Of the whole picture: float32's own sums are off by 4e-7 to 2e-6.
    assert relative_error(found, F.conv2d(x.double(), weight.double(), padding=1)) < {2: 3e-6, 4: 2e-5}[size]


def test_many_threads_share_several_blocks() -> None:
    x, weight = given((2, 16, 97, 66), 16)
    packed = winograd.pack(weight, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        found = winograd.conv2d_winograd(x, packed)
    finally:
        torch.set_num_threads(threads)
    assert_right(found, x, weight, 4)


@bodies
@sizes
def test_other_layouts_and_odd_addresses(body: Body, size: winograd.Tile) -> None:
    x, weight = given((2, 32, 6, 9), 32)
    packed = winograd.pack(weight, size)
    expected = body(x, packed)
    assert torch.equal(body(x.contiguous(), packed), expected)
    shifted = torch.empty(x.numel() + 1)[1:].view(2, 6, 9, 32).permute(0, 3, 1, 2).copy_(x)
    moved = torch.empty(packed.numel() + 3)[3:].view(packed.shape).copy_(packed)
    assert torch.equal(body(shifted, moved), expected)
    assert body(x[:0], packed).shape == (0, 32, 6, 9)


@bodies
@sizes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_tiles(body: Body, bad: float, size: winograd.Tile) -> None:
    x, weight = given((2, 32, 16, 16), 32)
    packed = winograd.pack(weight, size)
    expected = body(x, packed)
    x[1, 3, 5, 5] = bad
    found = body(x, packed)
    assert not found[1, :, 4:7, 4:7].isfinite().any()
    found[1, :, 4:8, 4:8] = expected[1, :, 4:8, 4:8]
    assert torch.equal(found, expected)


@sizes
def test_packed_weights(size: winograd.Tile) -> None:
    weight = random(32, 48, 3, 3)
    packed = winograd.pack(weight, size)
    assert packed.shape == (size + 2, size + 2, 2, 48, 16)
    found = packed.movedim(3, 4).flatten(2, 3).double()
    torch.testing.assert_close(found, weights_at_points(weight, size), rtol=2**-24, atol=1e-15)
    assert torch.equal(winograd.pack(weight.contiguous(memory_format=torch.channels_last), size), packed)


@pytest.mark.parametrize(
    ("out", "channels", "pixels", "size"),
    [
        (64, 64, (16, 16), 4),
        (160, 160, (8, 8), 4),
        (160, 160, (4, 4), 4),
        (320, 320, (64, 64), 4),
        (1280, 1280, (32, 32), 4),
        (1280, 1280, (16, 16), 2),
        (16, 16, (128, 128), None),
        (64, 4, (16, 16), None),
        (4, 64, (16, 16), None),
    ],
)
def test_the_choice(out: int, channels: int, pixels: tuple[int, int], size: int | None) -> None:
    if not native.takes_winograd():
        pytest.skip("this processor has no AVX2")
    assert winograd.tile((out, channels, 3, 3), *pixels) == size
    assert winograd.tile((out, channels, 1, 1), *pixels) is None


def test_arranged_weights() -> None:
    """Changed in place by a copy."""
    x, weight = given((2, 64, 16, 16), 64)
    arranged = arranged_weight(weight, 1, 1, 4)
    assert winograd.is_packed(arranged)
    assert_right(conv2d(x, arranged, 1, 1), x, weight, 4)
    other = weight.flip(0) * 2
    arranged.copy_(arranged_weight(other, 1, 1, 4))
    assert_right(conv2d(x, arranged, 1, 1), x, other, 4)


def test_other_channels_are_refused() -> None:
    packed = winograd.pack(random(32, 32, 3, 3), 4)
    for x in (random(1, 16, 8, 8), random(1, 32, 8, 8).half()):
        with pytest.raises(ValueError, match="the packed weight is of other channels or dtype"):
            winograd.conv2d_winograd(x, packed)
