"""The gated activation of the transformer's feed-forward layer (Shazeer 2020, arXiv 2002.05202), in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, memory, native
from ldmrt.kernels.blocks import columns_of, power_of_two
from ldmrt.kernels.tuning import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a GEGLU is tuned by: the size of its result."""

    rows: int
    width: int
    dtype: torch.dtype


class Configuration(NamedTuple):
    """How the Triton body is cut up: a program computes `rows` x `columns` elements, both powers of two."""

    rows: int
    columns: int
    num_warps: int


def candidates(arch: int, rows: int, width: int, itemsize: int) -> list[Configuration]:
    """The configurations worth measuring for a result of (rows, width); the first is the default.

    Each thread moves one or two vectors of 16 bytes at a time: what hides the memory's latency is many programs.
    """
    del arch  # the same for all: nothing but memory matters
    columns = columns_of(width)
    vector = 16 // itemsize
    found = []
    for num_warps, vectors in ((4, 1), (4, 2), (8, 1), (8, 2)):
        height = 32 * num_warps * vector * vectors // columns
        if height >= 1:
            found.append(Configuration(min(height, power_of_two(rows)), columns, num_warps))
    return list(dict.fromkeys(found))


OPERATOR: Operator[Problem, Configuration] = Operator(
    "geglu",
    Problem,
    lambda arch, problem: candidates(arch, problem.rows, problem.width, problem.dtype.itemsize),
    source="geglu.forward",
)


def geglu(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """y[..., :I] * gelu(y[..., I:]) of y = x + x_bias, with the erf GELU, computed in float32 and rounded once.

    Args:
        x: (..., 2 I), float32, bfloat16 or float16.
        x_bias: (2 I,), any float dtype, or None: what the linear layer before left out.

    Returns:
        (..., I) of x's dtype, contiguous.

    Raises:
        ValueError: the last dimension is not even, or there is none; or x_bias does not fit.
        TypeError: x has another dtype.
    """
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"geglu: x has shape {tuple(x.shape)}, expected (..., 2 I)")
    if x.dtype not in DTYPES:
        raise TypeError(f"geglu: x is {x.dtype}, expected float32, bfloat16 or float16")
    if x_bias is not None and (x_bias.shape != x.shape[-1:] or x_bias.device != x.device):
        raise ValueError(
            f"geglu: x_bias is {tuple(x_bias.shape)} on {x_bias.device}, expected {tuple(x.shape[-1:])} on {x.device} as x"
        )
    if launch.ready(x.device):
        return geglu_triton(x, x_bias)
    if native.serves(x):
        return geglu_native(x, x_bias)
    return geglu_reference(x, x_bias)


def geglu_reference(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """`geglu` in plain torch."""
    total = x.float() if x_bias is None else x.float() + x_bias.float()
    value, gate = total.chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def geglu_native(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """`geglu` by kernels/cpu/geglu.cpp."""
    x, added = x.contiguous(), native.vector(x_bias)
    width = x.shape[-1] // 2
    result = memory.new_empty(x, (*x.shape[:-1], width))
    if result.numel() > 0:
        native.run("ldmrt_geglu", x, added, result, native.ELEMENTS[x.dtype], result.numel() // width, width)
    return result


def geglu_triton(x: Tensor, x_bias: Tensor | None = None, *, chosen: Configuration | None = None) -> Tensor:
    """`geglu` by kernels/gpu/geglu.py, with a chosen configuration or that of the problem."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    result = x.new_empty((*x.shape[:-1], width))
    if result.numel() == 0:
        return result
    rows = result.numel() // width
    plan = chosen or OPERATOR.choose(launch.architecture(x.device), Problem(rows, width, x.dtype), (x, x_bias))
    launch.run(
        "geglu.forward",
        (-(-rows // plan.rows), -(-width // plan.columns)),
        (x, x if x_bias is None else x_bias.contiguous(), result, rows),
        {"HAS_X_BIAS": x_bias is not None, "WIDTH": width, "ROWS": plan.rows, "COLUMNS": plan.columns},
        num_warps=plan.num_warps,
    )
    return result
