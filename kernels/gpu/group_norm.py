"""Group norm, with what is put together before it and SiLU after it. Two ways, by the size of a group:

* `fused`: a program holds all elements of one or a few groups in registers. One read, one write.
* `moments`, then `normalize`: the positions of an image are split over several programs. The first leaves the mean and the
  sum of squared differences from it (M2) of every group in every split; the second pools those of all splits (Chan et al. 1983,
  "Algorithms for computing the sample variance") and writes the result. Two reads, one write.

What is normed is x with one number for each channel added; or it is put together from several tensors and kept (TOTAL): x, plus a
residual, plus one number for each channel, and behind its channels those of another tensor (the skip connections of a U-Net).

A tile is (positions, channels) in both memory layouts; only the offsets differ. A program's channels are whole groups, padded to
a power of two. Statistics never come from a sum of squares: a large mean would cancel all digits.

Sums over the positions of every channel are dear where they pass between warps (Triton 3.7 stores eight channels of a thread 128
bytes apart, so that sixteen threads meet in one bank of shared memory): programs of one warp, or of one group, have none of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait


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
def _tile_sums(
    tile,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """Sums over all positions and the channels of each group of a tile that is zero where nothing is: (GROUPS_PADDED,)."""
    if GROUPS == 1:
        # In whatever order: one number per warp passes between warps, not one per channel.
        flat = tl.reshape(tile, (SPATIAL * CHANNELS_PADDED,), can_reorder=True)
        sums = tl.sum(flat, 0, keep_dims=True)
    else:
        sums = _group_sums(tl.sum(tile, 0), CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
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
def _added(shift, x_bias, row, shift_stride, channel, own, HAS_SHIFT: tl.constexpr, HAS_X_BIAS: tl.constexpr):
    """What is added to the channels of x: one number for a row and channel, one for a channel, or both."""
    added = _per_channel(shift + row * shift_stride, channel, own, 0.0, HAS_SHIFT)
    return added + _per_channel(x_bias, channel, own, 0.0, HAS_X_BIAS)


@triton.jit
def _offsets(position, channel, spatial, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Of elements in a row of a tensor: positions (P, 1) and channels (1, C)."""
    if CHANNELS_LAST:
        offsets = position * CHANNELS + channel
    else:
        offsets = channel * spatial + position
    return offsets


