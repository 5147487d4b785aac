"""The operators with the sizes that real models call them at, what torch itself has for the same, and the least work they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_suite import oracles
from gpu_suite.operator import EPS, Operator, Size, nbytes, random
from gpu_suite.oracles import Body
from gpu_suite.pictures import ADD_GROUP_NORM, GROUP_NORM, UPSAMPLE
from ldmrt.kernels.attention import attention, attention_reference, attention_triton
from ldmrt.kernels.geglu import geglu
from ldmrt.kernels.layer_norm import add_layer_norm
from ldmrt.kernels.sampler import WIDTH, Column, sampler_step

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
        merged = random(rows, query_tokens, 3 * width, dtype=dtype, device=device)
        query, key, value = merged.chunk(3, -1)
    else:
        query = random(rows, query_tokens, width, dtype=dtype, device=device)
        key, value = random(rows, key_tokens, 2 * width, dtype=dtype, device=device, seed=1).chunk(2, -1)
    return [query, key, value, heads, head**-0.5]


def _with_backend(backend: SDPBackend) -> Body:
    def run(*arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return attention_reference(*arguments)

    return run


def _attention_work(arguments: list[Any]) -> tuple[int, int]:
    query, key, value = arguments[:3]
    rows, query_tokens, width = query.shape
    return 4 * rows * query_tokens * key.shape[1] * width, nbytes(query, key, value, query)


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


# ---------------------------------------------------------------------------------------------------- layer norm


def _add_layer_norm_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """With the bias of the linear layer before."""
    *shape, summed = size
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight, bias, x_bias = (random(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (2, 3, 4))
    return [x, residual if summed else None, 1 + 0.2 * weight, bias, EPS, x_bias]


def _torch_add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + x_bias if residual is None else x + x_bias + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


_LAYER_NORM = Operator(
    name="add_layer_norm",
    body=add_layer_norm,
    also={},
    sizes={  # and whether there is a residual: the first norm of a transformer has none
        **{f"sd15 512 {t} x {c}": (2, t, c, 1) for t, c in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))},
        **{f"sd21 768 {t} x {c}": (2, t, c, 1) for t, c in ((9216, 320), (2304, 640), (576, 1280))},
        **{f"sdxl 1024 {t} x {c}": (2, t, c, 1) for t, c in ((4096, 640), (1024, 1280))},
        "sd15 512 4096 x 320, no residual": (2, 4096, 320, 0),
        "sdxl 1024 1024 x 1280, no residual": (2, 1024, 1280, 0),
        "sdxl 1024 1024 x 1280, 16 rows": (16, 1024, 1280, 1),
        "text 77 x 768": (2, 77, 768, 1),
        "text 154 x 1280": (4, 154, 1280, 1),
    },
    timed=(
        "sd15 512 4096 x 320",
        "sd15 512 1024 x 640",
        "sd15 512 256 x 1280",
        "sdxl 1024 4096 x 640",
        "sdxl 1024 1024 x 1280",
    ),
    tiny={"tiny": (2, 16, 40, 1), "no residual": (2, 16, 40, 0)},
    arguments=_add_layer_norm_arguments,
    check=oracles.check_add_layer_norm,
    rivals={"torch": _torch_add_layer_norm},
    work=lambda arguments: (0, 3 * nbytes(arguments[0]) + nbytes(arguments[1])),
)


# ---------------------------------------------------------------------------------------------------- activation, sampler


def _geglu_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """With the bias of the linear layer before."""
    return [2 * random(*size, dtype=dtype, device=device), random(size[-1], dtype=dtype, device=device, seed=1)]


def _torch_geglu(x: Tensor, x_bias: Tensor) -> Tensor:
    value, gate = (x + x_bias).chunk(2, dim=-1)
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
    arguments=_geglu_arguments,
    check=oracles.check_geglu,
    rivals={"torch": _torch_geglu},
    work=lambda arguments: (0, nbytes(arguments[0]) * 3 // 2),
)


def _sampler_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Slots that are guided, not guided and, of three or more, idle; every coefficient used, some of them zero."""
    slots, *latent = size
    entries, rows = 5, 2 * slots + 1

    def normal(*shape: int, seed: int) -> Tensor:
        return random(*shape, dtype=torch.float32, device=device, seed=seed)

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
    return 0, 2 * nbytes(x, saved, history, output) + nbytes(x)


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

OPERATORS: dict[str, Operator] = {
    one.name: one for one in (_ATTENTION, GROUP_NORM, ADD_GROUP_NORM, UPSAMPLE, _GEGLU, _LAYER_NORM, _SAMPLER)
}
