"""What a U-Net puts together between its blocks, and the group norm of it: a residual sum, the bias of the layer before, and
the skip connection behind it, in one operator. The kernels are those of kernels/group_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldmrt.kernels import group_norm, launch, memory, native
from ldmrt.kernels.group_norm import DTYPES, MAX_ROW, Configuration, group_norm_silu_reference
from ldmrt.kernels.tuning import Operator


@dataclass(frozen=True, slots=True)
class Problem:
    """What this is tuned by: the total as (rows, channels, spatial), and what it is put together from."""

    rows: int
    channels: int
    groups: int
    spatial: int
    width: int
    residual: bool
    dtype: torch.dtype
    channels_last: bool


# Numbers of a tile in a thread: so many, what is added to them or lies behind them, and their sums do not fit into its registers.
_CROWDED = 64


def _candidates(arch: int, problem: Problem) -> list[Configuration]:
    found = group_norm.candidates(
        arch,
        problem.rows,
        problem.channels,
        problem.groups,
        problem.spatial,
        problem.dtype.itemsize,
        channels_last=problem.channels_last,
    )
    return list(dict.fromkeys(_with_room(problem, each) for each in found))


def _with_room(problem: Problem, plan: Configuration) -> Configuration:
    """The configuration with more warps, if its tiles, kept in registers, would not leave room. Channels that are padding need none."""
    kept = plan.splits > 1 and plan.splits * plan.spatial >= problem.spatial
    numbers = plan.spatial * plan.groups * (problem.channels // problem.groups)
    read_twice = problem.residual or problem.width < problem.channels
    if read_twice and kept and numbers >= _CROWDED * 32 * plan.num_warps:
        return plan._replace(num_warps=min(32, 2 * plan.num_warps))
    return plan


OPERATOR: Operator[Problem, Configuration] = Operator(
    "add_group_norm_silu", Problem, _candidates, source="group_norm.fused"
)


def add_group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001  (positional in graphs)
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Total = cat([x + residual + x_bias, joined], 1), and group_norm(total), then SiLU if `silu`.

    Args:
        x: (N, W, *spatial), float32, bfloat16 or float16. Fast if contiguous or channels last, and the other tensors alike.
        residual: x's shape and dtype, or None.
        joined: (N, C - W, *spatial) of x's dtype, or None: then C is W.
        weight: (C,), any float dtype, or None.
        bias: (C,), any float dtype, or None.
        groups: divides C.
        eps: added to the variance.
        silu: whether y becomes y * sigmoid(y).
        x_bias: (W,), any float dtype, or None: added to every position of a channel.

    Returns:
        The total, rounded to x's dtype, and the norm of the rounded total, computed in float32 and rounded once; both (N, C,
        *spatial), contiguous if x is, else channels last.

    Raises:
        ValueError: shapes or devices do not fit together, or groups does not divide C.
        TypeError: x has another dtype, or residual or joined is not of x's.
    """
    _check(x, residual, joined, weight, bias, groups, x_bias)
    rest = 0 if joined is None else joined.shape[1]
    if launch.ready(x.device) and (x.shape[1] + rest) * x.shape[2:].numel() < MAX_ROW:
        return add_group_norm_silu_triton(x, residual, joined, weight, bias, groups, eps, silu, x_bias)
    if native.serves(x):
        return add_group_norm_silu_native(x, residual, joined, weight, bias, groups, eps, silu, x_bias)
    return add_group_norm_silu_reference(x, residual, joined, weight, bias, groups, eps, silu, x_bias)


