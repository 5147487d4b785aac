"""Group norm (Wu and He 2018, arXiv 1803.08494) with the time embedding added before it and SiLU after it, in one operator."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import launch, memory, native
from ldmrt.kernels.blocks import power_of_two
from ldmrt.kernels.tuning import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Multiprocessors of the usual machine of an architecture: A100, A10, L40S, H100, B200, RTX 5090. Others have no more than these.
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}

# The most elements that one program holds in registers: 32 float32 numbers in each of 512 threads. Twice as many just fit, or
# spill a few bytes, by architecture and layout; that is left to measurements.
_HELD = 16384
_MAX_SPLITS = 256
# Up to so many positions one program for a group is the quicker way, though it keeps few multiprocessors busy.
_FEW_POSITIONS = 256
# Offsets within a row are 32-bit.
MAX_ROW = 2**31


@dataclass(frozen=True, slots=True)
class Problem:
    """What a group norm is tuned by: x as (rows, channels, spatial)."""

    rows: int
    channels: int
    groups: int
    spatial: int
    dtype: torch.dtype
    channels_last: bool


class Configuration(NamedTuple):
    """How the Triton bodies are cut up.

    Attributes:
        groups: groups of a program; divides the number of groups.
        splits: 1 for one kernel whose programs hold all positions of their groups; else programs, a power of two, that share
            the positions of a group, in two kernels.
        spatial: positions of a tile, a power of two; all of them if there is one split.
        num_warps: warps of a program.
    """

    groups: int
    splits: int
    spatial: int
    num_warps: int


def candidates(
    arch: int, rows: int, channels: int, groups: int, spatial: int, itemsize: int, *, channels_last: bool
) -> list[Configuration]:
    """The configurations worth measuring for x of (rows, channels, spatial); the first is the default.

    What fits into registers of one program is read once, or split into tiles of one warp each. What does not fit into those is split
    so that there are about four programs for each multiprocessor, but not so far that reading the other splits' moments costs more
    than a quarter of reading x.
    """
    size = channels // groups
    programs = 4 * _MULTIPROCESSORS.get(arch, 128)
    held, whole, looped = [], [], []

    vector = _group_blocks(groups, size * itemsize, 16) if channels_last else 1
    # One group is 20 bytes of every 640 at worst. Whole vectors are better if the programs are many enough all the same.
    for block in (vector, 1) if rows * groups // vector >= programs // 4 else (1, vector):
        elements = power_of_two(spatial) * power_of_two(block * size)
        if elements <= _HELD:
            held += [
                Configuration(block, 1, power_of_two(spatial), min(32, max(1, elements // (32 * per_thread))))
                for per_thread in (32, 16)
            ]

    segment = _group_blocks(groups, size * itemsize, 32, at_least=128) if channels_last else 1
    # A split in one tile is loaded at once and held; more of them mean more moments to read. Sums between warps are dear.
    for block, elements, warps in ((1, 2048, 1), (2, 4096, 1), (1, 4096, 1), (1, 8192, 2), (1, 4096, 2), (1, 4096, 4)):
        width = block * segment
        tile = max(1, elements // power_of_two(width * size))
        splits = power_of_two(-(-spatial // tile))
        if groups % width == 0 and 1 < splits <= _MAX_SPLITS:
            whole.append(Configuration(width, splits, tile, warps))
    merging = math.isqrt(max(1, spatial * size * itemsize // 32))
    for block, elements, warps, share in (
        (1, 4096, 8, 1),
        (1, 8192, 8, 1),
        (2, 4096, 8, 1),
        (1, 4096, 4, 2),
        (1, 4096, 8, 2),
    ):
        width = block * segment if channels_last and groups % (block * segment) == 0 else segment
        tile = min(power_of_two(spatial), max(1, elements // power_of_two(width * size)))
        wanted = share * programs * width // (rows * groups)
        limit = min(wanted, share * merging, -(-spatial // tile), _MAX_SPLITS)
        looped.append(Configuration(width, max(2, 1 << (max(1, limit).bit_length() - 1)), tile, warps))
    if _HELD < power_of_two(spatial) * power_of_two(size) <= 2 * _HELD:
        looped.append(Configuration(1, 1, power_of_two(spatial), 16))
    # Measured on an H100 and an H200 (benchmarks/results/gpu.jsonl): many programs of one warp are worth a second launch.
    first = [*whole, *held] if channels_last and spatial > _FEW_POSITIONS else [*held, *whole]
    return list(dict.fromkeys([*first, *looped]))


OPERATOR: Operator[Problem, Configuration] = Operator(
    "group_norm_silu",
    Problem,
    lambda arch, problem: candidates(
        arch,
        problem.rows,
        problem.channels,
        problem.groups,
        problem.spatial,
        problem.dtype.itemsize,
        channels_last=problem.channels_last,
    ),
    source="group_norm.fused",
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001  (positional in graphs)
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """group_norm(x + shift + x_bias), then SiLU if `silu`; computed in float32 and rounded once.

    Args:
        x: (N, C, *spatial), float32, bfloat16 or float16. Fast if contiguous or channels last; any other layout is copied.
        weight: (C,), any float dtype, or None.
        bias: (C,), any float dtype, or None.
        groups: divides C.
        eps: added to the variance.
        silu: whether y becomes y * sigmoid(y).
        shift: (N, C), any float dtype and any stride between rows, or None: added to every position of a channel.
        x_bias: (C,), any float dtype, or None: likewise, for all rows: what the convolution before left out.

    Returns:
        A tensor of x's shape, dtype and memory layout.

    Raises:
        ValueError: shapes or devices do not fit together, or groups does not divide C.
        TypeError: x has another dtype.
    """
    _check(x, weight, bias, groups, shift, x_bias)
    if launch.ready(x.device) and x.shape[1:].numel() < MAX_ROW:
        return group_norm_silu_triton(x, weight, bias, groups, eps, silu, shift, x_bias)
    if native.serves(x):
        return group_norm_silu_native(x, weight, bias, groups, eps, silu, shift, x_bias)
    return group_norm_silu_reference(x, weight, bias, groups, eps, silu, shift, x_bias)


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """`group_norm_silu` in plain torch."""
    result = torch.empty_like(x)
    if x.numel() == 0:
        return result
    value = x.float()
    added = [each.float() for each in (shift, x_bias) if each is not None]
    if added:
        total = sum(added[1:], added[0])
        value = value + total.reshape(*total.shape, *[1] * (x.dim() - 2))
    scale = None if weight is None else weight.float()
    final = None if bias is None else bias.float()
    # On the CPU torch.group_norm loses digits to a large mean: of a channels-last tensor nearly all, since it takes the variance from
    # a sum of squares. Without its mean any tensor is safe, and a contiguous one is quickest.
    grouped = value.contiguous().view(x.shape[0], groups, -1)
    value = torch.group_norm((grouped - grouped.mean(-1, keepdim=True)).view(x.shape), groups, scale, final, eps)
    return result.copy_(F.silu(value, inplace=True) if silu else value)


def group_norm_silu_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """`group_norm_silu` by kernels/cpu/group_norm.cpp."""
    result = memory.empty_like(x)
    if x.numel() == 0:
        return result
    order = layout_of(x)
    if order is None:
        return result.copy_(group_norm_silu_native(x.contiguous(), weight, bias, groups, eps, silu, shift, x_bias))
    added = native.vector(x_bias)
    if shift is not None:
        added = native.vector(shift if added is None else shift + added)
    stride, channels_last = 0 if shift is None else x.shape[1], order == "channels last"
    run_native(
        x, None, None, weight, bias, added, None, result, groups, stride, eps, silu=silu, channels_last=channels_last
    )
    return result


def run_native(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    total: Tensor | None,
    result: Tensor,
    groups: int,
    stride: int,
    eps: float,
    *,
    silu: bool,
    channels_last: bool,
) -> None:
    """Call the C++ body. All pictures lie in one order; `added` is float32, its rows `stride` apart."""
    scale, final = native.vector(weight), native.vector(bias)
    rows, channels = result.shape[:2]
    native.run(
        "ldmrt_group_norm",
        x,
        residual,
        joined,
        scale,
        final,
        added,
        total,
        result,
        native.ELEMENTS[x.dtype],
        rows,
        channels,
        x.shape[1],
        groups,
        x.shape[2:].numel(),
        stride,
        eps,
        silu,
        channels_last,
    )


def group_norm_silu_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,  # noqa: FBT001
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    *,
    chosen: Configuration | None = None,
) -> Tensor:
    """`group_norm_silu` by kernels/gpu/group_norm.py, with a chosen configuration or that of the problem."""
    result = torch.empty_like(x)
    if x.numel() == 0:
        return result
    order = layout_of(x)
    if order is None:
        copied = group_norm_silu_triton(x.contiguous(), weight, bias, groups, eps, silu, shift, x_bias, chosen=chosen)
        return result.copy_(copied)
    problem = Problem(x.shape[0], x.shape[1], groups, x.shape[2:].numel(), x.dtype, order == "channels last")
    arguments = (x, weight, bias, groups, eps, silu, shift, x_bias)
    plan = chosen or OPERATOR.choose(launch.architecture(x.device), problem, arguments)
    run(x, None, None, weight, bias, eps, shift, x_bias, None, result, problem, plan, silu=silu)
    return result


def layout_of(x: Tensor) -> str | None:
    """The order that a tensor has in memory, if it is one of the kernels'; a picture of one pixel or channel has both."""
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4:
        return "channels last" if x.is_contiguous(memory_format=torch.channels_last) else None
    return "channels last" if x.movedim(1, -1).is_contiguous() else None


