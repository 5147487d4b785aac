"""Attention over heads that lie side by side in the last dimension: softmax(scale q k^T + mask) v.

The inputs are what the projections made, (N, tokens, heads * head size), or slices of one merged projection: no body
transposes or copies them. The Triton body is flash attention (Dao et al. 2023, arXiv 2307.08691): the scores exist only
block by block, in float32.

A query whose keys are all masked gives zeros, in every body, as torch's does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, memory, native
from ldmrt.kernels.configurations import ATTENTION, Problem, Tiles

MAX_HEAD_SIZE = 512  # of the Triton body: its result stays in registers

# A row of so few scores torch's own body has done before ours has packed its keys: measured on a CPU at 256 x 256 and below
# (benchmarks/results/cpu_operators.jsonl).
_FEW_SCORES = 1 << 16

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool = False,  # noqa: FBT001, FBT002
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the keys of its row.

    Args:
        query: (N, Tq, heads * D), any float dtype; its last stride is 1, the others are free.
        key: (N, Tk, heads * D), as query.
        value: (N, Tk, heads * D), as query.
        heads: how many heads lie side by side.
        scale: what q k^T is multiplied with, above 0.
        causal: query i sees keys 0 to i only.
        mask: broadcastable to (N, heads, Tq, Tk): bool, True where a key takes part, or added to the scaled scores
            (float32 or query's dtype).

    Returns:
        (N, Tq, heads * D), contiguous, of query's dtype.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, strides, devices or the scale do not fit.
    """
    _check(query, key, value, heads, scale, mask)
    if launch.ready(query.device) and _fits_triton(query, key, value, heads):
        arguments = (query, key, value, heads, scale, causal, mask)
        choice = ATTENTION.choose(launch.architecture(query.device), _problem(query, key, heads), arguments)
        if choice.body == "triton":
            return attention_triton(query, key, value, heads, scale, causal, mask, choice.tiles)
    elif not causal and mask is None and query.shape[1] * key.shape[1] > _FEW_SCORES and native.serves(query):
        return attention_native(query, key, value, heads, scale)
    return attention_reference(query, key, value, heads, scale, causal, mask)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool = False,  # noqa: FBT001, FBT002
    mask: Tensor | None = None,
) -> Tensor:
    """`attention` by torch's scaled_dot_product_attention, which on a GPU is cuDNN's or FlashAttention where they apply."""
    q, k, v = (tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2) for tensor in (query, key, value))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if causal:
            # torch takes one or the other.
            seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
            mask = mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
    return result.transpose(1, 2).flatten(2).contiguous()


