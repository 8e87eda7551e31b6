"""Triton kernels of the group norm; group_norm_plan.py launches them. Imports Triton.

A tile is [BLOCK_C, BLOCK_S]: some channels of one image by some of its pixels, always converted to float32
after the load. The same kernels read NCHW and channels-last images; only the offset arithmetic of `_load` and
`_offset` differs.

Statistics are centred throughout: every tile lane keeps a Welford mean and M2 (sum of squared deviations)
over the pixels it meets, and lanes, splits and channels are merged with Chan's formula. E[x^2] - E[x]^2 is
never formed: it cancels for images whose mean is large against their deviation, and its squares overflow
float16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offset(channel, pixel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return pixel[None, :] * channels + channel[:, None]
    else:
        return channel[:, None] * pixels + pixel[None, :]


@triton.jit
def _load(x1, x2, image, channel, pixel, mask, c1, c2, pixels, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """A float32 tile of cat([x1, x2], 1)[image]; lanes outside `mask` are 0."""
    if HAS_X2:
        in_first = (channel < c1)[:, None]
        value1 = tl.load(
            x1 + image * c1 * pixels + _offset(channel, pixel, c1, pixels, CHANNELS_LAST),
            mask & in_first,
            other=0.0,
        ).to(tl.float32)
        value2 = tl.load(
            x2 + image * c2 * pixels + _offset(channel - c1, pixel, c2, pixels, CHANNELS_LAST),
            mask & (channel >= c1)[:, None],
            other=0.0,
        ).to(tl.float32)
        return tl.where(in_first, value1, value2)
    else:
        return tl.load(
            x1 + image * c1 * pixels + _offset(channel, pixel, c1, pixels, CHANNELS_LAST), mask, other=0.0
        ).to(tl.float32)


@triton.jit
def _welford(value, valid, mean, m2, count):
    """Add the `count`-th value to every lane; invalid lanes stay. A lane's invalid values come last, so
    counts agree."""
    delta = tl.where(valid, value - mean, 0.0)
    mean += delta * (1.0 / count)  # the reciprocal is one scalar for the tile
    m2 += delta * tl.where(valid, value - mean, 0.0)
    return mean, m2


@triton.jit
def _lane_count(first, pixels, BLOCK_S: tl.constexpr, STEPS: tl.constexpr):
    """How many pixels first, first + BLOCK_S, ... of STEPS exist, as a float32 row. In closed form, because
    counters kept in the loop would have to change layout through shared memory."""
    return tl.minimum(tl.maximum(pixels - first + BLOCK_S - 1, 0) // BLOCK_S, STEPS).to(tl.float32)[None, :]


@triton.jit
def _chan(count, mean, m2):
    """(mean, M2) of each row of a [rows, columns] tile of lanes (count, mean, M2); lanes with count 0 take no
    part."""
    total = tl.sum(count, 1)
    merged = tl.sum(count * mean, 1) / total
    delta = mean - merged[:, None]
    # The deviations' own mean is the rounding error of the first one.
    residue = tl.sum(count * delta, 1) / total
    return merged + residue, tl.sum(m2 + count * delta * delta, 1) - total * residue * residue


@triton.jit
def _moments(count, mean, m2, size):
    """(mean, residue, variance) of a whole [rows, columns] tile of lanes (count, mean, M2), by Chan's
    formula.

    The mean is mean + residue: what float32 rounds off it matters when it is many deviations from zero.
    Callers subtract the first part from the data, which is nearly exact, and the second from the small
    difference.
    """
    merged = tl.sum(tl.sum(count * mean, 1), 0) / size
    delta = mean - merged
    residue = tl.sum(tl.sum(count * delta, 1), 0) / size
    variance = tl.sum(tl.sum(m2 + count * delta * delta, 1), 0) / size - residue * residue
    return merged, residue, tl.maximum(variance, 0.0)


@triton.jit
def _coefficient(table, plane, image, channel, channels):
    """One plane of a [planes, B, channels] table, as a column; the grid's axis 2 is the batch."""
    row = (plane * tl.num_programs(2) + image) * channels
    return tl.load(table + row + channel, channel < channels, other=0.0)[:, None]


@triton.jit
def _silu(y):
    return y * tl.sigmoid(y)


@triton.jit
def _silu_gradient(y):
    s = tl.sigmoid(y)
    return s * (1.0 + y * (1.0 - s))


