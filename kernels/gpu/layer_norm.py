"""Residual addition and layer norm: a program computes whole rows, which stay in registers. Each tensor is read or written once."""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait


@triton.jit
def forward(
    x,
    residual,
    weight,
    bias,
    x_bias,
    total,
    normed,
    rows,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Write total = x + residual + x_bias and normed = layer_norm(total), all (rows, WIDTH) but x_bias (WIDTH,); COLUMNS >= WIDTH;
    grid (row blocks,).
    """
    wait(DEPENDENT)
    # 64 bits where a row's offset may need them; within the tile 32 are enough.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    present = (row < rows - first) & inside
    offset = row * WIDTH + column
    start = first * WIDTH
    value = tl.load(x + start + offset, mask=present, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + start + offset, mask=present, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        value += tl.load(x_bias + column, mask=inside, other=0.0).to(tl.float32)
    # What is normed is the sum as it is stored, so that whoever reads it later sees the same numbers.
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + start + offset, rounded, mask=present)
    value = rounded.to(tl.float32)

    mean = tl.sum(value, 1, keep_dims=True) / WIDTH
    centred = tl.where(inside, value - mean, 0.0)
    # The mean of a large offset is rounded; what it is off by is left in the centred values, and known exactly enough there.
    rest = tl.sum(centred, 1, keep_dims=True) / WIDTH
    variance = tl.sum(centred * centred, 1, keep_dims=True) / WIDTH - rest * rest
    result = (centred - rest) * tl.rsqrt(variance + eps)
    if HAS_WEIGHT:
        result = result * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result = result + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + offset, result.to(normed.dtype.element_ty), mask=present)