def attention_native(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """`attention` by kernels/cpu/attention.h, without masks. float32, bfloat16 and float16; computes in float32, but for bfloat16,
    where the processor multiplies that: the weights are then rounded to it.
    """
    # Tokens that are one and the same take no memory, however many there are; packed they would.
    query, key, value = (each.contiguous() if 0 in each.stride() else each for each in (query, key, value))
    result = memory.new_empty(query, query.shape)
    rows, tokens, width = query.shape
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:2]]
    native.run(
        "ldmrt_attention",
        query, key, value, result, native.ELEMENTS[query.dtype],
        rows, tokens, key.shape[1], heads, width // heads, *strides, scale,
    )  # fmt: skip
    return result


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool = False,  # noqa: FBT001, FBT002
    mask: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`attention` by kernels/gpu/attention.py, in the tiles given or those that are chosen for the problem.

    float32, bfloat16 and float16, heads of up to `MAX_HEAD_SIZE`.
    """
    rows, query_tokens, width = query.shape
    key_tokens, head_size = key.shape[1], width // heads
    arch = launch.architecture(query.device)
    if tiles is None:
        tiles = ATTENTION.choose(arch, _problem(query, key, heads)).tiles
    output = query.new_empty(rows, query_tokens, width)
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(rows, heads, query_tokens, key_tokens)
        mask_strides = mask.stride()
    part_1, part_2, value_part_2 = _parts(head_size, arch)
    launch.run(
        "attention.forward",
        (-(-query_tokens // tiles.block_m), heads, rows),
        [
            query,
            key,
            value,
            query if mask is None else mask,
            output,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *mask_strides,
            query_tokens,
            key_tokens,
            float(scale),
        ],
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "PART_1": part_1,
            "PART_2": part_2,
            "VALUE_PART_2": value_part_2,
            "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
            "CAUSAL": causal,
            "TAIL": causal or key_tokens % tiles.block_n != 0,
            # Tensor cores would round float32 to 10 bits of mantissa.
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return output


def _problem(query: Tensor, key: Tensor, heads: int) -> Problem:
    return Problem(query.shape[2] // heads, heads, query.shape[1], key.shape[1], query.dtype)


def _parts(head_size: int, arch: int) -> tuple[int, int, int]:
    """Powers of two that cover a head: the first part, the second or 0, and the second as the values have it.

    A dot product sums over 16 at least, so the 8 of 40 = 32 + 8 are padded for the scores. As columns of the values, 8 are
    enough for mma.sync; on 9.0 and 10.0 the dot product would leave wgmma and tcgen05 for that.
    """
    part_1 = max(16, 1 << (head_size.bit_length() - 1))
    rest = head_size - part_1
    if rest <= 0:
        return part_1, 0, 0
    part_2 = 1 << (rest - 1).bit_length()
    return part_1, max(16, part_2), max(16 if 90 <= arch < 120 else 8, part_2)


def _fits_triton(query: Tensor, key: Tensor, value: Tensor, heads: int) -> bool:
    """Whether the dtype and the size are the kernel's, which counts elements within a row of the batch in 32 bits."""
    return (
        query.dtype in _DTYPES
        and query.shape[2] // heads <= MAX_HEAD_SIZE
        and all(tensor.shape[1] * abs(tensor.stride(1)) < 2**31 for tensor in (query, key, value))
        and query.shape[1] * key.shape[1] < 2**31
    )


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, mask: Tensor | None) -> None:
    if query.dim() != 3 or query.numel() == 0 or heads < 1 or query.shape[2] % heads:
        raise ValueError(
            f"attention: query has shape {tuple(query.shape)}, expected (N, tokens, {heads} heads * size), none of them 0"
        )
    if not query.is_floating_point():
        raise TypeError(f"attention: query is {query.dtype}, expected a float dtype")
    if not 0 < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}, expected a finite number above 0")
    rows, query_tokens, width = query.shape
    if key.dim() != 3 or key.shape[1] == 0:
        raise ValueError(
            f"attention: key has shape {tuple(key.shape)}, expected ({rows}, tokens, {width}), at least 1 token"
        )
    key_tokens = key.shape[1]
    for name, tensor, shape in (
        ("query", query, (rows, query_tokens, width)),
        ("key", key, (rows, key_tokens, width)),
        ("value", value, (rows, key_tokens, width)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"attention: {name} is {tensor.dtype}, expected {query.dtype} as query")
        if tensor.device != query.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, expected {query.device} as query")
        if tensor.stride(2) != 1 and width > 1:
            raise ValueError(f"attention: {name} has stride {tensor.stride(2)} in its last dimension, expected 1")
    if mask is not None:
        _check_mask(mask, query, (rows, heads, query_tokens, key_tokens))


def _check_mask(mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) != 4 or any(found not in {1, expected} for found, expected in zip(padded, shape, strict=True)):
        raise ValueError(f"attention: mask has shape {tuple(mask.shape)}, expected one that broadcasts to {shape}")
    if mask.dtype not in {torch.bool, torch.float32, query.dtype}:
        raise TypeError(f"attention: mask is {mask.dtype}, expected bool, float32 or {query.dtype} as query")
    if mask.device != query.device:
        raise ValueError(f"attention: mask is on {mask.device}, expected {query.device} as query")
