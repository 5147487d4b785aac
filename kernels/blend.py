"""What stays of a picture while the rest is drawn anew: after an update the latents under a mask are those of the update, and the others
those of the picture, with as much noise as the next evaluation expects (Avrahami et al. 2021, arXiv 2111.14818, section 3.2, and 2022,
arXiv 2206.02779, section 3).

It goes behind `sampler_step` and before `advance`; where no slot asks for it, nothing is launched. Plain torch on every device, for the
reasons of `ldmrt.kernels.adjust`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmrt.kernels.sampler import Column, per_slot


def blend(
    x: Tensor,
    original: Tensor,
    noise: Tensor,
    mask: Tensor,
    levels: Tensor,
    table: Tensor,
    row: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
    model_input: Tensor,
) -> None:
    """X' = (1 - mask) (signal original + noise level * noise) + mask x, and the model input made of it, in place.

    Slots at a row whose levels are both zero are left alone, as are idle ones.

    Args:
        x: (slots, C, H, W) float32.
        original: (slots, C, H, W) float32, the picture's latents.
        noise: (slots, C, H, W) float32, standard normal, the same at every step.
        mask: (slots, 1, H, W) float32, 1 for what is drawn anew, 0 for what stays.
        levels: (entries, 2) float32, parallel to `table`: signal and noise level behind each evaluation.
        table: (entries, WIDTH) float32, see `ldmrt.kernels.sampler.Column`.
        row: (slots,) int64, each slot's own row of `table`, that of an idle slot too.
        cond_row: (slots,) int64, see `sampler_step`.
        uncond_row: (slots,) int64.
        model_input: (rows, C, H, W) of any floating type.
    """
    level = levels.index_select(0, row)
    asked = (cond_row >= 0) & (level != 0).any(1)
    kept = per_slot(level[:, 0]) * original + per_slot(level[:, 1]) * noise
    x.copy_(torch.where(per_slot(asked), (1 - mask) * kept + mask * x, x))

    # Slots that have no such row write into one more, which is dropped.
    rows = model_input.shape[0]
    next_input = (x * per_slot(table.index_select(0, row)[:, Column.NEXT_INPUT_SCALE])).to(model_input.dtype)
    extended = torch.cat([model_input, next_input[:1]])
    extended[torch.where(asked, cond_row, rows)] = next_input
    extended[torch.where(asked & (uncond_row >= 0), uncond_row, rows)] = next_input
    model_input.copy_(extended[:rows])
