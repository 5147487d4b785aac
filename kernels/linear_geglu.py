"""A linear layer and the gated activation after it (Shazeer 2020, arXiv 2002.05202): the transformer's feed-forward layer, its first
half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, native
from ldmrt.kernels.geglu import geglu, geglu_reference
from ldmrt.kernels.linear import is_packed, linear_native
from ldmrt.kernels.tuning import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Body = Literal["triton", "library"]

# A column's offset in the weights is 32-bit.
_MAX_WEIGHTS = 2**31
_MANY_ROWS, _ROWS_A_TERM = 1024, 1.6


@dataclass(frozen=True, slots=True)
class Problem:
    """What this is tuned by: x as (rows, inner), and a result of (rows, width)."""

    rows: int
    inner: int
    width: int
    dtype: torch.dtype


class Tiles(NamedTuple):
    """How the Triton body is cut up: a program computes `block_m` x `block_n` elements, `block_k` terms of each at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """A body, `triton`, or `library`: the library's matrix product and then `geglu`; and the tiles of the first."""

    body: Body
    tiles: Tiles


# Two sums of 128 x 128 numbers are half of a multiprocessor's registers. Shared memory holds `num_stages` blocks of x and of both
# halves of the weights: 227 KiB on 9.0 and 10.0, 163 on 8.0, 99 elsewhere.
_WIDE = ((128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3))
_NARROW = ((128, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 128, 32, 8, 3), (64, 128, 32, 4, 4))


def candidates(arch: int, problem: Problem) -> list[Choice]:
    """The choices worth measuring for a problem; the first is the default."""
    tiles = [Tiles(*each) for each in (_WIDE if 90 <= arch < 120 else _NARROW)]
    fitting = [each for each in tiles if problem.width % each.block_n == 0 and problem.inner % each.block_k == 0]
    library = Choice("library", tiles[0])
    triton = [Choice("triton", each) for each in fitting]
    if problem.dtype == torch.float32 or 2 * problem.width * problem.inner >= _MAX_WEIGHTS:
        return [library]
    # Measured on an H100 and an H200 (benchmarks/results/gpu.jsonl): with long sums and few rows the library's product is so much
    # the faster that it may write its result.
    triton_first = arch == 90 and problem.rows >= max(_MANY_ROWS, _ROWS_A_TERM * problem.inner)
    return [*triton, library] if triton_first else [library, *triton]


OPERATOR: Operator[Problem, Choice] = Operator(
    "linear_geglu",
    Problem,
    candidates,
    source="linear_geglu.forward",
    launches=lambda choice: choice.body == "triton",
)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[..., :I] * gelu(y[..., I:]) of y = x weight^T + bias, with the erf GELU.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: (2 I, K) of x's dtype; or what `ldmrt.kernels.linear.arranged_gated` made of it.
        bias: (2 I,), any float dtype, or None.

    Returns:
        (..., I) of x's dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: x has another dtype, or weight is not of x's.
    """
    if is_packed(weight):
        return linear_native(x, weight, bias, gated=True)
    _check(x, weight, bias)
    if launch.ready(x.device) and x.numel() > 0:
        problem = _problem(x, weight)
        choice = OPERATOR.choose(launch.architecture(x.device), problem, (x, weight, bias))
        if choice.body == "triton":
            return linear_geglu_triton(x, weight, bias, tiles=choice.tiles)
    elif not native.serves(x):
        return linear_geglu_reference(x, weight, bias)
    return geglu(F.linear(x, weight), bias)


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_geglu` in plain torch."""
    return geglu_reference(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))


def linear_geglu_triton(x: Tensor, weight: Tensor, bias: Tensor | None, *, tiles: Tiles) -> Tensor:
    """`linear_geglu` by kernels/gpu/linear_geglu.py; the tiles must divide the widths."""
    x, weight = x.contiguous(), weight.contiguous()
    problem = _problem(x, weight)
    result = x.new_empty((*x.shape[:-1], problem.width))
    launch.run(
        "linear_geglu.forward",
        (-(-problem.rows // tiles.block_m) * (problem.width // tiles.block_n),),
        (x, weight, x if bias is None else bias.contiguous(), result, problem.rows),
        {
            "HAS_BIAS": bias is not None,
            "INNER": problem.inner,
            "WIDTH": problem.width,
            "WHOLE": problem.rows % tiles.block_m == 0,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "BAND": 8,
            # Tensor cores would round float32 to 10 bits of mantissa.
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return result


def _problem(x: Tensor, weight: Tensor) -> Problem:
    return Problem(x.numel() // x.shape[-1], x.shape[-1], weight.shape[0] // 2, x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1] or x.shape[-1] == 0:
        raise ValueError(
            f"linear_geglu: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, expected (2 I, K) for (..., K)"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"linear_geglu: x is {x.dtype}, expected float32, bfloat16 or float16")
    if weight.dtype != x.dtype:
        raise TypeError(f"linear_geglu: weight is {weight.dtype}, expected {x.dtype} as x")
    for name, tensor, shape in (("weight", weight, tuple(weight.shape)), ("bias", bias, (weight.shape[0],))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"linear_geglu: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"linear_geglu: {name} is on {tensor.device}, expected {x.device} as x")
