"""The sampler's update: from the model's output to the next model input, for every slot at once.

A sampler is a table with one row of coefficients per model evaluation (ldmrt/samplers/ makes them in float64). Each
slot points at its own row, so slots may use different samplers and be at different steps. With m the model output after
guidance, a row says, for the denoised estimate d and a basis B = (x, m, d, saved, h1, h2, h3, noise),

    d      = clip(DENOISED_X x + DENOISED_M m, -CLIP, CLIP)
    x'     = NEXT_X     . B
    saved' = NEXT_SAVED . B
    h3', h2', h1' = h2, h1, PUSHED . B         if PUSH, else unchanged
    model input   = NEXT_INPUT_SCALE x'

A term whose coefficient is exactly zero is left out, not multiplied: NaN or infinity in a buffer that a sampler does not
use cannot reach its pictures. Sums are float32, in the order of the basis, each operation rounded by itself.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from ldmrt.kernels import launch, native

WIDTH = 32
HISTORY = 3

# Elements of a program of the Triton body: eight for each of 64 threads, so that halves are read 16 bytes at a time.
_BLOCK = 512


class Basis(IntEnum):
    """The offset of a basis vector's coefficient within the columns of NEXT_X, NEXT_SAVED and PUSHED."""

    X = 0
    M = 1
    D = 2
    SAVED = 3
    H1 = 4
    H2 = 5
    H3 = 6
    NOISE = 7


class Column(IntEnum):
    """The columns of a table row. NEXT_X, NEXT_SAVED and PUSHED are the first of eight (`Column.NEXT_X + Basis.M`)."""

    DENOISED_X = 0
    DENOISED_M = 1
    CLIP = 2  # infinity: no clipping
    NEXT_X = 3
    NEXT_SAVED = 11
    PUSHED = 19
    PUSH = 27  # 0 or 1
    NEXT_INPUT_SCALE = 28
    THRESHOLD_RATIO = 29  # of kernels/adjust.py, as is the next; 0: no thresholding
    THRESHOLD_MAX = 30
    # 31 is reserved, and zero.


def sampler_step(
    x: Tensor,
    saved: Tensor,
    history: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
    model_input: Tensor,
) -> None:
    """Update x, saved, history and model_input in place.

    Model rows are not slots: a slot has a conditional row and, with guidance, an unconditional one, and no two slots
    share a row.

    Args:
        x: (slots, C, H, W) float32, the noisy latents.
        saved: (slots, C, H, W) float32, an x kept from an earlier evaluation.
        history: (3, slots, C, H, W) float32, the values pushed by earlier evaluations, the newest first.
        model_output: (rows, C, H, W) float32, bfloat16 or float16.
        table: (entries, WIDTH) float32, see `Column`.
        row: (slots,) int64, each slot's row of `table` and `noise`.
        noise: (entries, C, H, W) float32, parallel to `table`; None leaves out the noise terms.
        guidance_scale: (slots,) float32.
        cond_row: (slots,) int64, rows of model_output and model_input; -1 for an idle slot, which is left untouched.
        uncond_row: (slots,) int64; -1 for a slot without guidance.
        model_input: (rows, C, H, W), of model_output's dtype; receives the next input in the slot's one or two rows.
    """
    _check(x, saved, history, model_output, table, row, noise, guidance_scale, cond_row, uncond_row, model_input)
    if x.device.type == "cpu":
        # On a GPU reading the indices would stall the stream.
        _check_indices(row, cond_row, uncond_row, entries=table.shape[0], rows=model_output.shape[0])
        if native.available():
            native.run(
                "ldmrt_sampler_step",
                x,
                saved,
                history,
                model_output,
                model_input,
                native.ELEMENTS[model_output.dtype],
                table,
                noise,
                row,
                guidance_scale,
                cond_row,
                uncond_row,
                x.shape[0],
                x[0].numel(),
            )
            return
    body = sampler_step_triton if launch.ready(x.device) else sampler_step_reference
    body(x, saved, history, model_output, table, row, noise, guidance_scale, cond_row, uncond_row, model_input)


def sampler_step_reference(
    x: Tensor,
    saved: Tensor,
    history: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
    model_input: Tensor,
) -> None:
    """`sampler_step` in plain torch. It never waits for the device, so it can be captured in a CUDA graph."""
    active = cond_row >= 0
    guided = active & (uncond_row >= 0)
    entry = torch.where(active, row, 0)
    columns = table[entry].unbind(1)  # WIDTH x (slots,)

    m, _ = guide(model_output, guidance_scale, cond_row, uncond_row)

    def term(column: int, value: Tensor) -> Tensor:
        coefficient = per_slot(columns[column])
        return torch.where(coefficient != 0, coefficient * value, 0.0)

    d = term(Column.DENOISED_X, x) + term(Column.DENOISED_M, m)
    clip = per_slot(columns[Column.CLIP])
    d = torch.minimum(torch.maximum(d, -clip), clip)

    basis = [x, m, d, saved, *history]
    if noise is not None:
        basis.append(noise[entry])

    def combine(first: Column) -> Tensor:
        total = torch.zeros_like(x)
        for offset, value in enumerate(basis):
            total = total + term(first + offset, value)
        return total

    next_x, next_saved, pushed = combine(Column.NEXT_X), combine(Column.NEXT_SAVED), combine(Column.PUSHED)
    push = per_slot(active & (columns[Column.PUSH] != 0))
    history.copy_(torch.where(push, torch.stack([pushed, history[0], history[1]]), history))
    x.copy_(torch.where(per_slot(active), next_x, x))
    saved.copy_(torch.where(per_slot(active), next_saved, saved))

    # Slots that have no such row write into one more, which is dropped.
    rows = model_input.shape[0]
    next_input = (next_x * per_slot(columns[Column.NEXT_INPUT_SCALE])).to(model_input.dtype)
    extended = torch.cat([model_input, next_input[:1]])
    extended[torch.where(active, cond_row, rows)] = next_input
    extended[torch.where(guided, uncond_row, rows)] = next_input
    model_input.copy_(extended[:rows])


