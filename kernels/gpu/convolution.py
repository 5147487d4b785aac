"""A convolution as a matrix product whose left side is never written down (implicit GEMM): a program gathers the pixels that a tap of
the filter sees. Where the result has few pixels, the sum over taps and channels is split over several programs.
"""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait


@triton.jit
def forward(
    x,
    weight,
    partial,
    pixels,
    height,
    width,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Sums over a split of the terms: partial (SPLITS, pixels, OUT) float32, or of the result's dtype if there is one split.

    x (rows, height, width, CHANNELS), weight (OUT, SIDE, SIDE, CHANNELS); pixels counts those of the result in all rows. BLOCK_K
    divides CHANNELS, BLOCK_N divides OUT. Grid (blocks of pixels, blocks of OUT, SPLITS).
    """
    wait(DEPENDENT)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    step = tl.arange(0, BLOCK_K)
    across = pixel % out_width * STRIDE - PADDING
    down = pixel // out_width % out_height * STRIDE - PADDING
    row = pixel // (out_width * out_height)
    present = pixel < pixels
    x_at = x + ((row * height + down).to(tl.int64) * width + across) * CHANNELS
    weight_at = weight + column[None, :] * (SIDE * SIDE * CHANNELS) + step[:, None]

    blocks: tl.constexpr = CHANNELS // BLOCK_K
    total: tl.constexpr = SIDE * SIDE * blocks
    share: tl.constexpr = (total + SPLITS - 1) // SPLITS
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for term in range(split * share, tl.minimum((split + 1) * share, total)):
        tap = term // blocks
        first = term % blocks * BLOCK_K
        y, z = tap // SIDE, tap % SIDE
        seen = present & (down + y >= 0) & (down + y < height) & (across + z >= 0) & (across + z < width)
        pixels_at = x_at + (y * width + z) * CHANNELS + first
        left = tl.load(pixels_at[:, None] + step[None, :], mask=seen[:, None], other=0.0)
        right = tl.load(weight_at + term * BLOCK_K)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = (split.to(tl.int64) * pixels + pixel)[:, None] * OUT + column[None, :]
    tl.store(partial + at, sums.to(partial.dtype.element_ty), mask=present[:, None])


@triton.jit
def gather(
    partial,
    result,
    elements,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Result (elements,) = the sum of partial (SPLITS, elements) over the splits, in their order."""
    wait(DEPENDENT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * elements.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)