@triton.jit
def _tile(
    x,
    residual,
    joined,
    total,
    added,
    row,
    position,
    channel,
    present,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADDS: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A tile of what is normed in float32, zero where nothing is; with TOTAL it is rounded and stored first.

    x and residual have WIDTH channels, joined the rest of CHANNELS.
    """
    own = present & (channel < WIDTH) if WIDTH < CHANNELS else present
    at = _offsets(position, channel, spatial, WIDTH, CHANNELS_LAST)
    value = tl.load(x + row * spatial * WIDTH + at, mask=own, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * spatial * WIDTH + at, mask=own, other=0.0).to(tl.float32)
    if ADDS:
        value = tl.where(own, value + added[None, :], 0.0)
    if WIDTH < CHANNELS:
        REST: tl.constexpr = CHANNELS - WIDTH
        behind = _offsets(position, channel - WIDTH, spatial, REST, CHANNELS_LAST)
        other = tl.load(joined + row * spatial * REST + behind, mask=present & (channel >= WIDTH), other=0.0)
        value = tl.where(channel < WIDTH, value, other.to(tl.float32))
    if TOTAL:
        rounded = value.to(total.dtype.element_ty)
        at = _offsets(position, channel, spatial, CHANNELS, CHANNELS_LAST)
        tl.store(total + row * spatial * CHANNELS + at, rounded, mask=present)
        # What is normed is the sum as it is stored, so that whoever reads it later sees the same numbers.
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _silu(value, SILU: tl.constexpr):
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def fused(
    x,
    residual,
    joined,
    weight,
    bias,
    shift,
    x_bias,
    total,
    result,
    spatial,
    shift_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    TOTAL: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The groups of a program in one tile, SPATIAL >= spatial. Grid (blocks of GROUPS groups, rows)."""
    wait(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (GROUPS * SIZE)
    position = tl.arange(0, SPATIAL)[:, None]
    channel = first + tl.arange(0, CHANNELS_PADDED)
    inside = tl.arange(0, CHANNELS_PADDED) < GROUPS * SIZE
    present = (position < spatial) & inside[None, :]
    own = inside & (channel < WIDTH)
    added = _added(shift, x_bias, row, shift_stride, channel, own, HAS_SHIFT, HAS_X_BIAS)
    value = _tile(
        x,
        residual,
        joined,
        total,
        added,
        row,
        position,
        channel[None, :],
        present,
        spatial,
        CHANNELS_LAST,
        CHANNELS,
        WIDTH,
        HAS_RESIDUAL,
        HAS_SHIFT or HAS_X_BIAS,
        TOTAL,
    )

    count = spatial * (1.0 * SIZE)
    mean = _tile_sums(value, SPATIAL, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / count
    mean = _spread(mean, CHANNELS_PADDED, GROUPS, SIZE)
    centred = tl.where(present, value - mean[None, :], 0.0)
    m2 = _tile_sums(centred * centred, SPATIAL, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
    scale = _spread(tl.rsqrt(m2 / count + eps), CHANNELS_PADDED, GROUPS, SIZE)
    scale = scale * _per_channel(weight, channel, inside, 1.0, HAS_WEIGHT)
    final = _per_channel(bias, channel, inside, 0.0, HAS_BIAS)
    normed = _silu(centred * scale[None, :] + final[None, :], SILU)
    at = row * spatial * CHANNELS + _offsets(position, channel[None, :], spatial, CHANNELS, CHANNELS_LAST)
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=present)


@triton.jit
def moments(
    x,
    residual,
    joined,
    shift,
    x_bias,
    total,
    means,
    m2s,
    spatial,
    shift_stride,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    TOTAL: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The means and M2 of a program's groups over a split: so many whole tiles of SPATIAL positions, the last splits fewer.

    WHOLE: a split is one tile, and is held in registers. Grid (splits, blocks of GROUPS groups, rows); means, m2s (rows, blocks,
    splits, GROUPS) float32.
    """
    wait(DEPENDENT)
    split, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * (GROUPS * SIZE)
    position = tl.arange(0, SPATIAL)[:, None]
    channel = first + tl.arange(0, CHANNELS_PADDED)
    inside = tl.arange(0, CHANNELS_PADDED) < GROUPS * SIZE
    own = inside & (channel < WIDTH)
    added = _added(shift, x_bias, row, shift_stride, channel, own, HAS_SHIFT, HAS_X_BIAS)
    group = tl.arange(0, GROUPS_PADDED)
    at = ((row * tl.num_programs(1) + block) * tl.num_programs(0) + split) * GROUPS + group

    if WHOLE:
        begin = split * SPATIAL
        elements = tl.minimum(tl.maximum(spatial - begin, 0), SPATIAL)
        present = (position < spatial - begin) & inside[None, :]
        value = _tile(
            x,
            residual,
            joined,
            total,
            added,
            row,
            begin + position,
            channel[None, :],
            present,
            spatial,
            CHANNELS_LAST,
            CHANNELS,
            WIDTH,
            HAS_RESIDUAL,
            HAS_SHIFT or HAS_X_BIAS,
            TOTAL,
        )
        sums = _tile_sums(value, SPATIAL, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
        mean_group = sums / (tl.maximum(elements, 1) * (1.0 * SIZE))
        centre = _spread(mean_group, CHANNELS_PADDED, GROUPS, SIZE)
        centred = tl.where(present, value - centre[None, :], 0.0)
        m2_group = _tile_sums(centred * centred, SPATIAL, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
    else:
        tiles = tl.cdiv(spatial, SPATIAL * tl.num_programs(0))
        begin = split * tiles * SPATIAL
        # Welford (1962), in every element of the tile by itself: no warp waits for another within the loop.
        mean = tl.zeros((SPATIAL, CHANNELS_PADDED), tl.float32)
        m2 = tl.zeros((SPATIAL, CHANNELS_PADDED), tl.float32)
        for tile in range(tiles):
            present = (position < spatial - begin - tile * SPATIAL) & inside[None, :]
            value = _tile(
                x,
                residual,
                joined,
                total,
                added,
                row,
                begin + tile * SPATIAL + position,
                channel[None, :],
                present,
                spatial,
                CHANNELS_LAST,
                CHANNELS,
                WIDTH,
                HAS_RESIDUAL,
                HAS_SHIFT or HAS_X_BIAS,
                TOTAL,
            )
            change = tl.where(present, value - mean, 0.0)
            mean += change * (1.0 / (tile + 1))
            m2 += change * (value - mean)

        left = tl.maximum(spatial - begin, 0)
        elements = tl.minimum(left, tiles * SPATIAL)
        count = tl.minimum(tl.maximum(left - position + SPATIAL - 1, 0) // SPATIAL, tiles).to(tl.float32)
        # The elements of a channel, then the channels of a group.
        average = tl.sum(mean * count, 0) / tl.maximum(elements, 1).to(tl.float32)
        change = mean - average[None, :]
        m2_channel = tl.sum(m2 + count * change * change, 0)
        mean_group = _group_sums(average, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED) / SIZE
        change_channel = average - _spread(mean_group, CHANNELS_PADDED, GROUPS, SIZE)
        m2_channel += elements * change_channel * change_channel
        m2_group = _group_sums(m2_channel, CHANNELS_PADDED, GROUPS, SIZE, GROUPS_PADDED)
    tl.store(means + at, mean_group, mask=group < GROUPS)
    tl.store(m2s + at, m2_group, mask=group < GROUPS)


@triton.jit
def normalize(
    x,
    weight,
    bias,
    shift,
    x_bias,
    means,
    m2s,
    result,
    spatial,
    shift_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The result of a split from the `moments` of all SPLITS of them; the same grid."""
    wait(DEPENDENT)
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
    variance = tl.sum(m2 + count * change * change, 0) / total

    channel = block * (GROUPS * SIZE) + tl.arange(0, CHANNELS_PADDED)
    inside = tl.arange(0, CHANNELS_PADDED) < GROUPS * SIZE
    centre = _spread(average, CHANNELS_PADDED, GROUPS, SIZE)
    centre = centre - _added(shift, x_bias, row, shift_stride, channel, inside, HAS_SHIFT, HAS_X_BIAS)
    scale = _spread(tl.rsqrt(variance + eps), CHANNELS_PADDED, GROUPS, SIZE)
    scale = scale * _per_channel(weight, channel, inside, 1.0, HAS_WEIGHT)
    final = _per_channel(bias, channel, inside, 0.0, HAS_BIAS)

    begin = split * tiles * SPATIAL
    position = tl.arange(0, SPATIAL)[:, None]
    start = row * spatial * CHANNELS
    for tile in range(tiles):
        present = (position < spatial - begin - tile * SPATIAL) & inside[None, :]
        offsets = _offsets(begin + tile * SPATIAL + position, channel[None, :], spatial, CHANNELS, CHANNELS_LAST)
        value = tl.load(x + start + offsets, mask=present, other=0.0).to(tl.float32)
        normed = _silu((value - centre[None, :]) * scale[None, :] + final[None, :], SILU)
        tl.store(result + start + offsets, normed.to(result.dtype.element_ty), mask=present)
