"""Residual addition and the layer norm that follows it, in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, memory, native
from ldmrt.kernels.blocks import power_of_two
from ldmrt.kernels.tuning import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A row is held in registers; beyond this many elements (padded to a power of two) it would no longer fit.
MAX_WIDTH = 16384


@dataclass(frozen=True, slots=True)
class Problem:
    """What a residual sum with layer norm is tuned by: x as (rows, width)."""

    rows: int
    width: int
    dtype: torch.dtype


class Configuration(NamedTuple):
    """How the Triton body is cut up: a program computes `rows` whole rows, a power of two."""

    rows: int
    num_warps: int


def candidates(arch: int, rows: int, width: int) -> list[Configuration]:
    """The configurations worth measuring for (rows, width); the first is the default.

    Few warps, so that they need not wait for each other in the sums, of enough loads to hide the memory's latency. The order is that
    of times on an H100 and an H200 (benchmarks/results/gpu.jsonl).
    """
    del arch  # the same for all: nothing but memory matters
    padded = power_of_two(width)
    ways = ((16, 2), (16, 1), (8, 1), (32, 1)) if padded <= 512 else ((32, 1), (16, 1), (16, 2), (8, 1))
    found = []
    for per_thread, height in ways if padded <= 1024 else ((16, 1), (16, 2), (8, 1), (32, 1)):
        num_warps = min(16, max(1, height * padded // (32 * per_thread)))
        found.append(Configuration(min(height, power_of_two(rows)), num_warps))
    return list(dict.fromkeys(found))


OPERATOR: Operator[Problem, Configuration] = Operator(
    "add_layer_norm",
    Problem,
    lambda arch, problem: candidates(arch, problem.rows, problem.width),
    source="layer_norm.forward",
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """X + residual + x_bias, and its layer norm over the last dimension.

    Args:
        x: (..., C), float32, bfloat16 or float16.
        residual: x's shape and dtype, or None.
        weight: (C,), any float dtype, or None.
        bias: (C,), any float dtype, or None.
        eps: added to the variance.
        x_bias: (C,), any float dtype, or None: what the linear layer before left out.

    Returns:
        The total, rounded to x's dtype, and the layer norm of the rounded total, computed in float32 and rounded once; both
        contiguous and of x's shape and dtype.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: x has another dtype, or residual is not of x's.
    """
    _check(x, residual, weight, bias, x_bias)
    if launch.ready(x.device) and x.shape[-1] <= MAX_WIDTH:
        return add_layer_norm_triton(x, residual, weight, bias, eps, x_bias)
    if native.serves(x):
        return add_layer_norm_native(x, residual, weight, bias, eps, x_bias)
    return add_layer_norm_reference(x, residual, weight, bias, eps, x_bias)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    added = [each.float() for each in (residual, x_bias) if each is not None]
    total = sum(added, x.to(torch.float32, copy=True)).to(x.dtype).contiguous()
    scale = None if weight is None else weight.float()
    shift = None if bias is None else bias.float()
    return total, F.layer_norm(total.float(), total.shape[-1:], scale, shift, eps).to(x.dtype)


def add_layer_norm_native(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by kernels/cpu/layer_norm.cpp."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    scale, final, added = (native.vector(each) for each in (weight, bias, x_bias))
    total, normed = memory.empty_like(x), memory.empty_like(x)
    width = x.shape[-1]
    if x.numel() > 0:
        element, rows = native.ELEMENTS[x.dtype], x.numel() // width
        native.run("ldmrt_layer_norm", x, residual, scale, final, added, total, normed, element, rows, width, eps)
    return total, normed


def add_layer_norm_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
    *,
    chosen: Configuration | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by kernels/gpu/layer_norm.py, with a chosen configuration or that of the problem."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return total, normed
    width = x.shape[-1]
    rows = x.numel() // width
    arguments = (x, residual, weight, bias, eps, x_bias)
    plan = chosen or OPERATOR.choose(launch.architecture(x.device), Problem(rows, width, x.dtype), arguments)
    launch.run(
        "layer_norm.forward",
        (-(-rows // plan.rows),),
        (
            x,
            x if residual is None else residual,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            x if x_bias is None else x_bias.contiguous(),
            total,
            normed,
            rows,
            float(eps),
        ),
        {
            "HAS_RESIDUAL": residual is not None,
            "HAS_X_BIAS": x_bias is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "WIDTH": width,
            "ROWS": plan.rows,
            "COLUMNS": power_of_two(width),
        },
        num_warps=plan.num_warps,
    )
    return total, normed


def _check(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"add_layer_norm: x has shape {tuple(x.shape)}, expected (..., C) with C not 0")
    if x.dtype not in DTYPES:
        raise TypeError(f"add_layer_norm: x is {x.dtype}, expected float32, bfloat16 or float16")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"add_layer_norm: residual is {residual.dtype}, expected {x.dtype} as x")
    expected = (
        ("residual", residual, tuple(x.shape)),
        ("weight", weight, (x.shape[-1],)),
        ("bias", bias, (x.shape[-1],)),
        ("x_bias", x_bias, (x.shape[-1],)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"add_layer_norm: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"add_layer_norm: {name} is on {tensor.device}, expected {x.device} as x")
