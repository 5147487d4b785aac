"""conv2d against float64: the reference everywhere, the Triton bodies in the interpreter and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, native
from ldmrt.kernels.convolution import (
    Problem,
    Tiles,
    arranged_weight,
    candidates,
    conv2d,
    conv2d_reference,
    conv2d_triton,
)
from ldmrt.kernels.linear import is_packed
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded

pytestmark = [
    pytest.mark.usefixtures("bfloat16_in_the_interpreter"),
    # numpy warns of NaN there.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# x (rows, channels, height, width), channels of the result, side of the filter, stride.
SHAPES = [
    ((2, 32, 7, 5), 32, 3, 1),
    ((1, 64, 6, 8), 32, 3, 2),
    ((2, 32, 9, 4), 64, 3, 2),
    ((1, 32, 1, 1), 32, 3, 1),
    ((3, 32, 5, 6), 32, 1, 1),
    ((1, 16, 8, 7), 32, 5, 1),
]


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(
    shape: tuple[int, ...], out: int, side: int, stride: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Any]:
    x = random(*shape, dtype=dtype, device=device)
    scale = 1 / math.sqrt(shape[1] * side**2)
    weight = (random(out, shape[1], side, side, dtype=torch.float32, device=device, seed=1) * scale).to(dtype)
    last = torch.channels_last
    return [x.contiguous(memory_format=last), weight.contiguous(memory_format=last), stride, side // 2]


def assert_right(found: Tensor, given: list[Any]) -> None:
    """Within what float32 sums of so many terms lose, then rounded to the dtype."""
    x, weight, stride, padding = given
    x, weight = x.double(), weight.double()
    expected = F.conv2d(x, weight, None, stride, padding)
    magnitude = F.conv2d(x.abs(), weight.abs(), None, stride, padding)
    error = (weight[0].numel() + 8) * HALF_UNIT[torch.float32] * magnitude
    assert_rounded(found, expected, error)


@pytest.mark.interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("shape", "out", "side", "stride"), SHAPES)
def test_triton_against_float64(shape: tuple[int, ...], out: int, side: int, stride: int, splits: int) -> None:
    """Borders on all sides, blocks of pixels that are not whole, and terms that the splits do not share evenly."""
    given = arguments(shape, out, side, stride, torch.float32)
    found = conv2d_triton(*given, tiles=Tiles(16, 32, 16, splits, 4, 2))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_right(found, given)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("splits", [1, 5])
def test_triton_in_half_precisions(splits: int, dtype: torch.dtype) -> None:
    given = arguments((2, 32, 7, 5), 32, 3, 1, dtype)
    assert_right(conv2d_triton(*given, tiles=Tiles(32, 16, 32, splits, 4, 2)), given)


@pytest.mark.interpreted
def test_triton_with_other_layouts_and_nan() -> None:
    x, weight, stride, padding = arguments((2, 32, 7, 5), 32, 3, 1, torch.float32)
    tiles = Tiles(16, 32, 16, 2, 4, 2)
    expected = conv2d_triton(x, weight, stride, padding, tiles=tiles)
    assert torch.equal(conv2d_triton(x.contiguous(), weight.contiguous(), stride, padding, tiles=tiles), expected)
    x[0, 3, 0, 0] = torch.nan
    found = conv2d_triton(x, weight, stride, padding, tiles=tiles)
    assert found[0, :, :2, :2].isnan().all()
    found[0, :, :2, :2] = expected[0, :, :2, :2]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out", "side", "stride"), [*SHAPES, ((2, 3, 9, 11), 7, 3, 2)])
def test_reference_against_float64(
    shape: tuple[int, ...], out: int, side: int, stride: int, dtype: torch.dtype
) -> None:
    given = arguments(shape, out, side, stride, dtype)
    found = conv2d_reference(*given)
    assert_right(found, given)
    assert torch.equal(conv2d(*given), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out", "side", "stride"), [*SHAPES, ((2, 3, 9, 11), 7, 3, 2)])
def test_arranged_weights(shape: tuple[int, ...], out: int, side: int, stride: int, dtype: torch.dtype) -> None:
    """Packed for the native body, or in oneDNN's own order, where one takes the dtype; changed in place by a copy."""
    given = arguments(shape, out, side, stride, dtype)
    x, weight, stride, padding = given
    arranged = arranged_weight(weight, stride, padding)
    assert (arranged.is_mkldnn or is_packed(arranged)) == (arranged is not weight)
    assert arranged.is_mkldnn or dtype != torch.float32
    assert_right(conv2d(x, arranged, stride, padding), given)
    assert_right(conv2d(x.contiguous(), arranged, stride, padding), given)
    other = weight.flip(0) * 2
    arranged.copy_(arranged_weight(other, stride, padding))
    assert_right(conv2d(x, arranged, stride, padding), [x, other, stride, padding])


