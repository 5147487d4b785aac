"""A linear layer and the gate after it: a program computes one tile of both halves of the product, and stores what the gate makes of
them. The product itself, twice as wide as the result, is never in memory.
"""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def forward(
    x,
    weight,
    bias,
    result,
    rows,
    HAS_BIAS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Result (rows, WIDTH) = y[:, :WIDTH] * gelu(y[:, WIDTH:]) of y = x weight^T + bias; x (rows, INNER), weight (2 WIDTH, INNER).

    WHOLE: the blocks divide the rows. BLOCK_N divides WIDTH, BLOCK_K divides INNER. Grid (blocks of rows * blocks of columns,):
    programs side by side in time share BAND blocks of rows, so that what they read stays in the cache.
    """
    wait(DEPENDENT)
    across: tl.constexpr = WIDTH // BLOCK_N
    down = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    band = program // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = program % (BAND * across)
    block_m = band * BAND + inside % height
    block_n = inside // height

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    present = (row < rows)[:, None]
    x_at = x + row.to(tl.int64)[:, None] * INNER + step[None, :]
    value_at = weight + column[None, :] * INNER + step[:, None]
    gate_at = value_at + WIDTH * INNER
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, INNER, BLOCK_K):
        if WHOLE:
            part = tl.load(x_at + first)
        else:
            part = tl.load(x_at + first, mask=present, other=0.0)
        value = tl.dot(part, tl.load(value_at + first), value, input_precision=PRECISION)
        gate = tl.dot(part, tl.load(gate_at + first), gate, input_precision=PRECISION)
    if HAS_BIAS:
        value += tl.load(bias + column).to(tl.float32)[None, :]
        gate += tl.load(bias + WIDTH + column).to(tl.float32)[None, :]
    gated = value * (0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF)))
    at = result + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if WHOLE:
        tl.store(at, gated.to(result.dtype.element_ty))
    else:
        tl.store(at, gated.to(result.dtype.element_ty), mask=present)
