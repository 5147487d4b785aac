"""group_norm_silu against float64: the reference everywhere, the Triton bodies in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch, native
from ldmrt.kernels.group_norm import (
    Configuration,
    candidates,
    group_norm_silu,
    group_norm_silu_native,
    group_norm_silu_reference,
    group_norm_silu_triton,
)
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, assert_rounded

Body = Callable[..., Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# In the interpreter numpy warns of NaN, and of exp(-y) for elements that a mask leaves out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
EPS = 1e-5

# Shape and groups. One element; one row, few groups; groups of 3, 5, 10 and 20 channels; odd sides; three dimensions, five, two.
SMALL = [
    ((1, 1, 1, 1), 1),
    ((1, 6, 5, 7), 2),
    ((3, 15, 9, 3), 5),
    ((2, 40, 8, 8), 4),
    ((2, 80, 6, 5), 4),
    ((5, 12, 33), 3),
    ((2, 8, 3, 4, 5), 8),
    ((4, 21), 7),
    ((16, 12, 3, 2), 3),
]
# Channels and sides, in 32 groups: the U-Nets of SD1.5 and SD2.1 at 512 and 768 pixels, of SDXL at 1024, and the VAE.
UNET = [
    *[(channels, side) for side in (64, 96) for channels in (320, 640, 960)],
    *[(channels, side) for side in (32, 48) for channels in (320, 640, 960, 1280, 1920)],
    *[(channels, side) for side in (16, 24) for channels in (640, 1280, 1920, 2560)],
    *[(channels, side) for side in (8, 12) for channels in (1280, 2560)],
    *[(channels, 128) for channels in (320, 640, 960)],
    *[(channels, 64) for channels in (1280, 1920)],
    *[(channels, 32) for channels in (2560,)],
]
VAE = [
    (channels, side * scale)
    for side in (64, 96, 128)
    for channels, scale in ((512, 1), (512, 2), (512, 4), (256, 4), (256, 8), (128, 8))
]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _power_of_two(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(number)))


def fused(*given: Any) -> Tensor:
    """The Triton body that reads once; a program has all groups if channels are last, else one."""
    block, tile = 1 if given[0].is_contiguous() else given[3], _power_of_two(given[0].shape[2:].numel())
    return group_norm_silu_triton(*given, chosen=Configuration(block, 1, tile, num_warps=4))


def whole(*given: Any) -> Tensor:
    """The two Triton bodies for large groups, with two splits of one tile."""
    tile = _power_of_two(given[0].shape[2:].numel() / 2)
    return group_norm_silu_triton(*given, chosen=Configuration(given[3], 2, tile, num_warps=4))


def looped(*given: Any) -> Tensor:
    """The same with two splits of several tiles, if there are several positions."""
    tile = _power_of_two(given[0].shape[2:].numel() / 8)
    return group_norm_silu_triton(*given, chosen=Configuration(given[3], 2, tile, num_warps=4))


BODIES = [
    pytest.param(group_norm_silu_reference, id="reference"),
    pytest.param(fused, id="fused", marks=pytest.mark.interpreted),
    pytest.param(whole, id="whole", marks=pytest.mark.interpreted),
    pytest.param(looped, id="looped", marks=pytest.mark.interpreted),
    *at_levels(group_norm_silu_native),
]


def arguments(
    shape: tuple[int, ...],
    groups: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    channels_last: bool = False,
    offset: float = 0.0,
) -> list[Any]:
    """All there is: x, weight, bias, groups, eps, silu, a shift cut out of a wider tensor, and x_bias."""
    rows, channels = shape[:2]
    # Channels of different means and deviations, so that a mistake in who belongs to which group shows.
    scale = (1 + torch.arange(channels, device=device) % 3).view(-1, *[1] * (len(shape) - 2))
    x = (random(*shape, device=device) * scale + 0.2 * scale + offset).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = 1 + 0.2 * random(channels, dtype=dtype, device=device, seed=1)
    bias = 0.5 * random(channels, dtype=dtype, device=device, seed=2)
    shift = random(rows, 2 * channels + 3, dtype=dtype, device=device, seed=3)[:, 3 : 3 + channels]
    x_bias = 0.5 * random(channels, dtype=dtype, device=device, seed=4)
    return [x, weight, bias, groups, EPS, True, shift, x_bias]


def expected(given: list[Any]) -> tuple[Tensor, Tensor]:
    """In float64, on the device: the result, and to what its errors are relative.

    The latter is (|norm| + 1) |weight| + |bias|: what the mean is off by is relative to the deviation, hence the 1. SiLU
    passes errors on by a factor of at most 1.1.
    """
    exact: list[Any] = [value.double() if isinstance(value, Tensor) else value for value in given]
    x, weight, bias, groups, eps, silu, shift, x_bias = exact
    across = [1] * (x.dim() - 2)
    value = x
    for added in (shift, x_bias):
        value = value if added is None else value + added.reshape(*added.shape, *across)
    value = value.reshape(x.shape[0], groups, -1)
    value = value - value.mean(-1, keepdim=True)
    norm = (value / (value.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    weight = x.new_ones(()) if weight is None else weight.reshape(-1, *across)
    bias = x.new_zeros(()) if bias is None else bias.reshape(-1, *across)
    result = norm * weight + bias
    scale = (norm.abs() + 1) * weight.abs() + bias.abs()
    return (result * result.sigmoid() if silu else result), scale


def assert_right(
    found: Tensor, given: list[Any], error: float = 4e-6, oracle: tuple[Tensor, Tensor] | None = None
) -> None:
    """Within `error`, before the result is rounded to x's dtype; and of x's dtype and layout.

    4e-6 is a dozen roundings in float32 (2^-24) and the approximations of a GPU's reciprocal square root and exponential (2^-22).
    Sums are over float32 numbers in a tree and their mean is corrected, so the number of elements does not matter.
    """
    result, scale = oracle or expected(given)
    assert found.dtype == given[0].dtype
    assert found.stride() == given[0].stride()
    assert_rounded(found, result, error * scale)


def check_poison(body: Body, given: list[Any]) -> None:
    """A NaN makes its row's group NaN, so does infinity, and no other element changes."""
    before = body(*given)
    x, groups = given[0], given[3]
    size = x.shape[1] // groups
    x[0, size, -1, 0], x[1, 0, 0, -1] = torch.nan, torch.inf
    found = body(*given)
    poisoned = torch.zeros_like(x, dtype=torch.bool)
    poisoned[0, size : 2 * size] = True
    poisoned[1, :size] = True
    assert found[poisoned].isnan().all()
    assert torch.equal(found[~poisoned], before[~poisoned])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [*[(*small, torch.float32) for small in SMALL], *[((3, 15, 9, 3), 5, dtype) for dtype in DTYPES[1:]]],
)
def test_against_float64(
    body: Body, shape: tuple[int, ...], groups: int, channels_last: bool, dtype: torch.dtype
) -> None:
    given = arguments(shape, groups, dtype=dtype, channels_last=channels_last)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("left_out", [(1,), (2,), (6,), (7,), (6, 7), (1, 2, 6), (1, 2, 6, 7)], ids=str)
