"""linear_geglu against float64: the reference everywhere, the Triton body in the interpreter and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import launch, native, tuning
from ldmrt.kernels.linear import arranged_gated, is_packed
from ldmrt.kernels.linear_geglu import (
    Problem,
    Tiles,
    candidates,
    linear_geglu,
    linear_geglu_reference,
    linear_geglu_triton,
)
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded

pytestmark = [
    pytest.mark.usefixtures("bfloat16_in_the_interpreter"),
    # numpy warns of NaN there.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TILES = Tiles(32, 32, 32, 4, 2)
# Shape of x, and the width of the result. Rows that the blocks divide and rows that they do not; several blocks each way.
SHAPES = [((64, 32), 32), ((2, 25, 64), 32), ((3, 32), 96), ((1, 70, 96), 64)]


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(shape: tuple[int, ...], width: int, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
    inner = shape[-1]
    x = random(*shape, dtype=dtype, device=device)
    weight = (random(2 * width, inner, dtype=torch.float32, device=device, seed=1) / math.sqrt(inner)).to(dtype)
    return [x, weight, random(2 * width, dtype=dtype, device=device, seed=2)]


def assert_right(found: Tensor, given: list[Any], *, rounded_product: bool) -> None:
    """Within what float32 sums lose, 2^-24 of the sum of magnitudes for each term; and, if the product was rounded to the dtype
    before the gate, a rounding of each half.
    """
    exact: list[Any] = [None if value is None else value.double() for value in given]
    x, weight, bias = exact
    product, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    total = product if bias is None else product + bias
    error = (x.shape[-1] + 8) * HALF_UNIT[torch.float32] * magnitude
    if rounded_product:
        # The product alone, or with its bias: whichever the library rounds.
        error = error + HALF_UNIT[found.dtype] * torch.maximum(product.abs(), total.abs()) * 2
    value, gate = total.chunk(2, -1)
    value_error, gate_error = error.chunk(2, -1)
    gelu = gate * 0.5 * (1 + torch.special.erf(gate / math.sqrt(2)))
    # GELU's slope is at most 1.13.
    bound = (
        gelu.abs() * value_error
        + 1.13 * (value.abs() + value_error) * gate_error
        + 1e-6 * value.abs() * (gate.abs() + 1)
    )
    assert_rounded(found, value * gelu, bound)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "width"), [((1, 32), 16), ((2, 25, 64), 48), ((100, 1312), 32), ((600, 96), 160)])
def test_packed_weights(shape: tuple[int, ...], width: int, with_bias: bool) -> None:
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")
    given = arguments(shape, width, torch.bfloat16)
    given[2] = given[2] if with_bias else None
    arranged = arranged_gated(given[1])
    assert is_packed(arranged)
    assert_right(linear_geglu(given[0], arranged, given[2]), given, rounded_product=False)


def test_packed_weights_with_numbers_at_the_ends_of_gelu() -> None:
    """Gates far from zero, infinite and NaN."""
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")
    gates = torch.tensor([-math.inf, -300.0, -9.0, -6.0, -0.0, 0.0, 1e-30, 5.0, 300.0, math.inf, math.nan])
    x = torch.zeros(len(gates), 32, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, gates
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[:16, 0], weight[16:, 1] = 1.0, 1.0
    x[0, 0] = x[9, 0] = 1.0
    found = linear_geglu(x, arranged_gated(weight))[:, 0]
    # An infinite gate meets zeros of the weights on its way: NaN, as from any matrix product.
    finite = gates.isfinite()
    torch.testing.assert_close(found[finite].float(), torch.nn.functional.gelu(gates[finite]), rtol=2**-8, atol=1e-5)
    assert found[~finite].isnan().all()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_triton_against_float64(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    given = arguments(shape, width, dtype)
    found = linear_geglu_triton(*given, tiles=TILES)
    assert found.shape == (*shape[:-1], width)
    assert_right(found, given, rounded_product=False)


@pytest.mark.interpreted
def test_triton_without_a_bias_and_with_one_of_another_dtype() -> None:
    x, weight, bias = arguments((2, 25, 64), 32, torch.float16)
    for other in (None, bias.float(), bias.repeat_interleave(2)[::2]):
        given = [x, weight, other]
        assert_right(linear_geglu_triton(*given, tiles=TILES), given, rounded_product=False)


@pytest.mark.interpreted
def test_nan_and_infinity_stay_in_their_row() -> None:
    given = arguments((64, 32), 32, torch.float32)
    before = linear_geglu_triton(*given, tiles=TILES)
    given[0][3, 5], given[0][40, 0] = torch.nan, torch.inf
    found = linear_geglu_triton(*given, tiles=TILES)
    touched = torch.zeros(64, dtype=torch.bool)
    touched[[3, 40]] = True
    assert found[3].isnan().all()
    assert not found[40].isfinite().all()
    assert torch.equal(found[~touched], before[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "width"), [*SHAPES, ((2, 9, 37), 5), ((4,), 3)])
def test_on_a_cpu_against_float64(shape: tuple[int, ...], width: int, with_bias: bool, dtype: torch.dtype) -> None:
    given = arguments(shape, width, dtype)
    if not with_bias:
        given[2] = None
    for body in (linear_geglu_reference, linear_geglu):
        assert_right(body(*given), given, rounded_product=dtype != torch.float32)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 128, 8192])
@pytest.mark.parametrize(("inner", "width"), [(320, 1280), (640, 2560), (1280, 5120), (37, 5)])
def test_candidates_fit(arch: int, rows: int, inner: int, width: int) -> None:
    found = candidates(arch, Problem(rows, inner, width, torch.float16))
    assert any(choice.body == "library" for choice in found)
    for choice in found:
        if choice.body == "triton":
            assert width % choice.tiles.block_n == 0
            assert inner % choice.tiles.block_k == 0
    assert [choice.body for choice in candidates(arch, Problem(rows, inner, width, torch.float32))] == ["library"]


def test_what_is_launched_is_what_was_chosen() -> None:
    x, weight, bias = (value.to("meta") for value in arguments((2, 4096, 320), 1280, torch.float16))
    problem = Problem(8192, 320, 1280, torch.float16)
    for body, kernels in (("triton", ["linear_geglu.forward"]), ("library", ["geglu.forward"])):
        chosen = next(each for each in candidates(90, problem) if each.body == body)
        with launch.recording(90) as variants, tuning.trying("linear_geglu", 90, problem, chosen):
            result = linear_geglu(x, weight, bias)
        assert result.shape == (2, 4096, 1280)
        assert [variant.kernel for variant in variants] == kernels


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(2, 5)}, ValueError, r"x has shape \(2, 5\), weight \(6, 4\), expected"),
        ({1: torch.zeros(5, 4)}, ValueError, r"weight \(5, 4\), expected"),
        ({0: torch.zeros(2, 4).double()}, TypeError, "x is torch.float64, expected float32"),
        ({1: torch.zeros(6, 4).half()}, TypeError, "weight is torch.float16, expected torch.float32 as x"),
        ({2: torch.zeros(3)}, ValueError, r"bias has shape \(3,\), expected \(6,\)"),
        ({2: torch.zeros(6, device="meta")}, ValueError, "bias is on meta, expected cpu as x"),
    ],
)
def test_misuse_is_refused(changed: dict[int, Tensor], error: type[Exception], message: str) -> None:
    given: list[Any] = [torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(6)]
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(error, match=message):
        linear_geglu(*given)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("shape", "width"), [((2, 4096, 320), 1280), ((2, 1000, 640), 2560), ((2, 256, 1280), 5120), ((1, 77, 320), 1280)]
)
def test_on_a_gpu_against_float64(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    given = arguments(shape, width, dtype, "cuda")
    problem = Problem(math.prod(shape[:-1]), shape[-1], width, dtype)
    assert_right(linear_geglu(*given), given, rounded_product=True)
    for choice in candidates(launch.architecture(given[0].device), problem):
        if choice.body == "triton":
            assert_right(linear_geglu_triton(*given, tiles=choice.tiles), given, rounded_product=False)
