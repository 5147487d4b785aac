"""What the tests of the kernels share: how far a result is from its float64 oracle, and the rounding of each dtype.

Tests marked `interpreted` run in Triton's interpreter; tests/interpreted.py says how.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Rounding to nearest changes a number by at most this, relative to it (half a unit in the last place).
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Below its smallest normal number a dtype is coarser than that: half the distance of two subnormals.
_SUBNORMAL = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference over that of `expected`, in float64. NaN if there is one: then no comparison holds."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        raise ValueError(f"found has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    return float((found - expected).norm() / expected.norm())


def assert_rounded(found: Tensor, expected: Tensor, error: float | Tensor) -> None:
    """Every element is the expected one, off by at most `error`, and then rounded to the dtype of `found`.

    NaN and infinity must stand where they are expected.

    Args:
        found: any float dtype, on any device.
        expected: the same shape, float64, on any device.
        error: what float32 arithmetic may have lost before the last rounding: one number, or one per element.
    """
    assert found.shape == expected.shape
    dtype, found, expected = found.dtype, found.detach().cpu().double(), expected.cpu()
    error = error.cpu() if isinstance(error, Tensor) else error
    unit = HALF_UNIT[dtype] * (2 if _cut(dtype) else 1)
    bound = (unit * (expected.abs() + error)).clamp(min=_SUBNORMAL[dtype]) + error
    regular = expected.isfinite()
    torch.testing.assert_close(found[~regular], expected[~regular], rtol=0, atol=0, equal_nan=True)
    excess = ((found - expected).abs() - bound)[regular]
    assert (excess <= 0).all(), f"{excess.max():.3g} more than the tolerance, {int((~(excess <= 0)).sum())} elements"


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Every element is the float32 number of `exact` rounded to the dtype of `found`, bit for bit; NaN must stand where it is."""
    allowed = [exact.to(found.dtype)]
    if _cut(found.dtype):
        allowed.append((exact.contiguous().view(torch.int32) & -(2**16)).view(torch.float32).to(found.dtype))
    right = torch.stack([(found == each) | (found.isnan() & each.isnan()) for each in allowed]).any(0)
    assert found.shape == exact.shape
    assert right.all(), f"{int((~right).sum())} elements of {right.numel()}"


def _cut(dtype: torch.dtype) -> bool:
    """Triton's interpreter, unlike a GPU, cuts off the lower bits of a float32 number instead of rounding it to bfloat16."""
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
