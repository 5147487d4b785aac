"""geglu against float64: the reference everywhere, the Triton body in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch
from ldmrt.kernels.geglu import candidates, geglu, geglu_reference, geglu_triton
from tests.kernels.oracle import DTYPES, assert_rounded

Body = Callable[[Tensor], Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# One column; a block of columns with a remainder; widths that 64, 128 and 512 divide; rows with a remainder.
SHAPES = [(3, 2), (2, 5, 2 * 37), (1, 2 * 512), (7, 2 * 320), (5, 2 * 100), (3, 2 * 640)]
# SD1.5, SD2.1 and SDXL at 64 x 64, 32 x 32 and 16 x 16 latents.
REAL_SHAPES = [(2, 4096, 2 * 1280), (2, 1024, 2 * 2560), (16, 256, 2 * 5120), (1, 4096, 2 * 2560), (3, 9216, 2 * 1280)]


def random(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def assert_right(found: Tensor, x: Tensor) -> None:
    """Within 1e-6 of |value| (|gate| + 1): the error function is good to about 2^-22 of 1, whether by torch, CUDA or C.

    Far below zero the GELU is the product of the gate with a small difference from 1, hence an error relative to the gate.
    """
    value, gate = x.cpu().double().chunk(2, dim=-1)
    expected = value * 0.5 * gate * (1 + torch.special.erf(gate / math.sqrt(2)))
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert_rounded(found, expected, 1e-6 * value.abs() * (gate.abs() + 1))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 64, 2 * 1280)])
def test_reference_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    assert_right(geglu_reference(x), x)
    assert torch.equal(geglu(x), geglu_reference(x))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    assert_right(geglu_triton(x), x)


@pytest.mark.interpreted
def test_every_candidate_is_right() -> None:
    x = random(9, 2 * 320, dtype=torch.float16)
    for chosen in candidates(90, 9, 320, 2):
        assert_right(geglu_triton(x, chosen=chosen), x)


@pytest.mark.parametrize(
    "body", [geglu_reference, pytest.param(geglu_triton, marks=pytest.mark.interpreted)], ids=["reference", "triton"]
)
def test_poison_stays_where_it_is(body: Body) -> None:
    check_poison(body)


@pytest.mark.parametrize(
    "body", [geglu_reference, pytest.param(geglu_triton, marks=pytest.mark.interpreted)], ids=["reference", "triton"]
)
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
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"x has shape \(2, 3\), expected \(\.\.\., 2 I\)"),
        (torch.zeros(()), ValueError, r"x has shape \(\), expected"),
        (torch.zeros(2, 4).double(), TypeError, "x is torch.float64, expected float32, bfloat16 or float16"),
    ],
)
def test_misuse_is_refused(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(x)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *REAL_SHAPES])
def test_on_a_gpu_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, device="cuda")
    width = shape[-1] // 2
    assert_right(geglu(x), x)
    assert_right(geglu_reference(x), x)
    arch = launch.architecture(x.device)
    for chosen in candidates(arch, x.numel() // (2 * width), width, x.itemsize):
        assert_right(geglu_triton(x, chosen=chosen), x)


@pytest.mark.gpu
@needs_gpu
def test_poison_on_a_gpu() -> None:
    check_poison(lambda x: geglu_triton(x.cuda()).cpu())
