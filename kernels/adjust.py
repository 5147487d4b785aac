"""What a sampler does that is not linear, done to the coefficients of `sampler_step` just before it.

Guidance rescale multiplies a slot's model output by a number, dynamic thresholding clips and divides its denoised estimate by
one. Both numbers depend on the whole picture; once they are known the update is linear again. So each slot's row of the table is
changed in place: it is used once, and written anew for the next picture. `sampler_step` has nothing to do with it, and where no
slot asks for either, nothing is launched.

Both are plain torch on every device. Nothing waits for the device and no size depends on a value, so both can be captured in a
CUDA graph. Coefficients of zero stay zero, whatever the number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmrt.kernels.sampler import Basis, Column, guide, per_slot

_TARGETS = (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED)


def rescale_guidance(
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_rescale: Tensor,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
) -> None:
    """Bring the deviation of each guided slot's output towards that of its conditional one (arXiv 2305.08891, eqs. 15 and 16).

    Slots without guidance and those whose rescale is 0 are left alone.

    Args:
        model_output: (rows, C, H, W) of any floating type.
        table: (entries, WIDTH) float32, see `ldmrt.kernels.sampler.Column`; changed in place.
        row: (slots,) int64, each slot's own row of `table`, that of an idle slot too.
        guidance_rescale: (slots,) float32, from 0 (none) to 1.
        guidance_scale: (slots,) float32.
        cond_row: (slots,) int64, see `sampler_step`.
        uncond_row: (slots,) int64.
    """
    m, m_cond = guide(model_output, guidance_scale, cond_row, uncond_row)
    ratio = m_cond.flatten(1).std(1) / m.flatten(1).std(1)
    asked = (cond_row >= 0) & (uncond_row >= 0) & (guidance_rescale != 0)
    factor = torch.where(asked, 1 + guidance_rescale * (ratio - 1), 1.0)
    entries = table.index_select(0, row)
    for column in (Column.DENOISED_M, *(target + Basis.M for target in _TARGETS)):
        _multiply(entries[:, column], factor)
    table.index_copy_(0, row, entries)


def threshold(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
) -> None:
    """Dynamic thresholding (arXiv 2205.11487, section 2.3) of each slot whose row asks for it: d = clip(d, -s, s) / s.

    s is the quantile THRESHOLD_RATIO of |d| over the picture, between neighbours linearly, at least 1 and at most THRESHOLD_MAX.

    Args:
        x: (slots, C, H, W) float32.
        model_output: (rows, C, H, W) of any floating type.
        table: (entries, WIDTH) float32, see `ldmrt.kernels.sampler.Column`; changed in place.
        row: (slots,) int64, each slot's own row of `table`, that of an idle slot too.
        guidance_scale: (slots,) float32.
        cond_row: (slots,) int64, see `sampler_step`.
        uncond_row: (slots,) int64.
    """
    entries = table.index_select(0, row)
    m, _ = guide(model_output, guidance_scale, cond_row, uncond_row)
    d = torch.zeros_like(x)
    for column, value in ((Column.DENOISED_X, x), (Column.DENOISED_M, m)):
        coefficient = per_slot(entries[:, column])
        d += torch.where(coefficient != 0, coefficient * value, 0.0)
    ratio = entries[:, Column.THRESHOLD_RATIO]
    magnitudes = d.abs().flatten(1).sort(1).values
    place = ratio * (magnitudes.shape[1] - 1)
    below, above = (magnitudes.gather(1, index.long()[:, None])[:, 0] for index in (place.floor(), place.ceil()))
    quantile = torch.lerp(below, above, place.frac())
    asked = (cond_row >= 0) & (ratio > 0)
    s = torch.where(asked, torch.minimum(quantile.clamp(min=1), entries[:, Column.THRESHOLD_MAX]), 1.0)
    entries[:, Column.CLIP] = torch.where(asked, s, entries[:, Column.CLIP])
    for target in _TARGETS:
        _multiply(entries[:, target + Basis.D], 1 / s)
    table.index_copy_(0, row, entries)


def _multiply(column: Tensor, factor: Tensor) -> None:
    column.copy_(torch.where(column != 0, column * factor, column))