def run(
    x: Tensor,
    residual: Tensor | None,
    joined: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    x_bias: Tensor | None,
    total: Tensor | None,
    result: Tensor,
    problem: Problem,
    plan: Configuration,
    *,
    silu: bool,
) -> None:
    """Launch the Triton bodies.

    Args:
        x: (rows, width, ...), in the order of the problem, as are all pictures.
        residual: x's shape, or None; only with `total`.
        joined: (rows, channels - width, ...), or None; only with `total`.
        weight: (channels,) or None.
        bias: (channels,) or None.
        eps: added to the variance.
        shift: (rows, width) or None.
        x_bias: (width,) or None.
        total: where to keep what is normed, (rows, channels, ...), or None.
        result: (rows, channels, ...).
        problem: the sizes.
        plan: how it is cut up.
        silu: whether SiLU follows.
    """
    if shift is not None and shift.shape[1] > 1 and shift.stride(1) != 1:
        shift = shift.contiguous()
    rows, channels, groups, spatial, _, channels_last = astuple(problem)
    size = channels // groups
    blocks = groups // plan.groups

    # A pointer that a kernel does not use may be any tensor.
    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    scale, final = (given(vector if vector is None else vector.contiguous()) for vector in (weight, bias))
    added, own = given(shift), given(None if x_bias is None else x_bias.contiguous())
    stride = 0 if shift is None else shift.stride(0)
    tile: dict[str, launch.Constant] = {
        "HAS_SHIFT": shift is not None,
        "HAS_X_BIAS": x_bias is not None,
        "CHANNELS_LAST": channels_last,
        "CHANNELS": channels,
        "SIZE": size,
        "GROUPS": plan.groups,
        "SPATIAL": plan.spatial,
        "CHANNELS_PADDED": power_of_two(plan.groups * size),
        "GROUPS_PADDED": power_of_two(plan.groups),
    }
    source: dict[str, launch.Constant] = {
        "HAS_RESIDUAL": residual is not None,
        "TOTAL": total is not None,
        "WIDTH": x.shape[1],
    }
    epilogue: dict[str, launch.Constant] = {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
    }
    if plan.splits == 1:
        launch.run(
            "group_norm.fused",
            (blocks, rows),
            (
                x,
                given(residual),
                given(joined),
                scale,
                final,
                added,
                own,
                given(total),
                result,
                spatial,
                stride,
                float(eps),
            ),
            {**source, **epilogue, **tile},
            num_warps=plan.num_warps,
        )
        return
    means = torch.empty((rows, blocks, plan.splits, plan.groups), dtype=torch.float32, device=x.device)
    m2s = torch.empty_like(means)
    grid = (plan.splits, blocks, rows)
    launch.run(
        "group_norm.moments",
        grid,
        (x, given(residual), given(joined), added, own, given(total), means, m2s, spatial, stride),
        {**source, **tile, "WHOLE": plan.splits * plan.spatial >= spatial},
        num_warps=plan.num_warps,
    )
    if total is not None:
        # What has been added is in there.
        x, stride = total, 0
        tile |= {"HAS_SHIFT": False, "HAS_X_BIAS": False}
    launch.run(
        "group_norm.normalize",
        grid,
        (x, scale, final, added, own, means, m2s, result, spatial, stride, float(eps)),
        {**epilogue, **tile, "SPLITS": plan.splits},
        num_warps=plan.num_warps,
    )


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, shift: Tensor | None, x_bias: Tensor | None
) -> None:
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x has shape {tuple(x.shape)}, expected (N, C, *spatial)")
    if x.dtype not in DTYPES:
        raise TypeError(f"group_norm_silu: x is {x.dtype}, expected float32, bfloat16 or float16")
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups != 0:
        raise ValueError(f"group_norm_silu: {channels} channels cannot be split into {groups} groups of one size")
    expected = (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (x.shape[0], channels)),
        ("x_bias", x_bias, (channels,)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"group_norm_silu: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is on {tensor.device}, expected {x.device} as x")


def _group_blocks(groups: int, group_bytes: int, multiple: int, at_least: int = 1) -> int:
    """The fewest groups, a divisor of all, whose channels are a multiple of so many bytes, and at least so many; else all."""
    for block in range(1, groups):
        if groups % block == 0 and block * group_bytes % multiple == 0 and block * group_bytes >= at_least:
            return block
    return groups
