"""Group norm, with what is added before it and SiLU after it. Two ways, by the size of a group:

* `fused`: a program holds all elements of one or a few groups in registers. One read, one write.
* `moments`, then `normalize`: the positions of an image are split over several programs. The first leaves the mean and the
  sum of squared differences from it (M2) of every group in every split; the second pools those of all splits (Chan et al. 1983,
  "Algorithms for computing the sample variance") and writes the result. Two reads, one write.

A tile is (positions, channels) in both memory layouts; only the offsets differ. A program's channels are whole groups, padded to
a power of two. Statistics never come from a sum of squares: a large mean would cancel all digits. What is added to x is one
number for a row and channel: it shifts means and leaves M2 alone, so it costs nothing per element.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _group_sums(
    values, CHANNELS_PADDED: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_PADDED: tl.constexpr
):
    """Sums over the channels of each group: (CHANNELS_PADDED,) to (GROUPS_PADDED,); a group has SIZE channels."""
    if GROUPS == 1:
        inside = tl.arange(0, CHANNELS_PADDED) < SIZE
        sums = tl.sum(tl.where(inside, values, 0.0), 0, keep_dims=True)
    else:
        # A power of two that holds SIZE: at most twice this quotient, since CHANNELS_PADDED holds GROUPS of them.
        QUOTIENT: tl.constexpr = CHANNELS_PADDED // GROUPS_PADDED
        SIZE_PADDED: tl.constexpr = QUOTIENT if QUOTIENT >= SIZE else 2 * QUOTIENT
        group = tl.arange(0, GROUPS_PADDED)[:, None]
        channel = tl.arange(0, SIZE_PADDED)[None, :]
        inside = (group < GROUPS) & (channel < SIZE)
        index = tl.reshape(tl.where(inside, group * SIZE + channel, 0), (GROUPS_PADDED * SIZE_PADDED,))
        # Gathering keeps groups apart; a product with zeros and ones would let NaN pass from one to another.
        apart = tl.reshape(tl.gather(values, index, 0), (GROUPS_PADDED, SIZE_PADDED))
        sums = tl.sum(tl.where(inside, apart, 0.0), 1)
    return sums


@triton.jit
def _spread(values, CHANNELS_PADDED: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Each channel's group's value: (GROUPS_PADDED,) to (CHANNELS_PADDED,)."""
    if GROUPS == 1:
        spread = tl.broadcast_to(values, (CHANNELS_PADDED,))
    else:
        channel = tl.arange(0, CHANNELS_PADDED)
        spread = tl.gather(values, tl.where(channel < GROUPS * SIZE, channel // SIZE, 0), 0)
    return spread


@triton.jit
def _per_channel(pointer, offset, inside, default, PRESENT: tl.constexpr):
    """An optional vector of channels in float32."""
    if PRESENT:
        values = tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.full(offset.shape, default, tl.float32)
    return values


@triton.jit
def _silu(value, SILU: tl.constexpr):
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def fused(
    x,
    weight,
    bias,
    shift,
    result,
    spatial,
    shift_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """The groups of a program in one tile, SPATIAL >= spatial. Grid (blocks of GROUPS groups, rows)."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (GROUPS * SIZE)
    position = tl.arange(0, SPATIAL)[:, None]
    channel = tl.arange(0, CHANNELS_PADDED)
    inside = channel < GROUPS * SIZE
    present = (position < spatial) & inside[None, :]
    if CHANNELS_LAST:
        start = row * spatial * CHANNELS + first
        offset = position * CHANNELS + channel[None, :]
    else:
        start = (row * CHANNELS + first) * spatial
        offset = channel[None, :] * spatial + position
    value = tl.load(x + start + offset, mask=present, other=0.0).to(tl.float32)
    added = _per_channel(shift + row * shift_stride, first + channel, inside, 0.0, HAS_SHIFT)

    mean = tl.sum(value, 0) / spatial + added
    mean = _spread(
        _group_sums(mean, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / SIZE, CHANNELS_PADDED, GROUPS, SIZE
    )
    centred = tl.where(present, value - (mean - added)[None, :], 0.0)
    # The mean of a large offset is rounded; what it is off by is left in the centred values, and known exactly enough there.
    total = spatial * (1.0 * SIZE)
    rest = _group_sums(tl.sum(centred, 0), CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / total
    m2 = _group_sums(tl.sum(centred * centred, 0), CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
    scale = _spread(tl.rsqrt(m2 / total - rest * rest + eps), CHANNELS_PADDED, GROUPS, SIZE)
    scale = scale * _per_channel(weight, first + channel, inside, 1.0, HAS_WEIGHT)
    rest = _spread(rest, CHANNELS_PADDED, GROUPS, SIZE)
    final = _per_channel(bias, first + channel, inside, 0.0, HAS_BIAS)
    normed = _silu((centred - rest[None, :]) * scale[None, :] + final[None, :], SILU)
    tl.store(result + start + offset, normed.to(result.dtype.element_ty), mask=present)


@triton.jit
def moments(
    x,
    shift,
    means,
    m2s,
    spatial,
    shift_stride,
    HAS_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """The means and M2 of a program's groups over a split: so many whole tiles of SPATIAL positions, the last splits fewer.

    Grid (splits, blocks of GROUPS groups, rows); means, m2s (rows, blocks, splits, GROUPS) float32.
    """
    split, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(spatial, SPATIAL * tl.num_programs(0))
    first = block * (GROUPS * SIZE)
    begin = split * tiles * SPATIAL
    position = tl.arange(0, SPATIAL)[:, None]
    channel = tl.arange(0, CHANNELS_PADDED)
    inside = channel < GROUPS * SIZE
    if CHANNELS_LAST:
        pointer = x + (row * spatial + begin) * CHANNELS + first + (position * CHANNELS + channel[None, :])
        step = SPATIAL * CHANNELS
    else:
        pointer = x + (row * CHANNELS + first) * spatial + begin + (channel[None, :] * spatial + position)
        step = SPATIAL

    # Welford (1962), in every element of the tile by itself: no warp waits for another within the loop.
    mean = tl.zeros((SPATIAL, CHANNELS_PADDED), tl.float32)
    m2 = tl.zeros((SPATIAL, CHANNELS_PADDED), tl.float32)
    for tile in range(tiles):
        present = (position < spatial - begin - tile * SPATIAL) & inside[None, :]
        value = tl.load(pointer + tile * step, mask=present, other=0.0).to(tl.float32)
        change = tl.where(present, value - mean, 0.0)
        mean += change * (1.0 / (tile + 1))
        m2 += change * (value - mean)

    left = tl.maximum(spatial - begin, 0)
    total = tl.minimum(left, tiles * SPATIAL)
    count = tl.minimum(tl.maximum(left - position + SPATIAL - 1, 0) // SPATIAL, tiles).to(tl.float32)
    at_least_one = tl.maximum(total, 1).to(tl.float32)
    # The elements of a channel, then the channels of a group. Means of a large offset are rounded, hence `rest`.
    average = tl.sum(mean * count, 0) / at_least_one
    change = mean - average[None, :]
    rest = tl.sum(change * count, 0) / at_least_one
    m2_channel = tl.sum(m2 + count * change * change, 0) - total * rest * rest
    average = average + rest + _per_channel(shift + row * shift_stride, first + channel, inside, 0.0, HAS_SHIFT)

    mean_group = _group_sums(average, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / SIZE
    change_channel = average - _spread(mean_group, CHANNELS_PADDED, GROUPS, SIZE)
    rest_group = _group_sums(change_channel, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / SIZE
    m2_group = _group_sums(
        m2_channel + total * change_channel * change_channel, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED
    )
    group = tl.arange(0, GROUPS_PADDED)
    at = ((row * tl.num_programs(1) + block) * tl.num_programs(0) + split) * GROUPS + group
    tl.store(means + at, mean_group + rest_group, mask=group < GROUPS)
    tl.store(m2s + at, m2_group - total * (1.0 * SIZE) * rest_group * rest_group, mask=group < GROUPS)


@triton.jit
def normalize(
    x,
    weight,
    bias,
    shift,
    means,
    m2s,
    result,
    spatial,
    shift_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """The result of a split from the `moments` of all SPLITS of them; the same grid."""
    split, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(spatial, SPATIAL * SPLITS)
    group = tl.arange(0, GROUPS_PADDED)[None, :]
    other = tl.arange(0, SPLITS)[:, None]
    at = ((row * tl.num_programs(1) + block) * SPLITS + other) * GROUPS + group
    mean = tl.load(means + at, mask=group < GROUPS, other=0.0)
    m2 = tl.load(m2s + at, mask=group < GROUPS, other=0.0)
    count = tl.minimum(tl.maximum(spatial - other * (tiles * SPATIAL), 0), tiles * SPATIAL) * (1.0 * SIZE)
    total = spatial * (1.0 * SIZE)
    average = tl.sum(mean * count, 0) / total
    change = mean - average[None, :]
    rest = tl.sum(change * count, 0) / total
    variance = tl.sum(m2 + count * change * change, 0) / total - rest * rest

    first = block * (GROUPS * SIZE)
    channel = tl.arange(0, CHANNELS_PADDED)
    inside = channel < GROUPS * SIZE
    centre = _spread(average + rest, CHANNELS_PADDED, GROUPS, SIZE)
    centre = centre - _per_channel(shift + row * shift_stride, first + channel, inside, 0.0, HAS_SHIFT)
    scale = _spread(tl.rsqrt(variance + eps), CHANNELS_PADDED, GROUPS, SIZE)
    scale = scale * _per_channel(weight, first + channel, inside, 1.0, HAS_WEIGHT)
    final = _per_channel(bias, first + channel, inside, 0.0, HAS_BIAS)

    begin = split * tiles * SPATIAL
    position = tl.arange(0, SPATIAL)[:, None]
    if CHANNELS_LAST:
        start = (row * spatial + begin) * CHANNELS + first
        offset = position * CHANNELS + channel[None, :]
        step = SPATIAL * CHANNELS
    else:
        start = (row * CHANNELS + first) * spatial + begin
        offset = channel[None, :] * spatial + position
        step = SPATIAL
    for tile in range(tiles):
        present = (position < spatial - begin - tile * SPATIAL) & inside[None, :]
        value = tl.load(x + start + offset + tile * step, mask=present, other=0.0).to(tl.float32)
        normed = _silu((value - centre[None, :]) * scale[None, :] + final[None, :], SILU)
        tl.store(result + start + offset + tile * step, normed.to(result.dtype.element_ty), mask=present)
