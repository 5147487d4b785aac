"""The sizes that Stable Diffusion 1.5, 2.1 and XL, their text encoders and the VAE give the operators, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmrt.kernels import launch
from ldmrt.kernels.ops import OPERATORS
from ldmrt.kernels.sampler import WIDTH, advance, sampler_step
from ldmrt.kernels.variant import Variant


@dataclass(frozen=True)
class Network:
    """What of a network decides on the kernels.

    Attributes:
        norms: (channels, side) of what the ResNet blocks begin with: group norm and SiLU.
        shifted: (channels, side) of their second half, where the time embedding is added first.
        attentions: (tokens, channels, heads) of the transformer blocks; each also attends to the text.
        sums: (channels, side) of the residual sums that a group norm reads.
        joins: (width, joined, side) of the same with a skip connection behind it.
        upsampled: (channels, side) of the residual sums that are upsampled, before that.
        text_tokens: of the text; none where blocks attend only to themselves.
        causal: whether attention is.
        gated: whether the feed-forward layer has a GEGLU.
    """

    norms: tuple[tuple[int, int], ...]
    shifted: tuple[tuple[int, int], ...]
    attentions: tuple[tuple[int, int, int], ...]
    sums: tuple[tuple[int, int], ...] = ()
    joins: tuple[tuple[int, int, int], ...] = ()
    upsampled: tuple[tuple[int, int], ...] = ()
    text_tokens: tuple[int, ...] = ()
    causal: bool = False
    gated: bool = False


def _levels(side: int, levels: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((channels, side >> level) for level, widths in enumerate(levels) for channels in widths)


# The widths that a level's blocks see: its own, the one before, and those of the concatenations on the way up.
_SD = ((320, 640, 960), (320, 640, 960, 1280, 1920), (640, 1280, 1920, 2560), (1280, 2560))
_SD_OWN = ((320,), (640,), (1280,), (1280,))
# What the blocks on the way up read: the result of the one before, and the skip connection of the way down.
_SD_JOINS = (
    ((640, 320), (320, 320)),
    ((1280, 640), (640, 640), (640, 320)),
    ((1280, 1280), (1280, 640)),
    ((1280, 1280),),
)


def _joins(side: int, levels: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (width, joined, side >> level) for level, pairs in enumerate(_SD_JOINS[:levels]) for width, joined in pairs
    )


def _vae(side: int) -> Network:
    return Network(
        _levels(side, ((128, 256), (256, 512), (512,), (512,))),
        (),
        (((side // 8) ** 2, 512, 1),),
        sums=_levels(side, ((128,), (256,), (512,), (512,))),
        upsampled=((512, side // 8), (512, side // 4), (256, side // 2)),
    )


NETWORKS = {
    "sd15": Network(
        _levels(64, _SD),
        _levels(64, _SD_OWN),
        ((4096, 320, 8), (1024, 640, 8), (256, 1280, 8), (64, 1280, 8)),
        _levels(64, _SD_OWN),
        _joins(64, 4),
        ((1280, 8), (1280, 16), (640, 32)),
        (77, 154),
        gated=True,
    ),
    "sd21": Network(
        _levels(96, _SD),
        _levels(96, _SD_OWN),
        ((9216, 320, 5), (2304, 640, 10), (576, 1280, 20), (144, 1280, 20)),
        _levels(96, _SD_OWN),
        _joins(96, 4),
        ((1280, 12), (1280, 24), (640, 48)),
        (77, 154),
        gated=True,
    ),
    "sdxl": Network(
        _levels(128, _SD[:3]),
        _levels(128, _SD_OWN[:3]),
        ((4096, 640, 10), (1024, 1280, 20)),
        _levels(128, _SD_OWN[:3]),
        _joins(128, 3),
        ((1280, 32), (640, 64)),
        (77, 154),
        gated=True,
    ),
    "vae-512": _vae(512),
    "vae-1024": _vae(1024),
    "clip-l": Network((), (), ((77, 768, 12),), causal=True),
    "clip-bigg": Network((), (), ((77, 1280, 20),), causal=True),
}


def variants(
    name: str,
    arch: int,
    dtype: torch.dtype = torch.float16,
    rows: int = 2,
    layout: torch.memory_format = torch.channels_last,
) -> list[Variant]:
    """The kernels that a network's operators launch on an architecture."""
    with launch.recording(arch) as recorded:
        _call_norms(NETWORKS[name], dtype, rows, layout)
        _call_sums(NETWORKS[name], dtype, rows, layout)
        _call_transformers(NETWORKS[name], dtype, rows)
    return list(recorded)


