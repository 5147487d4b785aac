"""A sum, each of whose pixels becomes a square of them. Bound by memory: the inputs once, the result once."""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait


@triton.jit
def forward(
    x,
    residual,
    x_bias,
    result,
    pixels,
    width,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Result (rows, FACTOR height, FACTOR width, CHANNELS) of x + residual + x_bias, (rows, height, width, CHANNELS); pixels counts
    those of x in all rows. Grid (blocks of pixels, blocks of channels).
    """
    wait(DEPENDENT)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < CHANNELS
    present = (pixel < pixels)[:, None] & inside[None, :]
    at = pixel[:, None] * CHANNELS + channel[None, :]
    value = tl.load(x + at, mask=present, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=present, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        value += tl.load(x_bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    rounded = value.to(result.dtype.element_ty)
    line = pixel // width  # of all rows
    corner = (line * FACTOR * width + pixel % width) * FACTOR
    for down in tl.static_range(FACTOR):
        for right in tl.static_range(FACTOR):
            target = corner + down * FACTOR * width + right
            tl.store(result + target[:, None] * CHANNELS + channel[None, :], rounded, mask=present)
