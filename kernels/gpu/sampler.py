"""The Triton bodies of kernels/sampler.py, which defines what they compute.

They are compiled without fused multiply-adds: each operation is rounded by itself, as in the other bodies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait

# The columns of a table row, as in kernels/sampler.py.
_WIDTH = tl.constexpr(32)
_DENOISED_X = tl.constexpr(0)
_DENOISED_M = tl.constexpr(1)
_CLIP = tl.constexpr(2)
_NEXT_X = tl.constexpr(3)
_NEXT_SAVED = tl.constexpr(11)
_PUSHED = tl.constexpr(19)
_PUSH = tl.constexpr(27)
_NEXT_INPUT_SCALE = tl.constexpr(28)


@triton.jit
def _add(total, coefficients, k: tl.constexpr, value):
    """Add a term. A coefficient of zero leaves it out, so that NaN or infinity in `value` cannot pass."""
    coefficient = tl.load(coefficients + k)
    return total + coefficient * tl.where(coefficient != 0, value, 0.0)


@triton.jit
def _combine(coefficients, x, m, d, saved, h1, h2, h3, noise, HAS_NOISE: tl.constexpr):
    total = _add(tl.zeros_like(x), coefficients, 0, x)
    total = _add(total, coefficients, 1, m)
    total = _add(total, coefficients, 2, d)
    total = _add(total, coefficients, 3, saved)
    total = _add(total, coefficients, 4, h1)
    total = _add(total, coefficients, 5, h2)
    total = _add(total, coefficients, 6, h3)
    if HAS_NOISE:
        total = _add(total, coefficients, 7, noise)
    return total


@triton.jit
def step(
    x_pointer,  # (slots, elements) float32
    saved_pointer,  # (slots, elements) float32
    history_pointer,  # (3, slots, elements) float32
    output_pointer,  # (rows, elements)
    input_pointer,  # (rows, elements)
    table_pointer,  # (entries, 32) float32
    noise_pointer,  # (entries, elements) float32
    row_pointer,  # (slots,) int64, and so the others of a slot
    guidance_pointer,
    cond_pointer,
    uncond_pointer,
    slots,
    elements,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program takes BLOCK elements of one slot: axis 0 counts blocks, axis 1 slots."""
    wait(DEPENDENT)
    slot = tl.program_id(1).to(tl.int64)
    cond = tl.load(cond_pointer + slot)
    if cond < 0:  # an idle slot
        return
    uncond = tl.load(uncond_pointer + slot)
    row = tl.load(row_pointer + slot)
    c = table_pointer + row * _WIDTH

    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    at = slot * elements + offsets
    history_stride = slots.to(tl.int64) * elements
    x_at = x_pointer + at
    saved_at = saved_pointer + at
    h1_at = history_pointer + at
    h2_at = h1_at + history_stride
    h3_at = h2_at + history_stride

    m = tl.load(output_pointer + cond * elements + offsets, mask=inside).to(tl.float32)
    if uncond >= 0:
        m_uncond = tl.load(output_pointer + uncond * elements + offsets, mask=inside).to(tl.float32)
        m = m_uncond + tl.load(guidance_pointer + slot) * (m - m_uncond)

    x = tl.load(x_at, mask=inside)
    saved = tl.load(saved_at, mask=inside)
    h1 = tl.load(h1_at, mask=inside)
    h2 = tl.load(h2_at, mask=inside)
    h3 = tl.load(h3_at, mask=inside)
    noise = x
    if HAS_NOISE:
        noise = tl.load(noise_pointer + row * elements + offsets, mask=inside)

    d = _add(_add(tl.zeros_like(x), c, _DENOISED_X, x), c, _DENOISED_M, m)
    clip = tl.load(c + _CLIP)
    d = tl.where(d < -clip, -clip, d)  # comparisons, so that NaN passes
    d = tl.where(d > clip, clip, d)

    next_x = _combine(c + _NEXT_X, x, m, d, saved, h1, h2, h3, noise, HAS_NOISE)
    next_saved = _combine(c + _NEXT_SAVED, x, m, d, saved, h1, h2, h3, noise, HAS_NOISE)
    tl.store(x_at, next_x, mask=inside)
    tl.store(saved_at, next_saved, mask=inside)
    if tl.load(c + _PUSH) != 0:
        pushed = _combine(c + _PUSHED, x, m, d, saved, h1, h2, h3, noise, HAS_NOISE)
        tl.store(h3_at, h2, mask=inside)
        tl.store(h2_at, h1, mask=inside)
        tl.store(h1_at, pushed, mask=inside)

    next_input = (next_x * tl.load(c + _NEXT_INPUT_SCALE)).to(input_pointer.dtype.element_ty)
    tl.store(input_pointer + cond * elements + offsets, next_input, mask=inside)
    if uncond >= 0:
        tl.store(input_pointer + uncond * elements + offsets, next_input, mask=inside)


@triton.jit
def advance(row_pointer, last_pointer, slots, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Both are (slots,) int64."""
    wait(DEPENDENT)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < slots
    following = tl.load(row_pointer + offsets, mask=inside) + 1
    last = tl.load(last_pointer + offsets, mask=inside)
    tl.store(row_pointer + offsets, tl.minimum(following, last), mask=inside)