def test_what_may_be_left_out(body: Body, left_out: tuple[int, ...], silu: bool) -> None:
    given = arguments((2, 20, 6, 10), 4, channels_last=True)
    given[5] = silu
    for position in left_out:
        given[position] = None
    assert_right(body(*given), given)


@pytest.mark.interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("block", [1, 6])
@pytest.mark.parametrize(("splits", "tile"), [(1, 128), (2, 64), (2, 16), (8, 16), (8, 32)])
def test_triton_however_it_is_split(splits: int, tile: int, block: int, channels_last: bool) -> None:
    """117 positions: the last tile is not whole, some elements of a tile have one number less, some splits have none."""
    given = arguments((1, 60, 9, 13), 6, channels_last=channels_last)
    chosen = Configuration(block, splits, tile, num_warps=4)
    assert_right(group_norm_silu_triton(*given, chosen=chosen), given)


@pytest.mark.interpreted
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_candidate_is_right(channels_last: bool) -> None:
    given = arguments((1, 40, 16, 18), 4, dtype=torch.float16, channels_last=channels_last)
    oracle = expected(given)
    plans = candidates(90, 256, 40, 4, 16 * 18, 2, channels_last=channels_last)
    assert {plan.splits == 1 for plan in plans} == {True, False}
    for chosen in plans:
        assert_right(group_norm_silu_triton(*given, chosen=chosen), given, oracle=oracle)