# Tiles of 16 pixels that fit into a row and that do not, which reach back or are gathered; two pictures; sums in several chunks.
PACKED_SHAPES = [
    ((1, 32, 16, 16), 32, 3, 1),
    ((2, 64, 20, 24), 96, 3, 1),
    ((2, 32, 33, 33), 32, 3, 2),
    ((1, 64, 32, 40), 32, 3, 2),
    ((2, 32, 7, 5), 32, 3, 1),
    ((1, 320, 8, 8), 64, 3, 1),
    ((1, 160, 18, 17), 32, 3, 1),
    ((1, 32, 20, 20), 64, 1, 1),
    ((1, 32, 17, 16), 32, 5, 1),
]


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize(("shape", "out", "side", "stride"), PACKED_SHAPES)
def test_packed_weights(shape: tuple[int, ...], out: int, side: int, stride: int, padding: int | None) -> None:
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")
    given = arguments(shape, out, side, stride, torch.bfloat16)
    if padding is not None:
        given[3] = padding
    arranged = arranged_weight(given[1], *given[2:])
    assert is_packed(arranged)
    found = conv2d(given[0], arranged, *given[2:])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_right(found, given)
    assert torch.equal(conv2d(given[0].contiguous(), arranged, *given[2:]), found)


@pytest.mark.parametrize("side", [6, 16])
def test_packed_weights_keep_what_is_not_finite_in_its_place(side: int) -> None:
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")
    x, weight, stride, padding = arguments((2, 32, side, side), 32, 3, 1, torch.bfloat16)
    arranged = arranged_weight(weight, stride, padding)
    expected = conv2d(x, arranged, stride, padding)
    x[1, 3, 0, 0] = torch.nan
    found = conv2d(x, arranged, stride, padding)
    assert found[1, :, :2, :2].isnan().all()
    found[1, :, :2, :2] = expected[1, :, :2, :2]
    assert torch.equal(found, expected)


def test_packed_weights_of_other_channels_are_refused() -> None:
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")
    _, weight, stride, padding = arguments((1, 64, 8, 8), 32, 3, 1, torch.bfloat16)
    arranged = arranged_weight(weight, stride, padding)
    with pytest.raises(ValueError, match="the packed weight is of other channels or dtype"):
        conv2d(torch.zeros(1, 32, 8, 8, dtype=torch.bfloat16), arranged, stride, padding)


def test_weights_elsewhere_stay_as_they_are() -> None:
    weight = torch.empty(4, 2, 3, 3, device="meta")
    assert arranged_weight(weight, 1, 1) is weight


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("side", [8, 16, 24, 32, 64])
def test_candidates_fit(arch: int, side: int) -> None:
    for rows in (1, 2, 16):
        for channels in (320, 1280, 2560, 4):
            found = candidates(arch, Problem(rows, channels, 1280, side, side, 3, 1, torch.float16))
            assert any(choice.body == "library" for choice in found)
            for choice in found:
                if choice.body == "triton":
                    assert channels % choice.tiles.block_k == 0
                    assert 1280 % choice.tiles.block_n == 0
                    assert 1 <= choice.tiles.splits <= 16
    assert len(candidates(90, Problem(2, 1280, 1280, 8, 8, 3, 1, torch.float32))) == 1


def test_small_pictures_are_launched_and_large_ones_are_the_library_s() -> None:
    for side, kernels in ((8, ["convolution.forward", "convolution.gather"]), (64, [])):
        x = torch.empty(2, 1280, side, side, dtype=torch.float16, device="meta")
        weight = torch.empty(1280, 1280, 3, 3, dtype=torch.float16, device="meta")
        with launch.recording(90) as variants:
            assert conv2d(x, weight, 1, 1).shape == x.shape
        assert [variant.kernel for variant in variants] == kernels


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(1, 3, 4, 4)}, ValueError, r"x has shape \(1, 3, 4, 4\), weight \(5, 2, 3, 3\), expected"),
        ({1: torch.zeros(5, 2, 3, 1)}, ValueError, r"weight \(5, 2, 3, 1\), expected"),
        ({1: torch.zeros(5, 2, 3, 3).half()}, TypeError, "weight is torch.float16, expected torch.float32 as x"),
        ({1: torch.zeros(5, 2, 3, 3, device="meta")}, ValueError, "weight is on meta, expected cpu as x"),
        ({2: 0}, ValueError, "stride 0 and padding 1 do not fit"),
        ({0: torch.zeros(1, 2, 0, 4), 3: 1}, ValueError, "do not fit"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Any], error: type[Exception], message: str) -> None:
    given: list[Any] = [torch.zeros(1, 2, 4, 4), torch.zeros(5, 2, 3, 3), 1, 1]
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        conv2d(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("shape", "out", "stride"), [((2, 1280, 8, 8), 1280, 1), ((2, 1280, 15, 17), 1280, 2), ((3, 640, 16, 16), 1280, 1)]
)
def test_on_a_gpu_against_float64(shape: tuple[int, ...], out: int, stride: int, dtype: torch.dtype) -> None:
    given = arguments(shape, out, 3, stride, dtype, "cuda")
    assert_right(conv2d(*given), given)
    rows, channels, height, width = shape
    for choice in candidates(
        launch.architecture(given[0].device), Problem(rows, channels, out, height, width, 3, stride, dtype)
    ):
        if choice.body == "triton":
            assert_right(conv2d_triton(*given, tiles=choice.tiles), given)