def sampler_variants(arch: int, dtype: torch.dtype = torch.float16, slots: int = 2) -> list[Variant]:
    """Those of the update of 64 x 64 latents, and of the advance."""
    float32, int64 = torch.float32, torch.int64
    x, rows, index = (
        _empty(slots, 4, 64, 64, dtype=float32),
        _empty(2 * slots, 4, 64, 64, dtype=dtype),
        _empty(slots, dtype=int64),
    )
    history, table = _empty(3, slots, 4, 64, 64, dtype=float32), _empty(20, WIDTH, dtype=float32)
    scale = _empty(slots, dtype=float32)
    with launch.recording(arch) as recorded:
        for noise in (None, _empty(20, 4, 64, 64, dtype=float32)):
            sampler_step(x, x, history, rows, table, index, noise, scale, index, index, rows)
        advance(index, index)
    return list(recorded)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call_norms(network: Network, dtype: torch.dtype, rows: int, layout: torch.memory_format) -> None:
    group_norm = OPERATORS["ldmrt.group_norm_silu.default"]

    def call(channels: int, side: int, eps: float, *, silu: bool, shift: Tensor | None) -> None:
        x = _empty(rows, channels, side, side, dtype=dtype).to(memory_format=layout)
        weight = _empty(channels, dtype=dtype)
        # Where the time embedding is added, so is the bias of the convolution before.
        group_norm(x, weight, weight, 32, eps, silu, shift, None if shift is None else weight)

    for channels, side in network.norms:
        call(channels, side, 1e-5, silu=True, shift=None)
    for channels, side in network.shifted:
        # All projections of the time embedding are one tensor, of which each block takes a part.
        shift = _empty(rows, 4 * channels, dtype=dtype)[:, channels : 2 * channels]
        call(channels, side, 1e-5, silu=True, shift=shift)
    if not network.causal:
        for tokens, channels, _ in network.attentions:
            call(channels, math.isqrt(tokens), 1e-6, silu=False, shift=None)


def _call_sums(network: Network, dtype: torch.dtype, rows: int, layout: torch.memory_format) -> None:
    add_group_norm, upsample = OPERATORS["ldmrt.add_group_norm_silu.default"], OPERATORS["ldmrt.add_upsample.default"]
    for width, joined, side in (*((width, 0, side) for width, side in network.sums), *network.joins):
        x = _empty(rows, width, side, side, dtype=dtype).to(memory_format=layout)
        behind = _empty(rows, joined, side, side, dtype=dtype).to(memory_format=layout) if joined else None
        weight, x_bias = _empty(width + joined, dtype=dtype), _empty(width, dtype=dtype)
        add_group_norm(x, x, behind, weight, weight, 32, 1e-5, True, x_bias)
        if joined:
            # What comes from an upsampling, or is read by others, is no sum any more.
            add_group_norm(x, None, behind, weight, weight, 32, 1e-5, True)
    for channels, side in network.upsampled:
        x = _empty(rows, channels, side, side, dtype=dtype).to(memory_format=layout)
        upsample(x, x, _empty(channels, dtype=dtype), 2)
        upsample(x, x, _empty(channels, dtype=dtype), 1)


def _call_transformers(network: Network, dtype: torch.dtype, rows: int) -> None:
    attention, geglu = OPERATORS["ldmrt.attention.default"], OPERATORS["ldmrt.geglu.default"]
    add_layer_norm = OPERATORS["ldmrt.add_layer_norm.default"]
    for tokens, channels, heads in network.attentions:
        x, weight = _empty(rows, tokens, channels, dtype=dtype), _empty(channels, dtype=dtype)
        scale = (channels // heads) ** -0.5
        merged = _empty(rows, tokens, 3 * channels, dtype=dtype)
        attention(*merged.chunk(3, dim=-1), heads, scale, network.causal)
        for text_tokens in network.text_tokens:
            text = _empty(rows, text_tokens, 2 * channels, dtype=dtype)
            attention(x, *text.chunk(2, dim=-1), heads, scale)
        if network.gated:
            geglu(_empty(rows, tokens, 8 * channels, dtype=dtype), _empty(8 * channels, dtype=dtype))
            # The first norm of a transformer is of a linear layer's result.
            add_layer_norm(x, None, weight, weight, 1e-5, weight)
        if network.gated or network.causal:
            add_layer_norm(x, x, weight, weight, 1e-5, weight)
