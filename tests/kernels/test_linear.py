"""linear against float64: the library's, and the body that reads packed weights, where the processor has AMX."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import native
from ldmrt.kernels.linear import PANEL, STEP, arranged_gated, arranged_linear, is_packed, linear, pack
from tests.kernels.oracle import HALF_UNIT, assert_rounded

BFLOAT16 = torch.bfloat16
# Rows, terms, columns: parts of a tile and of a pair of tiles, sums in one chunk and in several, more rows than a task has.
SIZES = [(1, 32, 32), (17, 64, 96), (33, 1312, 64), (100, 320, 320), (15, 11552, 64), (700, 96, 32), (513, 2560, 160)]


@pytest.fixture
def _packed() -> None:
    if not native.takes_packed():
        pytest.skip("this processor has no AMX")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_right(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within what float32 sums lose: 2^-24 of the sum of magnitudes for each term, whose products are exact."""
    x, weight = x.double(), weight.double()
    expected, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert_rounded(found, expected, (x.shape[-1] + 8) * HALF_UNIT[torch.float32] * magnitude)


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "out"), SIZES)
def test_packed_weights(rows: int, inner: int, out: int, with_bias: bool) -> None:
    x, weight = random(rows, inner), random(out, inner, seed=1)
    bias = random(out, seed=2, dtype=torch.float32) if with_bias else None
    arranged = arranged_linear(weight)
    assert is_packed(arranged)
    assert_right(linear(x, arranged, bias), x, weight, bias)


@pytest.mark.usefixtures("_packed")
def test_dimensions_and_strides() -> None:
    """Rows further apart than they are long, an odd start, a transposed picture, and no rows at all."""
    weight = random(64, 96, seed=1)
    arranged = arranged_linear(weight)
    wide = random(2, 21, 3 * 96 + 1)[..., 97:193]
    found = linear(wide, arranged)
    assert found.shape == (2, 21, 64)
    assert found.is_contiguous()
    assert_right(found, wide, weight)
    turned = random(2, 96, 21).transpose(1, 2)
    assert_right(linear(turned, arranged), turned, weight)
    assert linear(random(3, 0, 96), arranged).shape == (3, 0, 64)


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x, weight = random(40, 64), random(64, 64, seed=1)
    arranged = arranged_linear(weight)
    expected = linear(x, arranged)
    x[33, 5] = bad
    found = linear(x, arranged)
    assert not found[33].isfinite().any()
    found[33] = expected[33]
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("_packed")
def test_other_terms_are_refused() -> None:
    arranged = arranged_linear(random(32, 64))
    with pytest.raises(RuntimeError, match=r"linear: x is \(3, 32\) torch.bfloat16, expected \(..., 64\)"):
        linear(random(3, 32), arranged)
    with pytest.raises(RuntimeError, match=r"torch.float32, expected"):
        linear(random(3, 64).float(), arranged)


def test_packing_keeps_every_number_once() -> None:
    if not native.available():
        pytest.skip(str(native.why_not()))
    weight = torch.arange(64 * 96, dtype=torch.int16).view(64, 96)
    packed = pack(weight)
    assert packed.shape == (64 // PANEL, 96 // STEP, 2, 16, 16, 2)
    assert sorted(packed.flatten().tolist()) == list(range(64 * 96))
    # Panel 1, step 2, tile 1, pair 3, column 5, its second term.
    assert packed[1, 2, 1, 3, 5, 1] == weight[32 + 16 + 5, 2 * 32 + 2 * 3 + 1]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((33, 64), BFLOAT16), ((64, 33), BFLOAT16), ((64, 64), torch.float32), ((64, 64), torch.float16)],
)
def test_what_no_body_packs_stays_as_it_is(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    assert arranged_linear(weight) is weight
    assert arranged_gated(weight) is weight
    x = random(5, shape[1], dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_weights_elsewhere_stay_as_they_are() -> None:
    weight = torch.empty(64, 64, dtype=BFLOAT16, device="meta")
    assert arranged_linear(weight) is weight
