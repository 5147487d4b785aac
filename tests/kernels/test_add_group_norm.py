"""add_group_norm_silu against float64: the reference everywhere, the Triton bodies in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch, native
from ldmrt.kernels.add_group_norm import (
    OPERATOR,
    Problem,
    add_group_norm_silu,
    add_group_norm_silu_native,
    add_group_norm_silu_reference,
    add_group_norm_silu_triton,
)
from ldmrt.kernels.group_norm import Configuration, group_norm_silu
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded, assert_rounded_once

Body = Callable[..., tuple[Tensor, Tensor]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# In the interpreter numpy warns of NaN, and of exp(-y) for elements that a mask leaves out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
EPS = 1e-5

# x's shape, channels joined behind it, and groups. One element; a group that begins in x and ends in what is joined, with odd sides,
# few and many channels, three dimensions, five, two; a boundary between two groups; most of the channels joined; nothing joined.
SMALL = [
    ((1, 1, 1, 1), 0, 1),
    ((1, 6, 5, 7), 0, 2),
    ((3, 10, 9, 3), 5, 5),
    ((2, 24, 8, 8), 16, 4),
    ((2, 40, 6, 5), 40, 4),
    ((2, 5, 33), 7, 3),
    ((2, 3, 3, 4, 5), 5, 4),
    ((3, 10), 11, 7),
    ((2, 1, 3, 2), 11, 3),
]
# The joins on SD1.5's and SDXL's way up, and the sums of all levels and of the VAE; of the first join the boundary falls into a group.
REAL_SIZES = [
    ((2, 640, 64, 64), 320, torch.float16),
    ((2, 1280, 32, 32), 640, torch.float16),
    ((2, 1280, 8, 8), 1280, torch.bfloat16),
    ((16, 320, 32, 32), 320, torch.float16),
    ((2, 320, 64, 64), 0, torch.float16),
    ((2, 1280, 16, 16), 0, torch.bfloat16),
    ((1, 512, 64, 64), 0, torch.float32),
    ((1, 128, 256, 256), 0, torch.float16),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def turned(tensor: Tensor) -> Tensor:
    """The tensor channels last."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _power_of_two(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(number)))


def fused(*given: Any) -> tuple[Tensor, Tensor]:
    """The Triton body that reads once; a program has all groups if channels are last, else one."""
    tile = _power_of_two(given[0].shape[2:].numel())
    block = 1 if given[0].is_contiguous() else given[5]
    return add_group_norm_silu_triton(*given, chosen=Configuration(block, 1, tile, num_warps=4))


def whole(*given: Any) -> tuple[Tensor, Tensor]:
    """The two Triton bodies for large groups, with two splits of one tile."""
    tile = _power_of_two(given[0].shape[2:].numel() / 2)
    return add_group_norm_silu_triton(*given, chosen=Configuration(given[5], 2, tile, num_warps=4))


def looped(*given: Any) -> tuple[Tensor, Tensor]:
    """The same with two splits of several tiles, if there are several positions."""
    tile = _power_of_two(given[0].shape[2:].numel() / 8)
    return add_group_norm_silu_triton(*given, chosen=Configuration(given[5], 2, tile, num_warps=4))


BODIES = [
    pytest.param(add_group_norm_silu_reference, id="reference"),
    pytest.param(fused, id="fused", marks=pytest.mark.interpreted),
    pytest.param(whole, id="whole", marks=pytest.mark.interpreted),
    pytest.param(looped, id="looped", marks=pytest.mark.interpreted),
    *at_levels(add_group_norm_silu_native),
]


def arguments(
    shape: tuple[int, ...],
    rest: int,
    groups: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    channels_last: bool = False,
    offset: float = 0.0,
) -> list[Any]:
    """All there is: x, residual, joined (None without channels), weight, bias, groups, eps, silu and x_bias."""
    rows, width, *sides = shape
    channels = width + rest

    def picture(count: int, seed: int) -> Tensor:
        # Channels of different means and deviations, so that a mistake in who belongs to which group shows.
        scale = (1 + torch.arange(count, device=device) % 3).view(-1, *[1] * len(sides))
        made = (random(rows, count, *sides, device=device, seed=seed) * scale + 0.2 * scale + offset).to(dtype)
        return turned(made) if channels_last else made

    x, residual, joined = picture(width, 0), picture(width, 1) - offset, picture(rest, 2) if rest else None
    weight = 1 + 0.2 * random(channels, dtype=dtype, device=device, seed=3)
    bias, x_bias = (0.5 * random(count, dtype=dtype, device=device, seed=count) for count in (channels, width))
    return [x, residual, joined, weight, bias, groups, EPS, True, x_bias]