@triton.jit
def fused_kernel(
    x1, x2, weight, bias, scale, shift, y, mean_out, rstd_out,
    c1, c2, pixels, scale_stride, shift_stride, eps,
    GROUP_CHANNELS: tl.constexpr, SILU: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_X2: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One group of one image: grid (groups, batch). BLOCK_C covers the group, STEPS * BLOCK_S the pixels."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)
    lane_s = tl.arange(0, BLOCK_S)
    real = lane_c < GROUP_CHANNELS
    channel = group * GROUP_CHANNELS + lane_c

    value = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    size = pixels * (GROUP_CHANNELS * 1.0)
    if STEPS == 1:
        # The whole group stays in registers: every element is a lane of its own.
        valid = real[:, None] & (lane_s < pixels)[None, :]
        value = _load(x1, x2, image, channel, lane_s, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        mean, residue, variance = _moments(tl.where(valid, 1.0, 0.0), value, tl.zeros_like(value), size)
    else:
        lane_mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        lane_m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        for step in range(STEPS):
            pixel = step * BLOCK_S + lane_s
            valid = real[:, None] & (pixel < pixels)[None, :]
            tile = _load(x1, x2, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
            lane_mean, lane_m2 = _welford(tile, valid, lane_mean, lane_m2, step + 1.0)
        count = tl.where(real[:, None], _lane_count(lane_s, pixels, BLOCK_S, STEPS), 0.0)
        mean, residue, variance = _moments(count, lane_mean, lane_m2, size)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    groups = tl.num_programs(0)
    tl.store(mean_out + image * groups + group, mean + residue)
    tl.store(rstd_out + image * groups + group, rstd)

    a = tl.load(weight + channel, real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, real, other=0.0).to(tl.float32)
    if HAS_AFFINE:
        outer = tl.load(scale + image * scale_stride + channel, real, other=0.0).to(tl.float32)
        a *= outer
        b = b * outer + tl.load(shift + image * shift_stride + channel, real, other=0.0).to(tl.float32)
    a *= rstd
    b -= residue * a
    channels = c1 + c2
    base = y + image * channels * pixels
    for step in range(STEPS):
        pixel = step * BLOCK_S + lane_s
        valid = real[:, None] & (pixel < pixels)[None, :]
        if STEPS > 1:
            value = _load(x1, x2, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        out = (value - mean) * a[:, None] + b[:, None]
        if SILU:
            out = _silu(out)
        tl.store(base + _offset(channel, pixel, channels, pixels, CHANNELS_LAST), out.to(y.dtype.element_ty), valid)


@triton.jit
def stats_kernel(
    x, partial, channels, pixels, splits,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """partial [B, C, splits, 2]: (mean, M2) of each channel over one split of its pixels.
    Grid (splits, channel blocks, batch)."""
    split = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    lane_s = tl.arange(0, BLOCK_S)
    lane_mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in range(STEPS):
        pixel = (split * STEPS + step) * BLOCK_S + lane_s
        valid = real[:, None] & (pixel < pixels)[None, :]
        tile = _load(x, x, image, channel, pixel, valid, channels, 0, pixels, False, CHANNELS_LAST)
        lane_mean, lane_m2 = _welford(tile, valid, lane_mean, lane_m2, step + 1.0)
    count = _lane_count(split * (STEPS * BLOCK_S) + lane_s, pixels, BLOCK_S, STEPS)
    mean, m2 = _chan(tl.broadcast_to(count, [BLOCK_C, BLOCK_S]), lane_mean, lane_m2)
    row = partial + ((image * channels + channel) * splits + split) * 2
    tl.store(row, mean, real)
    tl.store(row + 1, m2, real)


@triton.jit
def _split_tile(partial, row, mask, pixels, splits, chunk, BLOCK_P: tl.constexpr):
    """(count, mean, M2), each [rows, BLOCK_P]: the splits of some rows, a row being one channel of one
    image."""
    split = tl.arange(0, BLOCK_P)
    count = tl.minimum(tl.maximum(pixels - split * chunk, 0), chunk)
    valid = mask[:, None] & ((split < splits) & (count > 0))[None, :]
    address = partial + (row[:, None] * splits + split[None, :]) * 2
    mean = tl.load(address, valid, other=0.0)
    m2 = tl.load(address + 1, valid, other=0.0)
    return tl.where(valid, count[None, :].to(tl.float32), 0.0), mean, m2


@triton.jit
def merge_splits_kernel(partial, stats, rows, pixels, splits, chunk, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """stats [rows, 2] from partial [rows, splits, 2]: grid (row blocks,); rows = batch * channels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = row < rows
    count, mean, m2 = _split_tile(partial, tl.minimum(row, rows - 1), row >= 0, pixels, splits, chunk, BLOCK_P)
    mean, m2 = _chan(count, mean, m2)
    tl.store(stats + row * 2, mean, real)
    tl.store(stats + row * 2 + 1, m2, real)


@triton.jit
def fold_kernel(
    stats1, stats2, weight, bias, scale, shift, table, mean_out, rstd_out,
    c1, c2, pixels, splits1, chunk1, splits2, chunk2, scale_stride, shift_stride, eps,
    GROUP_CHANNELS: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_X2: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merge one group's channel statistics and fold every affine into table [3, B, C] = mean, a, b with
    y = (x - mean) * a + b: grid (groups, batch)."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)
    real = lane_c < GROUP_CHANNELS
    channel = group * GROUP_CHANNELS + lane_c
    count, split_mean, split_m2 = _split_tile(
        stats1, image * c1 + channel, real & (channel < c1), pixels, splits1, chunk1, BLOCK_P
    )
    if HAS_X2:
        # A channel belongs to one input only: the other's lanes are all zero.
        count2, mean2, m22 = _split_tile(
            stats2, image * c2 + channel - c1, real & (channel >= c1), pixels, splits2, chunk2, BLOCK_P
        )
        count += count2
        split_mean += mean2
        split_m2 += m22
    mean, residue, variance = _moments(count, split_mean, split_m2, pixels * (GROUP_CHANNELS * 1.0))
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    groups = tl.num_programs(0)
    tl.store(mean_out + image * groups + group, mean + residue)
    tl.store(rstd_out + image * groups + group, rstd)
    a = tl.load(weight + channel, real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, real, other=0.0).to(tl.float32)
    if HAS_AFFINE:
        outer = tl.load(scale + image * scale_stride + channel, real, other=0.0).to(tl.float32)
        a *= outer
        b = b * outer + tl.load(shift + image * shift_stride + channel, real, other=0.0).to(tl.float32)
    channels = c1 + c2
    plane = tl.num_programs(1).to(tl.int64) * channels
    at = table + image * channels + channel
    tl.store(at, tl.zeros([BLOCK_C], tl.float32) + mean, real)
    tl.store(at + plane, a * rstd, real)
    tl.store(at + 2 * plane, b - residue * (a * rstd), real)


@triton.jit
def apply_kernel(
    x1, x2, table, y, c1, c2, pixels,
    SILU: tl.constexpr, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * a + b) with the table of `fold_kernel`.
    Grid (pixel blocks, channel blocks, batch)."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = c1 + c2
    valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    mean = _coefficient(table, 0, image, channel, channels)
    a = _coefficient(table, 1, image, channel, channels)
    b = _coefficient(table, 2, image, channel, channels)
    value = _load(x1, x2, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
    out = (value - mean) * a + b
    if SILU:
        out = _silu(out)
    address = y + image * channels * pixels + _offset(channel, pixel, channels, pixels, CHANNELS_LAST)
    tl.store(address, out.to(y.dtype.element_ty), valid)


@triton.jit
def gradient_sums_kernel(
    grad, x1, x2, table, partial, c1, c2, pixels, splits,
    SILU: tl.constexpr, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """partial [B, C, splits, 2]: sums over pixels of g and of g * (x - mean), g the gradient before the SiLU.
    Grid (splits, channel blocks, batch); the table is that of `fold_kernel`."""
    split = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = c1 + c2
    real = channel < channels
    mean = _coefficient(table, 0, image, channel, channels)
    a = _coefficient(table, 1, image, channel, channels)
    b = _coefficient(table, 2, image, channel, channels)
    lane_s = tl.arange(0, BLOCK_S)
    sum_g = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_gx = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in range(STEPS):
        pixel = (split * STEPS + step) * BLOCK_S + lane_s
        valid = real[:, None] & (pixel < pixels)[None, :]
        address = grad + image * channels * pixels + _offset(channel, pixel, channels, pixels, CHANNELS_LAST)
        g = tl.load(address, valid, other=0.0).to(tl.float32)
        centred = _load(x1, x2, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST) - mean
        if SILU:
            g *= _silu_gradient(centred * a + b)
        sum_g += g
        sum_gx += g * centred
    row = partial + ((image * channels + channel) * splits + split) * 2
    tl.store(row, tl.sum(sum_g, 1), real)
    tl.store(row + 1, tl.sum(sum_gx, 1), real)


@triton.jit
def gradient_input_kernel(
    grad, x1, x2, table, dx1, dx2, c1, c2, pixels,
    SILU: tl.constexpr, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = a * g + slope * (x - mean) + level with table [5, B, C] = mean, a, b, slope, level.
    Grid (pixel blocks, channel blocks, batch)."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = c1 + c2
    valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    mean = _coefficient(table, 0, image, channel, channels)
    a = _coefficient(table, 1, image, channel, channels)
    b = _coefficient(table, 2, image, channel, channels)
    slope = _coefficient(table, 3, image, channel, channels)
    level = _coefficient(table, 4, image, channel, channels)
    address = grad + image * channels * pixels + _offset(channel, pixel, channels, pixels, CHANNELS_LAST)
    g = tl.load(address, valid, other=0.0).to(tl.float32)
    centred = _load(x1, x2, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST) - mean
    if SILU:
        g *= _silu_gradient(centred * a + b)
    dx = g * a + centred * slope + level
    first = dx1 + image * c1 * pixels + _offset(channel, pixel, c1, pixels, CHANNELS_LAST)
    if HAS_X2:
        tl.store(first, dx.to(dx1.dtype.element_ty), valid & (channel < c1)[:, None])
        second = dx2 + image * c2 * pixels + _offset(channel - c1, pixel, c2, pixels, CHANNELS_LAST)
        tl.store(second, dx.to(dx2.dtype.element_ty), valid & (channel >= c1)[:, None])
    else:
        tl.store(first, dx.to(dx1.dtype.element_ty), valid)
