"""Convolution of pictures without a bias: the library's, or, where a picture is so small that a library leaves most of a GPU idle,
one that splits the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, memory, native, winograd
from ldmrt.kernels.linear import PANEL, STEP, is_packed, pack, takes_packed
from ldmrt.kernels.tuning import Operator

Body = Literal["triton", "library"]

# Offsets within the weights are 32-bit.
_MAX_WEIGHTS = 2**31
_MAX_STEP = 2**31
# A result of more pixels than this fills any GPU with the tiles of a library.
_FEW_PIXELS = 1024
_TINY = 128
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """What this is tuned by: x as (rows, channels, height, width), a square filter, and the channels of the result."""

    rows: int
    channels: int
    out: int
    height: int
    width: int
    side: int
    stride: int
    dtype: torch.dtype


class Tiles(NamedTuple):
    """How the Triton body is cut up: a program computes `block_m` pixels of `block_n` channels, `block_k` terms at a time; the terms
    are split over `splits` programs.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """A body, `triton` or `library` (cuDNN, oneDNN), and the tiles of the first."""

    body: Body
    tiles: Tiles


_SHAPES = ((64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (64, 64, 64, 4, 5), (128, 64, 64, 4, 4))


def candidates(arch: int, problem: Problem) -> list[Choice]:
    """The choices worth measuring for a problem; the first is the default."""
    pixels = problem.rows * (problem.height // problem.stride) * (problem.width // problem.stride)
    library = Choice("library", Tiles(*_SHAPES[0][:3], 1, *_SHAPES[0][3:]))
    weights = problem.out * problem.channels * problem.side**2
    if problem.dtype == torch.float32 or not 90 <= arch < 120 or pixels > _FEW_PIXELS or weights >= _MAX_WEIGHTS:
        return [library]
    found = [library]
    for block_m, block_n, block_k, num_warps, num_stages in _SHAPES:
        if problem.out % block_n or problem.channels % block_k or block_m > max(64, pixels):
            continue
        programs = -(-pixels // block_m) * (problem.out // block_n)
        # One or two programs for every multiprocessor.
        for wanted in (264, 132):
            splits = min(16, max(1, wanted // programs))
            found.append(Choice("triton", Tiles(block_m, block_n, block_k, splits, num_warps, num_stages)))
    # Measured on an H100 and an H200 (benchmarks/results/gpu.jsonl): 17 microseconds to cuDNN's 23 at 8 x 8; at 16 x 16 it is behind.
    triton_first = arch == 90 and pixels <= _TINY and problem.side > 1 and len(found) > 1
    return list(dict.fromkeys([*found[1:], library] if triton_first else found))


OPERATOR: Operator[Problem, Choice] = Operator(
    "conv2d", Problem, candidates, source="convolution.forward", launches=lambda choice: choice.body == "triton"
)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve x with a square filter.

    Args:
        x: (N, C, H, W), any float dtype. Fast if channels last, and the weight too.
        weight: (O, C, S, S) of x's dtype; or what `arranged_weight` made of it.
        stride: of the filter, in both directions.
        padding: zeros on every side.

    Returns:
        (N, O, H', W') of x's dtype.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: weight is not of x's dtype.
    """
    if is_packed(weight):
        return conv2d_native(x, weight, stride, padding)
    if winograd.is_packed(weight):
        return winograd.conv2d_winograd(x, weight)
    _check(x, weight, stride, padding)
    if weight.is_mkldnn:
        return _conv2d_arranged(x, weight, stride, padding)
    if launch.ready(x.device) and padding == weight.shape[2] // 2 and x.numel() > 0:
        choice = OPERATOR.choose(
            launch.architecture(x.device), _problem(x, weight, stride), (x, weight, stride, padding)
        )
        if choice.body == "triton":
            return conv2d_triton(x, weight, stride, padding, tiles=choice.tiles)
    return conv2d_reference(x, weight, stride, padding)


def conv2d_reference(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """`conv2d` by torch, which on a GPU is cuDNN's."""
    return F.conv2d(x, weight, None, stride, padding)


def arranged_weight(weight: Tensor, stride: int, padding: int, tile: winograd.Tile | None = None) -> Tensor:
    """Weights in the order in which a native body or, where none takes them, oneDNN's convolution reads them.

    A tensor that only `conv2d` of that stride and padding can read; `copy_` from another one changes it in place. Weights
    that are not on a CPU, or of a dtype that none takes there, come back as they are.

    Args:
        weight: (O, C, S, S).
        stride: of the filter.
        padding: on every side.
        tile: by which to convolve float32 (`ldmrt.kernels.winograd.tile`), if by one at all.
    """
    if weight.dim() == 4 and takes_packed(weight, weight.shape[1]):
        return pack(weight.movedim(1, -1).flatten(1))
    if tile is not None:
        return winograd.pack(weight, tile)
    return library_weight(weight, stride, padding)


def library_weight(weight: Tensor, stride: int, padding: int) -> Tensor:
    """Weights in the order in which oneDNN's convolution reads them, which else it makes anew at every call; opaque.

    Raises:
        ValueError: there is no such convolution; oneDNN itself may divide by the stride.
    """
    if weight.device.type != "cpu" or not _takes(weight.dtype):
        return weight
    if weight.dim() != 4 or 0 in weight.shape or not 1 <= stride < _MAX_STEP or not 0 <= padding < _MAX_STEP:
        raise ValueError(f"conv2d: weight has shape {tuple(weight.shape)}, stride is {stride}, padding {padding}")
    sides = [stride] * 2, [1] * 2
    made: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), [padding] * 2, *sides, 1)
    return made


def conv2d_native(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """`conv2d` by kernels/cpu/matmul_amx.cpp. bfloat16, weights packed.

    Raises:
        ValueError: weight is not of x's channels or dtype, or stride and padding do not fit.
    """
    rows, channels, height, width = x.shape
    side = math.isqrt(weight.shape[1] * STEP // max(1, channels))
    fits = 0 < side * side * channels == weight.shape[1] * STEP and channels % STEP == 0
    if not fits or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"conv2d: x is {tuple(x.shape)} {x.dtype}, the packed weight is of other channels or dtype")
    _check_sides(x, side, stride, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    out = weight.shape[0] * PANEL
    result = memory.new_empty(x, (rows, out_height, out_width, out))
    if result.numel() > 0:
        native.run("ldmrt_conv2d", x, weight, result, rows, height, width, channels, out, side, stride, padding)
    return result.movedim(-1, 1)


def _takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _conv2d_arranged(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    sides = [padding] * 2, [stride] * 2, [1] * 2
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, None, *sides, 1, "none", [], "")
    return result


def conv2d_triton(x: Tensor, weight: Tensor, stride: int, padding: int, *, tiles: Tiles) -> Tensor:
    """`conv2d` by kernels/gpu/convolution.py; the tiles must divide the channels on both sides."""
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    (rows, channels, height, width), (out, _, side, _) = x.shape, weight.shape
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    result = x.new_empty((rows, out_height, out_width, out))
    pixels = rows * out_height * out_width
    partial = result if tiles.splits == 1 else x.new_empty((tiles.splits, pixels, out), dtype=torch.float32)
    launch.run(
        "convolution.forward",
        (-(-pixels // tiles.block_m), out // tiles.block_n, tiles.splits),
        (x, weight, partial, pixels, height, width, out_height, out_width),
        {
            "CHANNELS": channels,
            "OUT": out,
            "SIDE": side,
            "STRIDE": stride,
            "PADDING": padding,
            "SPLITS": tiles.splits,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            # Tensor cores would round float32 to 10 bits of mantissa.
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if partial is not result:
        elements = pixels * out
        launch.run(
            "convolution.gather",
            (-(-elements // _BLOCK),),
            (partial, result, elements),
            {"SPLITS": tiles.splits, "BLOCK": _BLOCK},
            num_warps=4,
        )
    return result.movedim(-1, 1)


def _problem(x: Tensor, weight: Tensor, stride: int) -> Problem:
    rows, channels, height, width = x.shape
    return Problem(rows, channels, weight.shape[0], height, width, weight.shape[2], stride, x.dtype)


def _check(x: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"conv2d: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, expected (N, C, H, W) and (O, C, S, S)"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"conv2d: weight is {weight.dtype}, expected {x.dtype} as x")
    if weight.device != x.device:
        raise ValueError(f"conv2d: weight is on {weight.device}, expected {x.device} as x")
    _check_sides(x, weight.shape[2], stride, padding)


def _check_sides(x: Tensor, side: int, stride: int, padding: int) -> None:
    # A native body takes 64 bits of a number and no more.
    if not 1 <= stride < _MAX_STEP or not 0 <= padding < _MAX_STEP or min(x.shape[2:]) + 2 * padding < side:
        raise ValueError(
            f"conv2d: stride {stride} and padding {padding} do not fit {tuple(x.shape)} and a filter of {side}"
        )
