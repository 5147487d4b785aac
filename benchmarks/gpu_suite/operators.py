"""The operators with the sizes that real models call them at, what torch itself has for the same, and the least work they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_suite import oracles
from gpu_suite.oracles import Body, Verdict
from ldmrt.kernels.attention import attention, attention_reference, attention_triton
from ldmrt.kernels.geglu import geglu
from ldmrt.kernels.group_norm import group_norm_silu
from ldmrt.kernels.layer_norm import add_layer_norm
from ldmrt.kernels.sampler import WIDTH, Column, sampler_step

Size = tuple[int, ...]
EPS = 1e-5
_GROUPS = 32


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: as in a graph.
        body: the operator; it picks what computes it.
        also: other bodies that must be right wherever kernels can be launched.
        sizes: by a name that says where they come from; what they mean is up to `arguments`.
        timed: the names of those that are timed.
        tiny: sizes for the dry run.
        arguments: makes the arguments of a size.
        check: compares a body with the oracle.
        rivals: what torch has for the same arguments, by name.
        work: (floating-point operations, bytes) that a call needs at least, of its arguments.
    """

    name: str
    body: Body
    also: Mapping[str, Body]
    sizes: Mapping[str, Size]
    timed: tuple[str, ...]
    tiny: Mapping[str, Size]
    arguments: Callable[[Size, torch.dtype, torch.device], list[Any]]
    check: Callable[[Body, list[Any]], Verdict]
    rivals: Mapping[str, Body]
    work: Callable[[list[Any]], tuple[int, int]]


def _random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


# ---------------------------------------------------------------------------------------------------- attention