def guide(model_output: Tensor, guidance_scale: Tensor, cond_row: Tensor, uncond_row: Tensor) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance (arXiv 2207.12598) of every slot; that of an idle slot has no meaning.

    Returns:
        The model's output after guidance and that for the prompt alone, both (slots, C, H, W) float32.
    """
    m_cond = model_output[cond_row.clamp(min=0)].float()
    m_uncond = model_output[uncond_row.clamp(min=0)].float()
    guided = per_slot((cond_row >= 0) & (uncond_row >= 0))
    return torch.where(guided, m_uncond + per_slot(guidance_scale) * (m_cond - m_uncond), m_cond), m_cond


def per_slot(values: Tensor) -> Tensor:
    """(slots,) as (slots, 1, 1, 1), to go with latents."""
    return values.view(-1, 1, 1, 1)


def sampler_step_triton(
    x: Tensor,
    saved: Tensor,
    history: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
    model_input: Tensor,
) -> None:
    """`sampler_step` on a GPU, in one launch. The arguments have been checked; indices are trusted."""
    slots, elements = x.shape[0], x.numel() // x.shape[0]
    launch.run(
        "sampler.step",
        (-(-elements // _BLOCK), slots),
        [
            x,
            saved,
            history,
            model_output,
            model_input,
            table,
            x if noise is None else noise,
            row,
            guidance_scale,
            cond_row,
            uncond_row,
            slots,
            elements,
        ],
        {"HAS_NOISE": noise is not None, "BLOCK": _BLOCK},
        num_warps=_BLOCK // 256,
        fp_fusion=False,
    )


def advance(row: Tensor, last_row: Tensor) -> None:
    """Move each slot to its next row, in place; at its last row a slot stays. A launch of its own: inside
    `sampler_step` other threads would still be reading the row.

    Args:
        row: (slots,) int64.
        last_row: (slots,) int64.
    """
    for name, tensor in (("row", row), ("last_row", last_row)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            found = f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"advance: {name} is {found}; expected a contiguous (slots,) torch.int64")
    if row.shape != last_row.shape or row.device != last_row.device:
        raise ValueError(
            f"advance: row is {tuple(row.shape)} on {row.device}, last_row {tuple(last_row.shape)} on {last_row.device}; "
            "expected one shape and device"
        )
    body = advance_triton if launch.ready(row.device) else advance_reference
    body(row, last_row)


def advance_reference(row: Tensor, last_row: Tensor) -> None:
    """`advance` in plain torch."""
    row.add_(1)
    torch.minimum(row, last_row, out=row)


def advance_triton(row: Tensor, last_row: Tensor) -> None:
    """`advance` on a GPU, in one launch."""
    slots = row.shape[0]
    block = 128
    launch.run(
        "sampler.advance", (-(-slots // block),), [row, last_row, slots], {"BLOCK": block}, num_warps=1, num_stages=1
    )


def _check(
    x: Tensor,
    saved: Tensor,
    history: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor,
    cond_row: Tensor,
    uncond_row: Tensor,
    model_input: Tensor,
) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"sampler_step: x has shape {tuple(x.shape)}, expected (slots, C, H, W), none of them 0")
    if model_output.dtype not in native.ELEMENTS:
        raise TypeError(f"sampler_step: model_output is {model_output.dtype}, expected float32, bfloat16 or float16")
    slots, *latent = x.shape
    rows, entries = max(1, model_output.shape[0]), max(1, table.shape[0])
    f32, i64 = torch.float32, torch.int64
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("x", x, (slots, *latent), f32),
        ("saved", saved, (slots, *latent), f32),
        ("history", history, (HISTORY, slots, *latent), f32),
        ("model_output", model_output, (rows, *latent), model_output.dtype),
        ("table", table, (entries, WIDTH), f32),
        ("row", row, (slots,), i64),
        ("noise", noise, (entries, *latent), f32),
        ("guidance_scale", guidance_scale, (slots,), f32),
        ("cond_row", cond_row, (slots,), i64),
        ("uncond_row", uncond_row, (slots,), i64),
        ("model_input", model_input, (rows, *latent), model_output.dtype),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"sampler_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype:
            raise TypeError(f"sampler_step: {name} is {tensor.dtype}, expected {dtype}")
        if tensor.device != x.device:
            raise ValueError(f"sampler_step: {name} is on {tensor.device}, expected {x.device} as x")
        if not tensor.is_contiguous():
            raise ValueError(f"sampler_step: {name} is not contiguous; pass a contiguous buffer")


def _check_indices(row: Tensor, cond_row: Tensor, uncond_row: Tensor, *, entries: int, rows: int) -> None:
    """The bounds that the C++ body relies on. The row of an idle slot is never read."""
    for slot, (at, cond, uncond) in enumerate(zip(row.tolist(), cond_row.tolist(), uncond_row.tolist(), strict=True)):
        for name, index, bound in (("cond_row", cond, rows), ("uncond_row", uncond, rows)):
            if not -1 <= index < bound:
                raise IndexError(f"sampler_step: {name} of slot {slot} is {index}, expected -1 to {bound - 1}")
        if cond >= 0 and not 0 <= at < entries:
            raise IndexError(f"sampler_step: row of slot {slot} is {at}, expected 0 to {entries - 1}")
