"""add_upsample against torch's sum and interpolation: the reference everywhere, the Triton body in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, native
from ldmrt.kernels.upsample import (
    MAX_FACTOR,
    OPERATOR,
    Configuration,
    Problem,
    add_upsample,
    add_upsample_native,
    add_upsample_reference,
    add_upsample_triton,
    candidates,
)
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded, assert_rounded_once

Body = Callable[..., Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# In the interpreter numpy warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
BODIES = [
    pytest.param(add_upsample_reference, id="reference"),
    pytest.param(add_upsample_triton, id="triton", marks=pytest.mark.interpreted),
    *at_levels(add_upsample_native),
]

# One element; odd sides; channels with a remainder; one line; one column; five blocks of 64 channels; three rows of pictures.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 70, 3, 4), (2, 8, 1, 9), (1, 24, 6, 1), (1, 320, 3, 5), (3, 64, 4, 4)]
# The way up of SD1.5 and SDXL, with 16 rows too; the VAE; and sums that are only sums.
REAL_SIZES = [
    ((2, 1280, 8, 8), 2),
    ((16, 640, 16, 16), 2),
    ((2, 640, 64, 64), 2),
    ((1, 256, 128, 128), 2),
    ((2, 320, 64, 64), 1),
    ((3, 70, 7, 9), 3),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def arguments(
    shape: Sequence[int], factor: int, dtype: torch.dtype = torch.float32, device: str = "cpu", offset: float = 0.0
) -> list[Any]:
    """All there is: x and residual channels last, x_bias, factor."""
    x, residual = (
        random(*shape, device=device, seed=seed).to(dtype).contiguous(memory_format=torch.channels_last)
        for seed in (0, 1)
    )
    return [x + offset, residual, random(shape[1], dtype=dtype, device=device, seed=2), factor]


def assert_right(found: Tensor, given: list[Any]) -> None:
    """The sum in float32, rounded once, and every pixel a square of it; channels last.

    Of the sum in float64 it is off by the two roundings of float32 before that: relative to the terms, of which two may cancel.
    """
    x, residual, x_bias, factor = given
    terms = [x] + [residual] * (residual is not None) + [x_bias[:, None, None] if x_bias is not None else 0 * x]
    total = x.float()
    for term in terms[1:]:
        total = total + term.float()
    exact = torch.stack([term.double().expand(x.shape) for term in terms])

    def square(picture: Tensor) -> Tensor:
        return F.interpolate(picture, scale_factor=float(factor), mode="nearest")

    assert found.dtype == x.dtype
    assert found.movedim(1, -1).is_contiguous()
    assert_rounded_once(found, square(total))
    assert_rounded(found, square(exact.sum(0)), 2 * HALF_UNIT[torch.float32] * square(exact.abs().sum(0)))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_torch(body: Body, shape: tuple[int, ...], factor: int) -> None:
    given = arguments(shape, factor)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left_out", [(), (1,), (2,), (1, 2)])
def test_what_may_be_left_out(body: Body, left_out: tuple[int, ...], dtype: torch.dtype) -> None:
    for factor in (1, 2):
        given = arguments((2, 70, 3, 5), factor, dtype)
        for position in left_out:
            given[position] = None
        before = [value.clone() if isinstance(value, Tensor) else value for value in given]
        found = body(*given)
        assert_right(found, given)
        # The result is no input: writing to it changes none of them.
        found.fill_(7)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_sum_is_rounded_once(body: Body, dtype: torch.dtype) -> None:
    """Numbers near 1000, whose last bit is worth 0.5 to 4: rounding after each addition would change a tenth of them and more."""
    given = arguments((2, 40, 6, 5), 2, dtype, offset=1000.0)
    assert_right(body(*given), given)
    twice = (given[0] + given[1]) + given[2][:, None, None]
    once = (given[0].float() + given[1].float() + given[2].float()[:, None, None]).to(dtype)
    assert (twice != once).float().mean() > 0.05


@pytest.mark.parametrize("body", BODIES)
def test_the_largest_factor(body: Body) -> None:
    given = arguments((1, 8, 2, 3), MAX_FACTOR)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
def test_other_layouts(body: Body) -> None:
    """Both orders in memory, mixed; a part of the channels of a wider tensor; every other element of a vector."""
    plain = arguments((2, 12, 6, 5), 2)
    expected = body(*plain)
    x, residual, x_bias, factor = plain
    for first in (x.contiguous(), torch.cat([x, x], 1)[:, 5:17].copy_(x), x):
        for second in (residual.contiguous(), residual.transpose(2, 3).contiguous().transpose(2, 3), residual):
            found = body(first, second, x_bias.repeat_interleave(2)[::2], factor)
            assert torch.equal(found, expected)
            assert found.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("body", BODIES)
def test_a_bias_of_another_dtype(body: Body) -> None:
    given = arguments((2, 12, 3, 5), 2, torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        given[2] = random(12, dtype=dtype, seed=4)
        assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
def test_poison_stays_in_its_square(body: Body) -> None:
    given = arguments((2, 70, 3, 4), 2)
    before = body(*given)
    given[0][0, 69, 2, 1], given[1][1, 3, 0, 3] = torch.nan, torch.inf
    found = body(*given)
    poisoned = torch.zeros_like(found, dtype=torch.bool)
    poisoned[0, 69, 4:6, 2:4] = True
    assert found[poisoned].isnan().all()
    assert (found[1, 3, :2, 6:8] == torch.inf).all()
    poisoned[1, 3, :2, 6:8] = True
    assert torch.equal(found[~poisoned], before[~poisoned])


@pytest.mark.interpreted
@pytest.mark.parametrize("columns", [16, 64, 128])
@pytest.mark.parametrize("pixels", [1, 4, 64])
def test_triton_however_it_is_cut(pixels: int, columns: int) -> None:
    """70 channels, 30 pixels: the last programs of both directions are not whole."""
    given = arguments((2, 70, 3, 5), 2)
    assert_right(add_upsample_triton(*given, chosen=Configuration(pixels, columns, num_warps=4)), given)


@pytest.mark.interpreted
def test_every_candidate_is_right() -> None:
    given = arguments((2, 320, 3, 5), 2, torch.float16)
    plans = candidates(Problem(2 * 64 * 64, 320, 2, torch.float16))
    assert len(plans) > 1
    for chosen in plans:
        assert_right(add_upsample_triton(*given, chosen=chosen), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 70, 320, 640, 1280, 2560])
def test_every_candidate_can_be_launched(channels: int, dtype: torch.dtype) -> None:
    for pixels in (1, 35, 128, 65536):
        for factor in (1, 2, MAX_FACTOR):
            problem = Problem(pixels, channels, factor, dtype)
            for plan in OPERATOR.candidates(90, problem):
                assert all(value & (value - 1) == 0 < value for value in plan)
                # Nobody is left without work: no more than one block of pixels, or of channels, is not whole.
                assert plan.pixels < 2 * pixels
                assert plan.columns < 2 * channels
                # Without a remainder there is no mask in the way of whole vectors.
                assert channels < 64 or channels % 64 != 0 or channels % plan.columns == 0


def test_the_operator_on_a_cpu() -> None:
    body = add_upsample_native if native.available() else add_upsample_reference
    given = arguments((2, 12, 6, 5), 2, torch.bfloat16)
    assert torch.equal(add_upsample(*given), body(*given))
    assert add_upsample(torch.empty(0, 4, 3, 5), None, None, 2).shape == (0, 4, 6, 10)


def test_one_kernel_serves_all_sizes() -> None:
    """The pixels are no constant: of one number of channels, every side and number of rows is the same kernel."""
    with launch.recording(90) as variants:
        for rows, side in ((2, 64), (1, 96), (16, 64), (2, 128)):
            x = torch.empty(rows, 640, side, side, dtype=torch.float16, device="meta")
            result = add_upsample(x, x, None, 2)
            assert result.shape == (rows, 640, 2 * side, 2 * side)
            assert result.movedim(1, -1).is_contiguous()
    assert [variant.kernel for variant in variants] == ["upsample.forward"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(2, 4, 3)}, ValueError, r"x has shape \(2, 4, 3\), expected \(N, C, H, W\)"),
        ({0: torch.zeros(2, 4, 3, 5).double()}, TypeError, "x is torch.float64, expected float32"),
        ({3: 0}, ValueError, "factor is 0, expected 1 to 8"),
        ({3: 9}, ValueError, "factor is 9, expected 1 to 8"),
        ({1: torch.zeros(2, 4, 3, 5).half()}, TypeError, "residual is torch.float16, expected torch.float32 as x"),
        ({1: torch.zeros(2, 4, 5, 3)}, ValueError, r"residual has shape \(2, 4, 5, 3\), expected \(2, 4, 3, 5\)"),
        ({1: torch.zeros(2, 4, 3, 5, device="meta")}, ValueError, "residual is on meta, expected cpu as x"),
        ({2: torch.zeros(5)}, ValueError, r"x_bias has shape \(5,\), expected \(4,\)"),
        ({2: torch.zeros(4, device="meta")}, ValueError, "x_bias is on meta, expected cpu as x"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Any], error: type[Exception], message: str) -> None:
    given = arguments((2, 4, 3, 5), 2)
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        add_upsample(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("shape", "factor", "dtype"),
    [
        *[(*size, torch.float16) for size in REAL_SIZES],
        *[((2, 70, 7, 9), 2, dtype) for dtype in DTYPES],
        ((2, 1280, 8, 8), 2, torch.bfloat16),
        ((1, 3, 5, 7), MAX_FACTOR, torch.float32),
    ],
    ids=str,
)
def test_on_a_gpu(shape: tuple[int, ...], factor: int, dtype: torch.dtype) -> None:
    given = arguments(shape, factor, dtype, "cuda")
    problem = Problem(shape[0] * shape[2] * shape[3], shape[1], factor, dtype)
    for left_out in ((), (1,), (1, 2)):
        for position in left_out:
            given[position] = None
        found = add_upsample(*given)
        assert_right(found, given)
        assert torch.equal(add_upsample_reference(*given), found)
        for chosen in candidates(problem)[1:]:
            assert torch.equal(add_upsample_triton(*given, chosen=chosen), found)


@pytest.mark.gpu
@needs_gpu
def test_captured_in_a_cuda_graph() -> None:
    given = arguments((2, 640, 32, 32), 2, torch.float16, "cuda")
    expected = add_upsample(*given)  # compiles
    x = given[0].clone()
    given[0].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = add_upsample(*given)
    given[0].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)