def _attention_sizes() -> dict[str, Size]:
    """(rows, query tokens, key tokens, heads, head size)."""
    found: dict[str, Size] = {}
    for pixels in (512, 768):
        side = pixels // 8
        for level in range(4):
            tokens, head = (side >> level) ** 2, 40 << min(level, 2)
            found[f"sd15 {pixels} self {tokens}"] = (2, tokens, tokens, 8, head)
            found[f"sd15 {pixels} text {tokens}"] = (2, tokens, 77, 8, head)
    found["sd15 512 text 4096, 16 rows, 154 tokens"] = (16, 4096, 154, 8, 40)
    for level in range(4):
        tokens, heads = (96 >> level) ** 2, (5, 10, 20, 20)[level]
        found[f"sd21 768 self {tokens}"] = (2, tokens, tokens, heads, 64)
        found[f"sd21 768 text {tokens}"] = (2, tokens, 77, heads, 64)
    for tokens, heads in ((4096, 10), (1024, 20)):
        found[f"sdxl 1024 self {tokens}"] = (2, tokens, tokens, heads, 64)
        found[f"sdxl 1024 text {tokens}"] = (2, tokens, 77, heads, 64)
    for pixels in (512, 768, 1024):
        tokens = (pixels // 8) ** 2
        found[f"vae {pixels}"] = (1, tokens, tokens, 1, 512)
    return found


def _attention_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """As a network has them: slices of one projection of a picture, or of keys and values of a text."""
    rows, query_tokens, key_tokens, heads, head = size
    width = heads * head
    if query_tokens == key_tokens:
        merged = _random(rows, query_tokens, 3 * width, dtype=dtype, device=device)
        query, key, value = merged.chunk(3, -1)
    else:
        query = _random(rows, query_tokens, width, dtype=dtype, device=device)
        key, value = _random(rows, key_tokens, 2 * width, dtype=dtype, device=device, seed=1).chunk(2, -1)
    return [query, key, value, heads, head**-0.5]


def _with_backend(backend: SDPBackend) -> Body:
    def run(*arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return attention_reference(*arguments)

    return run


def _attention_work(arguments: list[Any]) -> tuple[int, int]:
    query, key, value = arguments[:3]
    rows, query_tokens, width = query.shape
    return 4 * rows * query_tokens * key.shape[1] * width, _nbytes(query, key, value, query)


_ATTENTION = Operator(
    name="attention",
    body=attention,
    also={"triton": attention_triton},
    sizes=_attention_sizes(),
    timed=(
        *(f"sd15 512 {kind} {tokens}" for kind in ("self", "text") for tokens in (4096, 1024, 256, 64)),
        *(f"sdxl 1024 {kind} {tokens}" for kind in ("self", "text") for tokens in (4096, 1024)),
        "vae 512",
        "vae 1024",
    ),
    tiny={"self": (2, 64, 64, 2, 40), "text": (2, 64, 77, 2, 40)},
    arguments=_attention_arguments,
    check=oracles.check_attention,
    rivals={
        "torch flash": _with_backend(SDPBackend.FLASH_ATTENTION),
        "torch cudnn": _with_backend(SDPBackend.CUDNN_ATTENTION),
        "torch efficient": _with_backend(SDPBackend.EFFICIENT_ATTENTION),
        "torch math": _with_backend(SDPBackend.MATH),
    },
    work=_attention_work,
)


# ---------------------------------------------------------------------------------------------------- norms


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
    scale = (1 + torch.arange(channels, device=device) % 3).view(-1, 1, 1)
    x = (_random(rows, channels, side, side, dtype=torch.float32, device=device) * scale + 0.2 * scale).to(dtype)
    weight = 1 + 0.2 * _random(channels, dtype=dtype, device=device, seed=1)
    bias = 0.5 * _random(channels, dtype=dtype, device=device, seed=2)
    # One row of a table of all the layers' shifts.
    shift = _random(rows, 3 * channels, dtype=dtype, device=device, seed=3)[:, channels : 2 * channels]
    groups = _GROUPS if channels % _GROUPS == 0 else 4
    x = x.contiguous(memory_format=torch.channels_last)
    return [x, weight, bias, groups, EPS, bool(silu), shift if shifted else None]


def _torch_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001  (as the operator has it)
    shift: Tensor | None,
) -> Tensor:
    value = x if shift is None else x + shift[:, :, None, None]
    value = F.group_norm(value, groups, weight, bias, eps)
    return F.silu(value) if silu else value


_GROUP_NORM = Operator(
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
    work=lambda arguments: (0, 2 * _nbytes(arguments[0])),
)


def _add_layer_norm_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    x, residual = (_random(*size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight, bias = (_random(size[-1], dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return [x, residual, 1 + 0.2 * weight, bias, EPS]


def _torch_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


_LAYER_NORM = Operator(
    name="add_layer_norm",
    body=add_layer_norm,
    also={},
    sizes={
        **{f"sd15 512 {t} x {c}": (2, t, c) for t, c in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))},
        **{f"sd21 768 {t} x {c}": (2, t, c) for t, c in ((9216, 320), (2304, 640), (576, 1280))},
        **{f"sdxl 1024 {t} x {c}": (2, t, c) for t, c in ((4096, 640), (1024, 1280))},
        "sdxl 1024 1024 x 1280, 16 rows": (16, 1024, 1280),
        "text 77 x 768": (2, 77, 768),
        "text 154 x 1280": (4, 154, 1280),
    },
    timed=(
        "sd15 512 4096 x 320",
        "sd15 512 1024 x 640",
        "sd15 512 256 x 1280",
        "sdxl 1024 4096 x 640",
        "sdxl 1024 1024 x 1280",
    ),
    tiny={"tiny": (2, 16, 40)},
    arguments=_add_layer_norm_arguments,
    check=oracles.check_add_layer_norm,
    rivals={"torch": _torch_add_layer_norm},
    work=lambda arguments: (0, 4 * _nbytes(arguments[0])),
)


# ---------------------------------------------------------------------------------------------------- activation, sampler


def _torch_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


_GEGLU = Operator(
    name="geglu",
    body=geglu,
    also={},
    sizes={
        **{f"sd15 512 {t} x {c}": (2, t, 2 * c) for t, c in ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120))},
        **{f"sd21 768 {t} x {c}": (2, t, 2 * c) for t, c in ((9216, 1280), (2304, 2560), (576, 5120))},
        **{f"sdxl 1024 {t} x {c}": (2, t, 2 * c) for t, c in ((4096, 2560), (1024, 5120))},
        "sd15 512 256 x 5120, 16 rows": (16, 256, 2 * 5120),
    },
    timed=(
        "sd15 512 4096 x 1280",
        "sd15 512 1024 x 2560",
        "sd15 512 256 x 5120",
        "sdxl 1024 4096 x 2560",
        "sdxl 1024 1024 x 5120",
    ),
    tiny={"tiny": (2, 16, 2 * 64)},
    arguments=lambda size, dtype, device: [2 * _random(*size, dtype=dtype, device=device)],
    check=oracles.check_geglu,
    rivals={"torch": _torch_geglu},
    work=lambda arguments: (0, _nbytes(arguments[0]) * 3 // 2),
)


def _sampler_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Slots that are guided, not guided and, of three or more, idle; every coefficient used, some of them zero."""
    slots, *latent = size
    entries, rows = 5, 2 * slots + 1

    def normal(*shape: int, seed: int) -> Tensor:
        return _random(*shape, dtype=torch.float32, device=device, seed=seed)

    # Small, so that the state stays finite however often a timing runs it.
    table = 0.2 * normal(entries, WIDTH, seed=1)
    table[:, 5::7] = 0
    table[:, Column.CLIP] = torch.tensor([math.inf, 0.5, 1.0, math.inf, 0.25], device=device)
    table[:, Column.PUSH] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device)
    table[:, Column.NEXT_INPUT_SCALE + 1 :] = 0
    numbers = torch.arange(slots)
    cond = torch.where((numbers % 4 == 2) & (slots > 2), -1, 2 * numbers)
    uncond = torch.where((cond < 0) | (numbers % 4 == 1), -1, 2 * numbers + 1)
    return [
        normal(slots, *latent, seed=2),
        normal(slots, *latent, seed=3),
        normal(3, slots, *latent, seed=4),
        normal(rows, *latent, seed=5).to(dtype),
        table,
        (numbers % entries).to(device),
        normal(entries, *latent, seed=6),
        torch.linspace(1, 7.5, slots).to(device),
        cond.to(device),
        uncond.to(device),
        normal(rows, *latent, seed=7).to(dtype),
    ]


def _sampler_work(arguments: list[Any]) -> tuple[int, int]:
    """Latents, saved and history read and written, the model's outputs and noise read, its inputs written."""
    x, saved, history, output, *_ = arguments
    return 0, 2 * _nbytes(x, saved, history, output) + _nbytes(x)


_SAMPLER = Operator(
    name="sampler_step",
    body=sampler_step,
    also={},
    sizes={
        f"{pixels} pixels, {slots} slots": (slots, 4, pixels // 8, pixels // 8)
        for pixels in (512, 768, 1024)
        for slots in (1, 4, 8)
    },
    timed=("512 pixels, 1 slots", "512 pixels, 8 slots", "1024 pixels, 1 slots"),
    tiny={"4 slots": (4, 4, 8, 8)},
    arguments=_sampler_arguments,
    check=oracles.check_sampler_step,
    rivals={},
    work=_sampler_work,
)

OPERATORS: dict[str, Operator] = {one.name: one for one in (_ATTENTION, _GROUP_NORM, _GEGLU, _LAYER_NORM, _SAMPLER)}