def sums(given: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The total in float32; in float64; and the sum of the terms' sizes, in float64."""
    x, residual, joined, *_, x_bias = given
    terms = [x] + [residual] * (residual is not None)
    if x_bias is not None:
        terms.append(x_bias.view(-1, *[1] * (x.dim() - 2)).expand(x.shape))
    total = x.float()
    for term in terms[1:]:
        total = total + term.float()
    exact = torch.stack([term.double() for term in terms])
    parts = [(total, exact.sum(0), exact.abs().sum(0))]
    if joined is not None:
        parts.append((joined.float(), joined.double(), joined.double().abs()))
    first, second, third = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    return first, second, third


def norm_of(total: Tensor, given: list[Any]) -> tuple[Tensor, Tensor]:
    """In float64, of a total: the second result, and to what its errors are relative (tests/kernels/test_group_norm.py)."""
    weight, bias, groups, eps, silu = given[3:8]
    across = [1] * (total.dim() - 2)
    value = total.double().reshape(total.shape[0], groups, -1)
    value = value - value.mean(-1, keepdim=True)
    norm = (value / (value.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(total.shape)
    weight = norm.new_ones(()) if weight is None else weight.double().reshape(-1, *across)
    bias = norm.new_zeros(()) if bias is None else bias.double().reshape(-1, *across)
    result = norm * weight + bias
    scale = (norm.abs() + 1) * weight.abs() + bias.abs()
    return (result * result.sigmoid() if silu else result), scale


def assert_right(found: tuple[Tensor, Tensor], given: list[Any], error: float = 4e-6) -> None:
    """The total is the sum in float32, rounded once; the norm is that of the total as it is stored, within `error` before rounding.

    4e-6 as for group_norm_silu: a dozen roundings in float32 and the approximations of a GPU's reciprocal square root and
    exponential. The sum in float32 is off by two roundings, relative to the terms, of which two may cancel.
    """
    x = given[0]
    total, normed = found
    for result in found:
        assert result.dtype == x.dtype
        assert result.is_contiguous() if x.is_contiguous() else result.movedim(1, -1).is_contiguous()
    in_float32, exact, sizes = sums(given)
    assert_rounded_once(total, in_float32)
    assert_rounded(total, exact, 2 * HALF_UNIT[torch.float32] * sizes)
    expected, scale = norm_of(total, given)
    assert_rounded(normed, expected, error * scale)


def check_poison(body: Body, given: list[Any]) -> None:
    """A NaN or infinity in x, residual or joined makes its row's group NaN, and no other element of either result changes.

    Groups of 10 channels: of x the first 24, of what is joined the rest.
    """
    before = body(*given)
    x, residual, joined, *_ = given
    x[0, 3, -1, 0], residual[1, 12, 0, -1], joined[2, 1, 0, 0], joined[0, 15, 0, 0] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
    )
    total, normed = body(*given)
    poisoned = torch.zeros_like(total, dtype=torch.bool)
    groups = torch.zeros_like(poisoned)
    for row, channel, place in ((0, 3, (-1, 0)), (1, 12, (0, -1)), (2, 25, (0, 0)), (0, 39, (0, 0))):
        poisoned[row, channel, *place] = True
        groups[row, channel // 10 * 10 : channel // 10 * 10 + 10] = True
    assert total[0, 3, -1, 0].isnan()
    assert total[1, 12, 0, -1] == torch.inf
    assert total[2, 25, 0, 0].isnan()
    assert total[0, 39, 0, 0] == -torch.inf
    assert torch.equal(total[~poisoned], before[0][~poisoned])
    assert normed[groups].isnan().all()
    assert torch.equal(normed[~groups], before[1][~groups])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "rest", "groups", "dtype"),
    [*[(*small, torch.float32) for small in SMALL], *[((3, 10, 9, 3), 5, 5, dtype) for dtype in DTYPES[1:]]],
)
def test_against_float64(
    body: Body, shape: tuple[int, ...], rest: int, groups: int, channels_last: bool, dtype: torch.dtype
) -> None:
    given = arguments(shape, rest, groups, dtype=dtype, channels_last=channels_last)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", at_levels(add_group_norm_silu_native))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [(), (1,), (8,), (1, 8), (3, 4)], ids=str)
@pytest.mark.parametrize(("width", "rest", "groups"), [(48, 16, 4), (64, 0, 8), (80, 144, 7), (16, 64, 10)])
def test_channels_that_are_whole_vectors(
    body: Body, width: int, rest: int, groups: int, left_out: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Sums that stay in registers: of four vectors and of one, over several runs of positions, parts that are not whole."""
    given = arguments((2, width, 15, 11), rest, groups, dtype=dtype, channels_last=True)
    given[7] = dtype == torch.float32
    for place in left_out:
        given[place] = None
    assert_right(body(*given), given)


# By their places: each alone, each but one, all.
OPTIONAL = (1, 2, 3, 4, 8)
LEFT_OUT = [
    *[(place,) for place in OPTIONAL],
    *[tuple(other for other in OPTIONAL if other != place) for place in OPTIONAL],
    OPTIONAL,
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=str)
def test_what_may_be_left_out(body: Body, left_out: tuple[int, ...]) -> None:
    for silu, dtype in ((True, torch.float32), (False, torch.float16)):
        given = arguments((2, 14, 3, 5), 10, 3, channels_last=silu, dtype=dtype)
        if 2 in left_out:
            given[3], given[4], given[5] = given[3][:14], given[4][:14], 2
        given[7] = silu
        for place in left_out:
            given[place] = None
        before = [value.clone() if isinstance(value, Tensor) else value for value in given]
        total, normed = body(*given)
        assert_right((total, normed), given)
        # No result is an input, nor are the two one: writing to one changes nothing else.
        after = normed.clone()
        total.fill_(7)
        assert torch.equal(normed, after)
        normed.fill_(8)
        assert (total == 7).all()
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("body", BODIES)
def test_what_is_normed_is_the_total_as_it_is_stored(body: Body) -> None:
    """Numbers near 1000 are 0.5 apart in float16: the norm of the sum before that rounding is far from right nearly everywhere."""
    given = arguments((2, 24, 4, 5), 0, 3, dtype=torch.float16, offset=1000.0)
    given[7] = False
    total, normed = body(*given)
    error = 2 * 2.0**-23 * 1000
    assert_right((total, normed), given, error)
    exact, scale = norm_of(sums(given)[1], given)
    bound = HALF_UNIT[torch.float16] * (exact.abs() + error * scale) + error * scale
    assert ((normed.double() - exact).abs() > 4 * bound).float().mean() > 0.8


@pytest.mark.interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("block", [1, 6])
@pytest.mark.parametrize(("splits", "tile"), [(1, 128), (2, 64), (2, 16), (8, 16), (8, 32)])
def test_triton_however_it_is_split(splits: int, tile: int, block: int, channels_last: bool) -> None:
    """117 positions: the last tile is not whole, some elements of a tile have one number less, some splits have none."""
    given = arguments((1, 37, 9, 13), 23, 6, channels_last=channels_last)
    chosen = Configuration(block, splits, tile, num_warps=4)
    assert_right(add_group_norm_silu_triton(*given, chosen=chosen), given)


@pytest.mark.interpreted
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_candidate_is_right(channels_last: bool) -> None:
    given = arguments((1, 24, 16, 18), 16, 4, dtype=torch.float16, channels_last=channels_last)
    problem = Problem(256, 40, 4, 16 * 18, 24, True, torch.float16, channels_last)
    plans = OPERATOR.candidates(90, problem)
    assert {plan.splits == 1 for plan in plans} == {True, False}
    for chosen in plans:
        assert_right(add_group_norm_silu_triton(*given, chosen=chosen), given)


@pytest.mark.interpreted
def test_the_default_is_right() -> None:
    given = arguments((2, 14, 6, 10), 10, 3, dtype=torch.float16, channels_last=True)
    assert_right(add_group_norm_silu_triton(*given), given)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [1000.0, -3e4])
def test_large_offset(body: Body, offset: float, channels_last: bool) -> None:
    """As for group_norm_silu: numbers near 1000 are 6e-5 apart in float32, those near 30,000 2e-3: no mean can be better than that."""
    given = arguments((2, 14, 8, 6), 10, 3, channels_last=channels_last, offset=offset)
    assert_right(body(*given), given, 2 * 2.0**-23 * abs(offset))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_poison_stays_in_its_group(body: Body, channels_last: bool) -> None:
    check_poison(body, arguments((3, 24, 8, 9), 16, 4, channels_last=channels_last))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("x_last", [False, True])
def test_inputs_of_several_layouts(body: Body, x_last: bool) -> None:
    """The results follow x, whatever the others are: the other order, a part of a wider tensor, every other element."""
    given = arguments((2, 14, 4, 6), 10, 3, channels_last=x_last)
    expected = body(*given)
    residual, joined = given[1], given[2]
    for other, behind in (
        (residual.contiguous(), turned(joined)),
        (turned(residual), joined.contiguous()),
        (torch.cat([residual] * 2, 1)[:, 14:], joined.repeat_interleave(2, 3)[..., ::2]),
    ):
        found = body(given[0], other, behind, *given[3:])
        assert found[0].stride() == found[1].stride() == expected[0].stride()
        for each, same in zip(found, expected, strict=True):
            assert torch.equal(each, same)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("with_others", [True, False])
def test_an_x_that_is_in_neither_order(body: Body, with_others: bool) -> None:
    """Width before height; a part of the channels of a wider tensor; every other element: the results are channels last."""
    given = arguments((2, 14, 4, 6), 10, 3)
    if not with_others:
        given[1], given[2], given[3], given[4], given[5], given[8] = None, None, None, None, 2, None
    x = given[0]
    for odd in (
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x] * 2, 1)[:, 3:17],
        x.repeat_interleave(2, 3)[..., ::2],
    ):
        assert_right(body(odd, *given[1:]), [odd, *given[1:]])


@pytest.mark.parametrize("body", BODIES)
def test_vectors_with_strides_and_of_other_dtypes(body: Body) -> None:
    given = arguments((2, 14, 4, 6), 10, 3, dtype=torch.float16)
    given[3] = given[3].float().repeat_interleave(2)[::2]
    given[4] = given[4].bfloat16()
    given[8] = random(28, seed=9)[::2]
    assert_right(body(*given), given)


@pytest.mark.parametrize(("width", "rest", "side"), [(640, 320, 32), (1280, 1280, 8), (128, 0, 256)])
def test_reference_at_full_size(width: int, rest: int, side: int) -> None:
    given = arguments((1, width, side, side), rest, 32, dtype=torch.float16, channels_last=True)
    assert_right(add_group_norm_silu_reference(*given), given)


def test_the_operator_on_a_cpu() -> None:
    body = add_group_norm_silu_native if native.available() else add_group_norm_silu_reference
    given = arguments((2, 14, 4, 6), 10, 3, dtype=torch.bfloat16)
    for found, expected in zip(add_group_norm_silu(*given), body(*given), strict=True):
        assert torch.equal(found, expected)
    empty, behind = torch.empty(0, 4, 3), torch.empty(0, 2, 3)
    results = add_group_norm_silu(empty, empty, behind, None, None, 2, EPS, False)
    assert [result.shape for result in results] == [(0, 6, 3), (0, 6, 3)]


def test_few_kernels_serve_all_sizes() -> None:
    """Positions are no constant: of one number of channels, all sizes of the VAE are the same two kernels.

    The second of them is the one that a norm of nothing but x has, too.
    """
    sides = (512, 640, 768, 1024)
    pictures = [torch.empty(1, 128, side, side, dtype=torch.float16, device="meta") for side in sides]
    pictures = [picture.to(memory_format=torch.channels_last) for picture in pictures]
    with launch.recording(90) as alone:
        for x in pictures:
            group_norm_silu(x, None, None, 32, EPS, True)
    with launch.recording(90) as variants:
        for x in pictures:
            for result in add_group_norm_silu(x, x, None, None, None, 32, EPS, True):
                assert result.shape == x.shape
                assert result.stride() == x.stride()
    (moments, normalize), (_, other) = variants, alone
    assert (moments.kernel, normalize.kernel) == ("group_norm.moments", "group_norm.normalize")
    assert normalize == other


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(4)}, ValueError, r"x has shape \(4,\), expected \(N, W, \*spatial\)"),
        ({0: torch.zeros(2, 4, 3).double()}, TypeError, "x is torch.float64, expected float32"),
        ({5: 4}, ValueError, "6 channels cannot be split into 4 groups"),
        ({5: 0}, ValueError, "6 channels cannot be split into 0 groups"),
        ({1: torch.zeros(2, 6, 3)}, ValueError, r"residual has shape \(2, 6, 3\), expected \(2, 4, 3\)"),
        ({1: torch.zeros(2, 4, 3).half()}, TypeError, "residual is torch.float16, expected torch.float32 as x"),
        ({2: torch.zeros(2, 2, 5)}, ValueError, r"joined has shape \(2, 2, 5\), expected \(2, 2, 3\)"),
        ({2: torch.zeros(3, 2, 3)}, ValueError, r"joined has shape \(3, 2, 3\), expected \(2, 2, 3\)"),
        ({2: torch.zeros(2, 2, 3).bfloat16()}, TypeError, "joined is torch.bfloat16, expected torch.float32 as x"),
        ({2: torch.zeros(2, 2, 3, device="meta")}, ValueError, "joined is on meta, expected cpu as x"),
        ({3: torch.zeros(4)}, ValueError, r"weight has shape \(4,\), expected \(6,\)"),
        ({4: torch.zeros(1, 6)}, ValueError, r"bias has shape \(1, 6\), expected \(6,\)"),
        ({8: torch.zeros(6)}, ValueError, r"x_bias has shape \(6,\), expected \(4,\)"),
        ({8: torch.zeros(4, device="meta")}, ValueError, "x_bias is on meta, expected cpu as x"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Any], error: type[Exception], message: str) -> None:
    given = arguments((2, 4, 3), 2, 2)
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        add_group_norm_silu(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("shape", "rest", "dtype"), REAL_SIZES, ids=str)
def test_real_sizes_on_a_gpu(shape: tuple[int, ...], rest: int, dtype: torch.dtype) -> None:
    given = arguments(shape, rest, 32, dtype=dtype, device="cuda", channels_last=True)
    _check_on_a_gpu(given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "rest", "groups"), SMALL[2:], ids=str)
def test_small_on_a_gpu(shape: tuple[int, ...], rest: int, groups: int, channels_last: bool) -> None:
    for dtype in DTYPES:
        given = arguments(shape, rest, groups, dtype=dtype, device="cuda", channels_last=channels_last)
        _check_on_a_gpu(given)


def _check_on_a_gpu(given: list[Any]) -> None:
    x, residual, joined, *_ = given
    found = add_group_norm_silu(*given)
    assert_right(found, given)
    assert_right(add_group_norm_silu_reference(*given), given)
    channels_last = not x.is_contiguous()
    channels = x.shape[1] + (0 if joined is None else joined.shape[1])
    spatial = x.shape[2:].numel()
    problem = Problem(x.shape[0], channels, given[5], spatial, x.shape[1], residual is not None, x.dtype, channels_last)
    for chosen in OPERATOR.candidates(launch.architecture(x.device), problem)[1:]:
        assert_right(add_group_norm_silu_triton(*given, chosen=chosen), given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("side", [8, 256])
def test_poison_on_a_gpu(side: int) -> None:
    check_poison(add_group_norm_silu, arguments((3, 24, side, side), 16, 4, device="cuda", channels_last=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("side", [16, 256])
def test_captured_in_a_cuda_graph(side: int) -> None:
    given = arguments((2, 320, side, side), 320, 32, dtype=torch.float16, device="cuda", channels_last=True)
    expected = add_group_norm_silu(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    x = given[0].clone()
    given[0].zero_()
    with torch.cuda.graph(graph):
        found = add_group_norm_silu(*given)
    given[0].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    for result, same in zip(found, expected, strict=True):
        assert torch.equal(result, same)