@pytest.mark.interpreted
def test_the_default_is_right() -> None:
    given = arguments((2, 20, 6, 10), 4, dtype=torch.float16, channels_last=True)
    assert_right(group_norm_silu_triton(*given), given)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [1000.0, -3e4])
def test_large_offset(body: Body, offset: float, channels_last: bool) -> None:
    """Numbers near 1000 are 6e-5 apart in float32, those near 30,000 2e-3: no mean and no x + shift can be better than that.

    A variance from a sum of squares would be off by more than itself: 2^-24 of 10^6 and of 10^9, times the terms of the sum.
    """
    given = arguments((2, 20, 16, 12), 2, channels_last=channels_last, offset=offset)
    assert_right(body(*given), given, 2 * 2.0**-23 * abs(offset))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_bounds_a_group_that_hardly_varies(body: Body, eps: float) -> None:
    given = arguments((2, 12, 8, 8), 3)
    given[0], given[4], given[6], given[7] = 1e-3 * given[0], eps, None, None
    given[0][:, :4] = 0.5
    found = body(*given)
    assert_right(found, given)
    constant = given[2][:4].sigmoid() * given[2][:4]
    torch.testing.assert_close(found[:, :4], constant.view(-1, 1, 1).expand(2, 4, 8, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_poison_stays_in_its_group(body: Body, channels_last: bool) -> None:
    check_poison(body, arguments((3, 40, 8, 9), 4, channels_last=channels_last))


@pytest.mark.parametrize("body", BODIES)
def test_other_layouts(body: Body) -> None:
    """Width before height; a part of the channels of a wider tensor; every other element."""
    shape = (2, 12, 6, 10)
    given = arguments(shape, 3)
    dense = given[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert_right(body(dense, *given[1:]), [dense, *given[1:]])
    for part in (torch.cat([given[0]] * 2, 1)[:, 3:15], given[0].repeat_interleave(2, 3)[..., ::2]):
        found = body(part, *given[1:])
        assert_right(found, [part.clone(memory_format=torch.preserve_format), *given[1:]])


@pytest.mark.parametrize("body", BODIES)
def test_vectors_with_strides_and_of_other_dtypes(body: Body) -> None:
    given = arguments((2, 12, 6, 10), 3, dtype=torch.float16)
    given[1] = given[1].float().repeat_interleave(2)[::2]
    given[2] = given[2].bfloat16()
    given[6] = given[6].float().T.contiguous().T
    given[7] = given[7].float().repeat_interleave(2)[::2]
    assert_right(body(*given), given)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "side"), [(320, 64), (960, 32), (2560, 8), (128, 256)])
def test_reference_at_full_size(channels: int, side: int, channels_last: bool) -> None:
    given = arguments((1, channels, side, side), 32, dtype=torch.float16, channels_last=channels_last)
    assert_right(group_norm_silu_reference(*given), given)


def test_the_operator_on_a_cpu() -> None:
    body = group_norm_silu_native if native.available() else group_norm_silu_reference
    given = arguments((2, 12, 6, 10), 3, dtype=torch.bfloat16)
    assert torch.equal(group_norm_silu(*given), body(*given))
    assert group_norm_silu(torch.empty(0, 4, 3), None, None, 2, EPS, False).shape == (0, 4, 3)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_candidate_can_be_launched(arch: int, itemsize: int, channels_last: bool) -> None:
    for rows in (1, 2, 16):
        for channels, side in [*UNET, *VAE]:
            plans = candidates(arch, rows, channels, 32, side * side, itemsize, channels_last=channels_last)
            for plan in plans:
                assert 32 % plan.groups == 0
                assert all(value > 0 and value & (value - 1) == 0 for value in plan[1:])
                assert plan.splits > 1 or plan.spatial >= side * side
                assert plan.spatial * 2 ** math.ceil(math.log2(plan.groups * channels // 32)) <= 32768
                assert plan.num_warps <= 32


def test_few_kernels_serve_all_sizes() -> None:
    """The positions of an image are no constant: of one number of channels, all sizes of the VAE are the same two kernels."""
    with launch.recording(90) as variants:
        for side in (512, 640, 768, 1024):
            x = torch.empty(1, 128, side, side, dtype=torch.float16, device="meta").to(
                memory_format=torch.channels_last
            )
            result = group_norm_silu(x, None, None, 32, EPS, True)
            assert result.shape == x.shape
            assert result.stride() == x.stride()
    assert [variant.kernel for variant in variants] == ["group_norm.moments", "group_norm.normalize"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(4)}, ValueError, r"x has shape \(4,\), expected \(N, C, \*spatial\)"),
        ({0: torch.zeros(2, 4, 3).double()}, TypeError, "x is torch.float64, expected float32"),
        ({3: 3}, ValueError, "4 channels cannot be split into 3 groups"),
        ({3: 0}, ValueError, "4 channels cannot be split into 0 groups"),
        ({1: torch.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        ({2: torch.zeros(1, 4)}, ValueError, r"bias has shape \(1, 4\), expected \(4,\)"),
        ({6: torch.zeros(4)}, ValueError, r"shift has shape \(4,\), expected \(2, 4\)"),
        ({6: torch.zeros(2, 4, device="meta")}, ValueError, "shift is on meta, expected cpu as x"),
        ({7: torch.zeros(2, 4)}, ValueError, r"x_bias has shape \(2, 4\), expected \(4,\)"),
        ({7: torch.zeros(4, device="meta")}, ValueError, "x_bias is on meta, expected cpu as x"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Any], error: type[Exception], message: str) -> None:
    given = arguments((2, 4, 3), 2)
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        group_norm_silu(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("rows", "channels", "side", "dtype"),
    [
        (2, 320, 64, torch.float16),
        (16, 960, 32, torch.float16),
        (2, 640, 96, torch.bfloat16),
        (2, 1920, 16, torch.float16),
        (1, 2560, 8, torch.bfloat16),
        (1, 1280, 12, torch.float32),
        (1, 512, 64, torch.float32),
        (1, 512, 128, torch.float16),
        (1, 128, 512, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_real_sizes_on_a_gpu(channels_last: bool, rows: int, channels: int, side: int, dtype: torch.dtype) -> None:
    """Some of each kind; benchmarks/gpu.py checks them all."""
    given = arguments((rows, channels, side, side), 32, dtype=dtype, device="cuda", channels_last=channels_last)
    oracle = expected(given)
    assert_right(group_norm_silu(*given), given, oracle=oracle)
    assert_right(group_norm_silu_reference(*given), given, oracle=oracle)
    arch = launch.architecture(given[0].device)
    for chosen in candidates(arch, rows, channels, 32, side * side, dtype.itemsize, channels_last=channels_last)[1:]:
        assert_right(group_norm_silu_triton(*given, chosen=chosen), given, oracle=oracle)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SMALL)
def test_small_on_a_gpu(shape: tuple[int, ...], groups: int, channels_last: bool) -> None:
    for dtype in DTYPES:
        given = arguments(shape, groups, dtype=dtype, device="cuda", channels_last=channels_last)
        assert_right(group_norm_silu(*given), given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [16, 512])
def test_large_offset_and_poison_on_a_gpu(side: int, channels_last: bool) -> None:
    given = arguments((2, 128, side, side), 32, device="cuda", channels_last=channels_last, offset=1000.0)
    assert_right(group_norm_silu(*given), given, 2 * 2.0**-23 * 1000)
    check_poison(group_norm_silu, given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("side", [16, 256])
def test_captured_in_a_cuda_graph(side: int) -> None:
    given = arguments((2, 320, side, side), 32, dtype=torch.float16, device="cuda", channels_last=True)
    expected_result = group_norm_silu(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    x = given[0].clone()
    given[0].zero_()
    with torch.cuda.graph(graph):
        result = group_norm_silu(*given)
    given[0].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected_result)
