"""The operators on pictures: group norm, alone and of what is put together before it; sums and upsampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_suite import oracles
from gpu_suite.operator import EPS, Operator, Size, nbytes, random
from ldmrt.kernels.add_group_norm import add_group_norm_silu
from ldmrt.kernels.group_norm import group_norm_silu
from ldmrt.kernels.upsample import add_upsample

_GROUPS = 32


def _picture(rows: int, channels: int, side: int, *, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Channels last, of different means and deviations."""
    scale = (1 + torch.arange(channels, device=device) % 3).view(-1, 1, 1)
    x = (random(rows, channels, side, side, dtype=torch.float32, device=device, seed=seed) * scale + 0.2 * scale).to(
        dtype
    )
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- group norm


def _group_norm_sizes() -> dict[str, Size]:
    """(rows, channels, side, silu, shift): channels last, in 32 groups."""
    found: dict[str, Size] = {}
    levels = {
        "sd15 512": (
            2,
            {64: (320, 640, 960), 32: (320, 640, 960, 1280, 1920), 16: (640, 1280, 1920, 2560), 8: (1280, 2560)},
        ),
        "sd21 768": (
            2,
            {96: (320, 640, 960), 48: (320, 640, 960, 1280, 1920), 24: (640, 1280, 1920, 2560), 12: (1280, 2560)},
        ),
        "sdxl 1024": (2, {128: (320, 640, 960), 64: (320, 640, 960, 1280, 1920), 32: (640, 1280, 1920, 2560)}),
        "vae 512": (1, {64: (512,), 128: (512,), 256: (256, 512), 512: (128, 256)}),
        "vae 1024": (1, {128: (512,), 256: (512,), 512: (256, 512), 1024: (128, 256)}),
    }
    for where, (rows, sides) in levels.items():
        for side, widths in sides.items():
            for channels in widths:
                found[f"{where} {channels} x {side}"] = (rows, channels, side, 1, int("vae" not in where))
                if "vae" not in where:
                    # The first norm of a block has no time embedding.
                    found[f"{where} {channels} x {side}, no shift"] = (rows, channels, side, 1, 0)
    # Before a transformer there is no activation, and no time embedding.
    for where, channels, side in (
        ("sd15 512", 320, 64),
        ("sd15 512", 1280, 16),
        ("sdxl 1024", 1280, 32),
        ("vae 512", 512, 64),
    ):
        found[f"{where} {channels} x {side}, no silu"] = (1 if "vae" in where else 2, channels, side, 0, 0)
    return found


def _group_norm_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    rows, channels, side, silu, shifted = size
    x = _picture(rows, channels, side, dtype=dtype, device=device, seed=0)
    weight = 1 + 0.2 * random(channels, dtype=dtype, device=device, seed=1)
    bias = 0.5 * random(channels, dtype=dtype, device=device, seed=2)
    # One row of a table of all the layers' shifts.
    shift = random(rows, 3 * channels, dtype=dtype, device=device, seed=3)[:, channels : 2 * channels]
    groups = _GROUPS if channels % _GROUPS == 0 else 4
    # Where the time embedding is added, so is the bias of the convolution before.
    x_bias = 0.5 * random(channels, dtype=dtype, device=device, seed=4)
    return [x, weight, bias, groups, EPS, bool(silu), *((shift, x_bias) if shifted else (None, None))]


def _torch_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001  (as the operator has it)
    shift: Tensor | None,
    x_bias: Tensor | None,
) -> Tensor:
    value = x if x_bias is None else x + x_bias[:, None, None]
    value = value if shift is None else value + shift[:, :, None, None]
    value = F.group_norm(value, groups, weight, bias, eps)
    return F.silu(value) if silu else value


GROUP_NORM = Operator(
    name="group_norm_silu",
    body=group_norm_silu,
    also={},
    sizes=_group_norm_sizes(),
    timed=(
        *(f"sd15 512 {size}" for size in ("320 x 64", "960 x 64", "640 x 32", "1280 x 16", "2560 x 8")),
        *(f"sdxl 1024 {size}" for size in ("320 x 128", "640 x 64", "1280 x 32")),
        *(f"vae 512 {size}" for size in ("512 x 64", "256 x 512", "128 x 512")),
        *(f"vae 1024 {size}" for size in ("256 x 1024", "128 x 1024")),
    ),
    tiny={"unet": (2, 40, 8, 1, 1), "no silu": (1, 64, 8, 0, 0)},
    arguments=_group_norm_arguments,
    check=oracles.check_group_norm_silu,
    rivals={"torch": _torch_group_norm},
    work=lambda arguments: (0, 2 * nbytes(arguments[0])),
)


# ---------------------------------------------------------------------------------------------------- sums and joins


