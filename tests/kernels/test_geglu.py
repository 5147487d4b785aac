"""geglu against float64: the reference everywhere, the Triton body in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch, native
from ldmrt.kernels.geglu import candidates, geglu, geglu_native, geglu_reference, geglu_triton
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded

Body = Callable[..., Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# One column; a block of columns with a remainder; widths that 64, 128 and 512 divide; rows with a remainder.
SHAPES = [(3, 2), (2, 5, 2 * 37), (1, 2 * 512), (7, 2 * 320), (5, 2 * 100), (3, 2 * 640)]
# Pixels of SD1.5 and SDXL; benchmarks/gpu.py checks all sizes.
REAL_SHAPES = [(2, 4096, 2 * 1280), (16, 256, 2 * 5120), (1, 1024, 2 * 2560)]
BODIES = [
    pytest.param(geglu_reference, id="reference"),
    pytest.param(geglu_triton, id="triton", marks=pytest.mark.interpreted),
    *at_levels(geglu_native),
]


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def assert_right(found: Tensor, x: Tensor, x_bias: Tensor | None = None) -> None:
    """Within 1e-6 of |value| (|gate| + 1): the error function is good to about 2^-22 of 1, whether by torch, CUDA or C.

    Far below zero the GELU is the product of the gate with a small difference from 1, hence an error relative to the gate.
    x + x_bias is rounded to float32, relative to terms that may cancel; the GELU, whose slope is below 1.2, passes that on.
    """
    value, gate = x.cpu().double().chunk(2, dim=-1)
    error: Tensor | float = 0.0
    if x_bias is not None:
        bias_value, bias_gate = x_bias.cpu().double().chunk(2, dim=-1)
        sizes = value.abs() + bias_value.abs(), gate.abs() + bias_gate.abs()
        value, gate = value + bias_value, gate + bias_gate
        error = 1.2 * HALF_UNIT[torch.float32] * (sizes[0] * gate.abs() + value.abs() * sizes[1])
    expected = value * 0.5 * gate * (1 + torch.special.erf(gate / math.sqrt(2)))
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert_rounded(found, expected, 1e-6 * value.abs() * (gate.abs() + 1) + error)


def check_poison(body: Body) -> None:
    x = random(3, 2 * 70, dtype=torch.float32)
    expected = body(x.clone())
    x[0, 3], x[1, 70 + 5], x[2, 4] = torch.nan, torch.nan, torch.inf
    found = body(x)
    assert found[0, 3].isnan()
    assert found[1, 5].isnan()
    assert found[2, 4].isinf()
    found[0, 3], found[1, 5], found[2, 4] = expected[0, 3], expected[1, 5], expected[2, 4]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(body: Body, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, x_bias = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    for added in (None, x_bias):
        assert_right(body(x, added), x, added)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype_with_a_stride(body: Body, dtype: torch.dtype) -> None:
    x, x_bias = random(5, 2 * 100, dtype=torch.float16), random(4 * 100, dtype=dtype, seed=1)[::2]
    assert_right(body(x, x_bias), x, x_bias)


@pytest.mark.parametrize("body", BODIES)
def test_the_bias_is_added_in_float32(body: Body) -> None:
    """Terms near 1000 that cancel: a bias rounded to float16 would be off by up to 0.25, which shows in the result."""
    x, x_bias = random(5, 2 * 64, dtype=torch.float16) + 1000, random(2 * 64, dtype=torch.float32, seed=1) - 1000
    assert_right(body(x, x_bias), x, x_bias)
    rounded = geglu_reference(x, x_bias.half()).float()
    assert ((rounded - geglu_reference(x.float(), x_bias)).abs() > 0.05).float().mean() > 0.2


def test_the_operator_on_a_cpu() -> None:
    body = geglu_native if native.available() else geglu_reference
    x, x_bias = random(1, 64, 2 * 1280, dtype=torch.bfloat16), random(2 * 1280, dtype=torch.bfloat16, seed=1)
    assert torch.equal(geglu(x), body(x))
    assert torch.equal(geglu(x, x_bias), body(x, x_bias))


@pytest.mark.interpreted
def test_every_candidate_is_right() -> None:
    x, x_bias = random(9, 2 * 320, dtype=torch.float16), random(2 * 320, dtype=torch.float16, seed=1)
    for chosen in candidates(90, 9, 320, 2):
        for added in (None, x_bias):
            assert_right(geglu_triton(x, added, chosen=chosen), x, added)


@pytest.mark.parametrize("body", BODIES)
def test_poison_stays_where_it_is(body: Body) -> None:
    check_poison(body)


@pytest.mark.parametrize("body", BODIES)
def test_a_slice_of_a_wider_tensor(body: Body) -> None:
    wide = random(2, 5, 2 * 64 + 3, dtype=torch.float16)
    x = wide[..., 3:]
    assert_right(body(x), x)


def test_nothing_in_nothing_out() -> None:
    assert geglu(torch.empty(0, 5, 8)).shape == (0, 5, 4)
    assert geglu(torch.empty(2, 0)).shape == (2, 0)


def test_one_kernel_serves_every_number_of_rows() -> None:
    with launch.recording(90) as variants:
        for rows in (2048, 4096, 65536):
            assert geglu(torch.empty(rows, 2560, dtype=torch.float16, device="meta")).shape == (rows, 1280)
    assert [variant.kernel for variant in variants] == ["geglu.forward"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.zeros(2, 3),), ValueError, r"x has shape \(2, 3\), expected \(\.\.\., 2 I\)"),
        ((torch.zeros(()),), ValueError, r"x has shape \(\), expected"),
        ((torch.zeros(2, 4).double(),), TypeError, "x is torch.float64, expected float32, bfloat16 or float16"),
        ((torch.zeros(2, 4), torch.zeros(2)), ValueError, r"x_bias is \(2,\) on cpu, expected \(4,\) on cpu as x"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), ValueError, r"x_bias is \(2, 4\) on cpu, expected \(4,\) on cpu"),
        (
            (torch.zeros(2, 4), torch.zeros(4, device="meta")),
            ValueError,
            r"x_bias is \(4,\) on meta, expected \(4,\) on cpu",
        ),
    ],
)
def test_misuse_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *[(shape, torch.float16) for shape in [*SHAPES, *REAL_SHAPES]],
        *[(shape, dtype) for shape in SHAPES[1:3] for dtype in DTYPES[:2]],
    ],
)
def test_on_a_gpu_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, device="cuda")
    width, arch = shape[-1] // 2, launch.architecture(x.device)
    for x_bias in (None, random(shape[-1], dtype=dtype, device="cuda", seed=1)):
        assert_right(geglu(x, x_bias), x, x_bias)
        assert_right(geglu_reference(x, x_bias), x, x_bias)
        for chosen in candidates(arch, x.numel() // (2 * width), width, x.itemsize):
            assert_right(geglu_triton(x, x_bias, chosen=chosen), x, x_bias)


@pytest.mark.gpu
@needs_gpu
def test_poison_on_a_gpu() -> None:
    check_poison(lambda x: geglu_triton(x.cuda()).cpu())
