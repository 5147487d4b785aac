"""A residual sum, the bias of the layer before it, and nearest-neighbour upsampling: what a U-Net does between its levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldmrt.kernels import launch, memory, native
from ldmrt.kernels.blocks import columns_of, power_of_two
from ldmrt.kernels.tuning import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FACTOR = 8  # each pixel's copies are written one by one


@dataclass(frozen=True, slots=True)
class Problem:
    """What this is tuned by: the pixels of all rows, before upsampling."""

    pixels: int
    channels: int
    factor: int
    dtype: torch.dtype


class Configuration(NamedTuple):
    """How the Triton body is cut up: a program takes `pixels` x `columns` elements, both powers of two."""

    pixels: int
    columns: int
    num_warps: int


def candidates(problem: Problem) -> list[Configuration]:
    """The configurations worth measuring; the first is the default.

    Each thread moves one or two vectors of 16 bytes at a time: what hides the memory's latency is many programs.
    """
    columns = columns_of(problem.channels)
    vector = 16 // problem.dtype.itemsize
    found = []
    for num_warps, vectors in ((4, 1), (4, 2), (8, 1), (8, 2)):
        pixels = max(1, 32 * num_warps * vector * vectors // columns)
        found.append(Configuration(min(pixels, power_of_two(problem.pixels)), columns, num_warps))
    return list(dict.fromkeys(found))


OPERATOR: Operator[Problem, Configuration] = Operator(
    "add_upsample", Problem, lambda arch, problem: candidates(problem), source="upsample.forward"
)


def add_upsample(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> Tensor:
    """X + residual + x_bias, with `factor` x `factor` copies of every pixel; summed in float32 and rounded once.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16. Fast if channels last, and the residual too.
        residual: x's shape and dtype, or None.
        x_bias: (C,), any float dtype, or None.
        factor: 1 to `MAX_FACTOR`.

    Returns:
        (N, C, factor H, factor W), channels last.

    Raises:
        ValueError: shapes or devices do not fit together, or the factor is none of those.
        TypeError: x has another dtype, or residual is not of x's.
    """
    _check(x, residual, x_bias, factor)
    if launch.ready(x.device):
        return add_upsample_triton(x, residual, x_bias, factor)
    if native.serves(x):
        return add_upsample_native(x, residual, x_bias, factor)
    return add_upsample_reference(x, residual, x_bias, factor)


def add_upsample_reference(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> Tensor:
    """`add_upsample` in plain torch."""
    total = x
    if residual is not None or x_bias is not None:
        value = x.float()
        if residual is not None:
            value = value + residual.float()
        if x_bias is not None:
            value = value + x_bias.float()[:, None, None]
        total = value.to(x.dtype)
    result = _empty(x, factor)
    rows, channels, height, width = x.shape
    squares = result.movedim(1, -1).view(rows, height, factor, width, factor, channels)
    squares.copy_(total.movedim(1, -1)[:, :, None, :, None])
    return result


def add_upsample_native(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> Tensor:
    """`add_upsample` by kernels/cpu/upsample.cpp."""
    result = _empty(x, factor)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    if result.numel() > 0:
        sizes = (rows, height, width, channels, factor)
        native.run("ldmrt_upsample", x, residual, native.vector(x_bias), result, native.ELEMENTS[x.dtype], *sizes)
    return result


def add_upsample_triton(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    factor: int,
    *,
    chosen: Configuration | None = None,
) -> Tensor:
    """`add_upsample` by kernels/gpu/upsample.py, with a chosen configuration or that of the problem."""
    result = _empty(x, factor)
    if result.numel() == 0:
        return result
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    pixels = rows * height * width
    arguments = (x, residual, x_bias, factor)
    problem = Problem(pixels, channels, factor, x.dtype)
    plan = chosen or OPERATOR.choose(launch.architecture(x.device), problem, arguments)
    launch.run(
        "upsample.forward",
        (-(-pixels // plan.pixels), -(-channels // plan.columns)),
        (
            x,
            x if residual is None else residual,
            x if x_bias is None else x_bias.contiguous(),
            result,
            pixels,
            width,
        ),
        {
            "HAS_RESIDUAL": residual is not None,
            "HAS_X_BIAS": x_bias is not None,
            "FACTOR": factor,
            "CHANNELS": channels,
            "PIXELS": plan.pixels,
            "COLUMNS": plan.columns,
        },
        num_warps=plan.num_warps,
    )
    return result


def _empty(x: Tensor, factor: int) -> Tensor:
    rows, channels, height, width = x.shape
    return memory.new_empty(x, (rows, factor * height, factor * width, channels)).movedim(-1, 1)


def _check(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"add_upsample: x has shape {tuple(x.shape)}, expected (N, C, H, W)")
    if not 1 <= factor <= MAX_FACTOR:
        raise ValueError(f"add_upsample: factor is {factor}, expected 1 to {MAX_FACTOR}")
    if x.dtype not in DTYPES:
        raise TypeError(f"add_upsample: x is {x.dtype}, expected float32, bfloat16 or float16")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"add_upsample: residual is {residual.dtype}, expected {x.dtype} as x")
    for name, tensor, shape in (("residual", residual, tuple(x.shape)), ("x_bias", x_bias, (x.shape[1],))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"add_upsample: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"add_upsample: {name} is on {tensor.device}, expected {x.device} as x")