def _add_group_norm_sizes() -> dict[str, Size]:
    """(rows, width, joined, side, residual): channels last, in 32 groups; with a residual there is a bias, too."""
    found: dict[str, Size] = {}
    # The residual sum of a level's block, and on the way up the skip connections behind it.
    unets: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
        "sd15 512": {
            64: ((320, 0), (640, 320), (320, 320)),
            32: ((640, 0), (1280, 640), (640, 640), (640, 320)),
            16: ((1280, 0), (1280, 1280), (1280, 640)),
            8: ((1280, 0), (1280, 1280)),
        },
        "sd21 768": {
            96: ((320, 0), (640, 320)),
            48: ((640, 0), (1280, 640)),
            24: ((1280, 0), (1280, 640)),
            12: ((1280, 0), (1280, 1280)),
        },
        "sdxl 1024": {
            128: ((320, 0), (640, 320), (320, 320)),
            64: ((640, 0), (1280, 640), (640, 640), (640, 320)),
            32: ((1280, 0), (1280, 1280), (1280, 640)),
        },
    }
    for where, levels in unets.items():
        for side, pairs in levels.items():
            for width, joined in pairs:
                found[f"{where} {width}{f'+{joined}' if joined else ''} x {side}"] = (2, width, joined, side, 1)
    # After an upsampling there is nothing to add.
    found["sd15 512 640+320 x 64, no residual"] = (2, 640, 320, 64, 0)
    found["sd15 512 1280+1280 x 16, no residual"] = (2, 1280, 1280, 16, 0)
    found["sd15 512 640+320 x 64, 16 rows"] = (16, 640, 320, 64, 1)
    for pixels in (512, 1024):
        for channels, scale in ((512, 8), (512, 4), (256, 2), (128, 1)):
            found[f"vae {pixels} {channels} x {pixels // scale}"] = (1, channels, 0, pixels // scale, 1)
    return found


def _add_group_norm_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    rows, width, rest, side, summed = size
    channels = width + rest
    x, residual = (_picture(rows, width, side, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    joined = _picture(rows, rest, side, dtype=dtype, device=device, seed=2) if rest else None
    weight = 1 + 0.2 * random(channels, dtype=dtype, device=device, seed=3)
    bias = 0.5 * random(channels, dtype=dtype, device=device, seed=4)
    x_bias = 0.5 * random(width, dtype=dtype, device=device, seed=5)
    groups = _GROUPS if channels % _GROUPS == 0 else 4
    return [x, residual if summed else None, joined, weight, bias, groups, EPS, True, x_bias if summed else None]


def _torch_add_group_norm(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001  (as the operator has it)
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = _torch_sum(x, residual, x_bias)
    total = total if joined is None else torch.cat([total, joined], 1)
    normed = F.group_norm(total, groups, weight, bias, eps)
    return total, F.silu(normed) if silu else normed


def _torch_sum(x: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> Tensor:
    total = x if x_bias is None else x + x_bias[:, None, None]
    return total if residual is None else total + residual


def _add_group_norm_work(arguments: list[Any]) -> tuple[int, int]:
    """What goes in is read once; the total and its norm are written once."""
    x, residual, joined, *_ = arguments
    return 0, nbytes(x, residual, joined) + 2 * nbytes(x, joined)


ADD_GROUP_NORM = Operator(
    name="add_group_norm_silu",
    body=add_group_norm_silu,
    also={},
    sizes=_add_group_norm_sizes(),
    timed=(
        *(f"sd15 512 {size}" for size in ("320 x 64", "640+320 x 64", "640 x 32", "1280+640 x 32", "1280+1280 x 8")),
        *(f"sdxl 1024 {size}" for size in ("640+320 x 128", "640 x 64", "1280+1280 x 32")),
        *("vae 512 512 x 64", "vae 512 128 x 512", "vae 1024 128 x 1024"),
    ),
    tiny={"sum": (2, 40, 0, 8, 1), "join": (2, 24, 16, 8, 1), "join, no residual": (1, 64, 32, 8, 0)},
    arguments=_add_group_norm_arguments,
    check=oracles.check_add_group_norm_silu,
    rivals={"torch": _torch_add_group_norm},
    work=_add_group_norm_work,
)


# ---------------------------------------------------------------------------------------------------- upsampling


def _upsample_sizes() -> dict[str, Size]:
    """(rows, channels, side, factor, residual): channels last; with a residual there is a bias, too."""
    found: dict[str, Size] = {}
    for where, rows, levels in (
        ("sd15 512", 2, ((1280, 8), (1280, 16), (640, 32))),
        ("sd21 768", 2, ((1280, 12), (640, 48))),
        ("sdxl 1024", 2, ((1280, 32), (640, 64))),
        ("vae 512", 1, ((512, 64), (512, 128), (256, 256))),
        ("vae 1024", 1, ((512, 128), (512, 256), (256, 512))),
    ):
        for channels, side in levels:
            found[f"{where} {channels} x {side}"] = (rows, channels, side, 2, 1)
    found["sd15 512 640 x 32, 16 rows"] = (16, 640, 32, 2, 1)
    found["sd15 512 640 x 32, no residual"] = (2, 640, 32, 2, 0)
    for where, channels, side in (("sd15 512", 320, 64), ("sd15 512", 1280, 8), ("sdxl 1024", 640, 64)):
        found[f"{where} {channels} x {side}, only the sum"] = (2, channels, side, 1, 1)
    return found


def _upsample_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    rows, channels, side, factor, summed = size
    x, residual = (_picture(rows, channels, side, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    x_bias = 0.5 * random(channels, dtype=dtype, device=device, seed=2)
    return [x, *((residual, x_bias) if summed else (None, None)), factor]


def _torch_upsample(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> Tensor:
    total = _torch_sum(x, residual, x_bias)
    return total if factor == 1 else F.interpolate(total, scale_factor=float(factor), mode="nearest")


def _upsample_work(arguments: list[Any]) -> tuple[int, int]:
    x, residual, _, factor = arguments
    return 0, nbytes(x, residual) + factor**2 * nbytes(x)


UPSAMPLE = Operator(
    name="add_upsample",
    body=add_upsample,
    also={},
    sizes=_upsample_sizes(),
    timed=(
        *(f"sd15 512 {size}" for size in ("1280 x 8", "1280 x 16", "640 x 32", "320 x 64, only the sum")),
        *("sdxl 1024 640 x 64", "vae 512 256 x 256", "vae 1024 256 x 512"),
    ),
    tiny={"twice": (2, 40, 6, 2, 1), "only the sum": (1, 24, 8, 1, 1), "no residual": (1, 24, 8, 2, 0)},
    arguments=_upsample_arguments,
    check=oracles.check_add_upsample,
    rivals={"torch": _torch_upsample},
    work=_upsample_work,
)
