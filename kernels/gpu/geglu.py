"""GEGLU: a program computes a tile of rows and columns of the result. Bound by memory: two reads, one write."""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def forward(
    x,
    x_bias,
    result,
    rows,
    HAS_X_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Write result (rows, WIDTH) = x[:, :WIDTH] * gelu(x[:, WIDTH:]) of x (rows, 2 WIDTH), to which x_bias (2 WIDTH,) is added
    first; grid (row blocks, column blocks).
    """
    wait(DEPENDENT)
    # 64 bits where a row's offset may need them; within the tile 32 are enough.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = row < rows - first
    if WIDTH % COLUMNS != 0:
        present = present & (column < WIDTH)
    pointer = x + first * (2 * WIDTH) + row * (2 * WIDTH) + column
    value = tl.load(pointer, mask=present, other=0.0).to(tl.float32)
    gate = tl.load(pointer + WIDTH, mask=present, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        inside = column < WIDTH
        value += tl.load(x_bias + column, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(x_bias + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    tl.store(result + first * WIDTH + row * WIDTH + column, (value * gelu).to(result.dtype.element_ty), mask=present)
