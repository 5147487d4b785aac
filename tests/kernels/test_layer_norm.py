"""add_layer_norm against float64: the reference everywhere, the Triton body in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch, native
from ldmrt.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_native,
    add_layer_norm_reference,
    add_layer_norm_triton,
    candidates,
)
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded, assert_rounded_once

Body = Callable[..., tuple[Tensor, Tensor]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BODIES = [
    pytest.param(add_layer_norm_reference, id="reference"),
    pytest.param(add_layer_norm_triton, id="triton", marks=pytest.mark.interpreted),
    *at_levels(add_layer_norm_native),
]

SHAPES = [(1, 1), (3, 2), (2, 5, 37), (7, 320), (2, 1, 64), (5, 768), (1, 1280)]
# Pixels of SD1.5 and SDXL, and the text encoders; benchmarks/gpu.py checks all sizes.
REAL_SHAPES = [(2, 4096, 320), (16, 256, 1280), (2, 77, 768), (4, 154, 2048)]
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", offset: float = 0.0) -> list[Any]:
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight, bias = (random(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return [x + offset, residual, 1 + 0.2 * weight, bias, EPS, random(shape[-1], dtype=dtype, device=device, seed=4)]


def assert_right(found: tuple[Tensor, Tensor], given: list[Any], error: float = 4e-6) -> None:
    """The total is the sum in float32, rounded once. Its norm is within `error` times (|norm| + 1) |weight|, before rounding.

    4e-6: sums of up to 2048 float32 numbers, a reciprocal square root and three more operations, at 2^-24 or 2^-22 each; what
    the mean is off by is relative to the standard deviation, hence the 1.
    """
    x, residual, weight, bias, eps, x_bias = [
        value.cpu().double() if isinstance(value, Tensor) else value for value in given
    ]
    total, normed = found
    for result in found:
        assert result.dtype == given[0].dtype
        assert result.is_contiguous()
    terms = [x, *(each.expand(x.shape) for each in (residual, x_bias) if each is not None)]
    in_float32 = terms[0].float()
    for term in terms[1:]:
        in_float32 = in_float32 + term.float()
    assert_rounded_once(total.cpu(), in_float32)
    # Float32 rounds the first sum and the second, relative to the terms: they may cancel.
    exact = torch.stack(terms)
    assert_rounded(total, exact.sum(0), 2 * HALF_UNIT[torch.float32] * exact.abs().sum(0))
    stored = total.cpu().double()
    centred = stored - stored.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    scale = torch.ones(()).double() if weight is None else weight
    shift = torch.zeros(()).double() if bias is None else bias
    expected = norm * scale + shift
    assert_rounded(normed, expected, error * ((norm.abs() + 1) * scale.abs() + shift.abs()))


def check_poison(body: Body) -> None:
    given = arguments((4, 37), torch.float32)
    expected = body(*given)
    given[0][1, 5], given[1][2, 6] = torch.nan, torch.inf
    total, normed = body(*given)
    assert normed[1].isnan().all()
    assert normed[2].isnan().all()
    assert total[1, 5].isnan()
    assert total[2, 6].isinf()
    for found, before in ((total, expected[0]), (normed, expected[1])):
        assert torch.equal(found[0], before[0])
        assert torch.equal(found[3], before[3])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(body: Body, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "left_out", [(1,), (2,), (3,), (5,), (1, 5), (2, 3), (1, 2, 3), (2, 3, 5), (1, 2, 3, 5)], ids=str
)
def test_what_may_be_left_out(body: Body, left_out: tuple[int, ...], dtype: torch.dtype) -> None:
    given = arguments((3, 20), dtype)
    for position in left_out:
        given[position] = None
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
def test_weights_of_another_dtype(body: Body) -> None:
    given = arguments((3, 20), torch.float16)
    given[2], given[3], given[5] = given[2].float(), given[3].bfloat16(), random(20, dtype=torch.float32, seed=5)
    assert_right(body(*given), given)


@pytest.mark.parametrize("body", BODIES)
def test_large_offset(body: Body) -> None:
    """A float32 number near 1000 is rounded by up to 3e-5, so is the mean; a sum of squares would be off by 0.1 and more."""
    given = arguments((5, 640), torch.float32, offset=1000.0)
    assert_right(body(*given), given, error=1e-4)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_eps_bounds_a_constant_row(body: Body, eps: float) -> None:
    """A row with a deviation of about 1e-3: eps of 1e-5 and 1e-2 shrink it to a third and to a hundredth."""
    given = arguments((3, 64), torch.float32)
    given[0], given[1], given[4], given[5] = 1e-3 * given[0], torch.zeros_like(given[1]), eps, None
    assert_right(body(*given), given)
    given[0] = torch.full_like(given[0], 3.0)
    assert_right(body(*given), given)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("body", BODIES)
def test_poison_stays_in_its_row(body: Body) -> None:
    check_poison(body)


@pytest.mark.parametrize("body", BODIES)
def test_inputs_that_are_not_contiguous(body: Body) -> None:
    given = arguments((4, 6, 20), torch.float32)
    given[0] = given[0].transpose(0, 1).contiguous().transpose(0, 1)
    given[1] = torch.cat([given[1], given[1]], -1)[..., 7:27]
    given[2] = given[2].repeat_interleave(2)[::2]
    given[5] = given[5].repeat_interleave(2)[::2]
    assert_right(body(*given), given)
    given[1] = None
    assert_right(body(*given), given)


@pytest.mark.interpreted
def test_every_candidate_is_right() -> None:
    given = arguments((9, 320), torch.float16)
    for chosen in candidates(90, 9, 320):
        assert_right(add_layer_norm_triton(*given, chosen=chosen), given)


def test_the_operator_on_a_cpu() -> None:
    body = add_layer_norm_native if native.available() else add_layer_norm_reference
    given = arguments((2, 3, 10), torch.bfloat16)
    for found, expected in zip(add_layer_norm(*given), body(*given), strict=True):
        assert torch.equal(found, expected)
    empty = torch.empty(0, 4)
    assert [result.shape for result in add_layer_norm(empty, empty, None, None, EPS)] == [(0, 4), (0, 4)]


def test_one_kernel_serves_every_number_of_rows() -> None:
    weight = torch.empty(320, dtype=torch.float16, device="meta")
    with launch.recording(90) as variants:
        for rows in (2048, 4096, 65536):
            x = torch.empty(rows, 320, dtype=torch.float16, device="meta")
            total, normed = add_layer_norm(x, x, weight, weight, EPS)
            assert total.shape == normed.shape == x.shape
    assert [variant.kernel for variant in variants] == ["layer_norm.forward"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(())}, ValueError, r"x has shape \(\), expected \(\.\.\., C\)"),
        ({0: torch.zeros(2, 4).double()}, TypeError, "x is torch.float64, expected float32"),
        ({1: torch.zeros(2, 4).half()}, TypeError, "residual is torch.float16, expected torch.float32 as x"),
        ({1: torch.zeros(3, 4)}, ValueError, r"residual has shape \(3, 4\), expected \(2, 4\)"),
        ({2: torch.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        ({3: torch.zeros(1, 4)}, ValueError, r"bias has shape \(1, 4\), expected \(4,\)"),
        ({3: torch.zeros(4, device="meta")}, ValueError, "bias is on meta, expected cpu as x"),
        ({5: torch.zeros(2, 4)}, ValueError, r"x_bias has shape \(2, 4\), expected \(4,\)"),
        ({5: torch.zeros(4, device="meta")}, ValueError, "x_bias is on meta, expected cpu as x"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Tensor], error: type[Exception], message: str) -> None:
    given = arguments((2, 4), torch.float32)
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        add_layer_norm(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *[(shape, torch.float16) for shape in [*SHAPES, *REAL_SHAPES]],
        *[(shape, dtype) for shape in SHAPES[2:4] for dtype in DTYPES[:2]],
    ],
)
def test_on_a_gpu_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = arguments(shape, dtype, "cuda")
    width = shape[-1]
    for left_out in ((), (1,), (5,)):
        some: list[Any] = [None if position in left_out else value for position, value in enumerate(given)]
        assert_right(add_layer_norm(*some), some)
        assert_right(add_layer_norm_reference(*some), some)
        for chosen in candidates(launch.architecture(given[0].device), given[0].numel() // width, width):
            assert_right(add_layer_norm_triton(*some, chosen=chosen), some)


@pytest.mark.gpu
@needs_gpu
def test_large_offset_and_poison_on_a_gpu() -> None:
    given = arguments((5, 640), torch.float32, "cuda", offset=1000.0)
    assert_right(add_layer_norm(*given), given, error=1e-4)

    def on_the_gpu(*given: Any) -> tuple[Tensor, Tensor]:
        moved: list[Any] = [value.cuda() if isinstance(value, Tensor) else value for value in given]
        total, normed = add_layer_norm_triton(*moved)
        return total.cpu(), normed.cpu()

    check_poison(on_the_gpu)