def add_group_norm_silu_reference(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm_silu` in plain torch."""
    total = x
    if residual is not None or x_bias is not None:
        value = x.float()
        if residual is not None:
            value = value + residual.float()
        if x_bias is not None:
            value = value + x_bias.float().reshape(-1, *[1] * (x.dim() - 2))
        total = value.to(x.dtype)
    if joined is not None:
        total = torch.cat([total, joined], 1)
    # What is an input must not be given back as a result.
    total = total.clone() if total is x else total
    total = _in_order(total, channels_last=_is_channels_last(x))
    return total, group_norm_silu_reference(total, weight, bias, groups, eps, silu)


def add_group_norm_silu_native(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm_silu` by kernels/cpu/group_norm.cpp."""
    x, residual, joined, total, result, channels_last = _prepared(x, residual, joined)
    if total.numel() > 0:
        added = native.vector(x_bias)
        group_norm.run_native(
            x,
            residual,
            joined,
            weight,
            bias,
            added,
            total,
            result,
            groups,
            0,
            eps,
            silu=silu,
            channels_last=channels_last,
        )
    return total, result


def add_group_norm_silu_triton(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    x_bias: Tensor | None = None,
    *,
    chosen: Configuration | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_group_norm_silu` by kernels/gpu/group_norm.py, with a chosen configuration or that of the problem."""
    x, residual, joined, total, result, channels_last = _prepared(x, residual, joined)
    if total.numel() == 0:
        return total, result
    rows, channels, spatial = x.shape[0], total.shape[1], x.shape[2:].numel()
    problem = Problem(rows, channels, groups, spatial, x.shape[1], residual is not None, x.dtype, channels_last)
    arguments = (x, residual, joined, weight, bias, groups, eps, silu, x_bias)
    plan = chosen or OPERATOR.choose(launch.architecture(x.device), problem, arguments)
    sizes = group_norm.Problem(rows, channels, groups, spatial, x.dtype, channels_last)
    group_norm.run(x, residual, joined, weight, bias, eps, None, x_bias, total, result, sizes, plan, silu=silu)
    return total, result


class _Prepared(NamedTuple):
    x: Tensor
    residual: Tensor | None
    joined: Tensor | None
    total: Tensor
    result: Tensor
    channels_last: bool


def _prepared(x: Tensor, residual: Tensor | None, joined: Tensor | None) -> _Prepared:
    """The pictures in one order, as the kernels take them, and room for both results."""
    channels_last = _is_channels_last(x)
    x = _in_order(x, channels_last=channels_last)
    residual, joined = (
        each if each is None else _in_order(each, channels_last=channels_last) for each in (residual, joined)
    )
    channels = x.shape[1] + (0 if joined is None else joined.shape[1])
    total, result = (empty(x, channels, memory.new_empty) for _ in range(2))
    return _Prepared(x, residual, joined, total, result, channels_last)


def empty(x: Tensor, channels: int, new: Callable[..., Tensor] = Tensor.new_empty) -> Tensor:
    """Room for a result of so many channels, made by `new(x, shape)`."""
    rows, _, *spatial = x.shape
    if not _is_channels_last(x):
        return new(x, (rows, channels, *spatial))
    result = new(x, (rows, *spatial, channels))
    return result.permute(0, 3, 1, 2) if result.dim() == 4 else result.movedim(-1, 1)


def _is_channels_last(x: Tensor) -> bool:
    """Whether the results are to be."""
    return group_norm.layout_of(x) != "contiguous"


def _in_order(tensor: Tensor, *, channels_last: bool) -> Tensor:
    """The tensor with its channels side by side, or its positions; itself, if they are."""
    if not channels_last:
        return tensor.contiguous()
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _check(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    x_bias: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"add_group_norm_silu: x has shape {tuple(x.shape)}, expected (N, W, *spatial)")
    if x.dtype not in DTYPES:
        raise TypeError(f"add_group_norm_silu: x is {x.dtype}, expected float32, bfloat16 or float16")
    rows, width, *spatial = x.shape
    rest = joined.shape[1] if joined is not None and joined.dim() == x.dim() else 0
    channels = width + rest
    if groups < 1 or channels < 1 or channels % groups != 0:
        raise ValueError(f"add_group_norm_silu: {channels} channels cannot be split into {groups} groups of one size")
    expected = (
        ("residual", residual, (rows, width, *spatial), x.dtype),
        ("joined", joined, (rows, rest, *spatial), x.dtype),
        ("weight", weight, (channels,), None),
        ("bias", bias, (channels,), None),
        ("x_bias", x_bias, (width,), None),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"add_group_norm_silu: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"add_group_norm_silu: {name} is {tensor.dtype}, expected {dtype} as x")
        if tensor.device != x.device:
            raise ValueError(f"add_group_norm_silu: {name} is on {tensor.device}, expected {x.device} as x")
