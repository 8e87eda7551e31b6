"""Triton kernels of the group norm; group_norm_plan.py launches them. Imports Triton.

A tile is [BLOCK_C, BLOCK_S]: some channels of one image by some of its pixels, always converted to float32
after the load. The same kernels read NCHW and channels-last images; only the offset arithmetic of `_load` and
`_offset` differs.

Statistics are centred throughout: every tile lane keeps a Welford mean and M2 (sum of squared deviations)
over the pixels it meets, and lanes, splits and channels are merged with Chan's formula. E[x^2] - E[x]^2 is
never formed: it cancels for images whose mean is large against their deviation, and its squares overflow
float16.

`x_bias` is added to the means, never to a pixel: see `_difference`. It, and weight and bias, have a row for every
`share` images (see `channel_row`); x2 and its statistics may have fewer images than x, which are read again. Where a
tensor is absent, launches pass another one that is never read, and a HAS_ flag.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Loads of a reduction that are in flight together: a thread's 16 bytes alone do not cover the latency.
LOADS = tl.constexpr(4)


@triton.jit
def _offset(channel, pixel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return pixel[None, :] * channels + channel[:, None]
    else:
        return channel[:, None] * pixels + pixel[None, :]


@triton.jit
def _images(program, programs, images2):
    """(image of x, image of x2) of a program along the batch's axis. Images of x that read one of x2 follow each other:
    it comes from cache for all but the first."""
    times = programs // images2
    return (program % times * images2 + program // times).to(tl.int64), (program // times).to(tl.int64)


@triton.jit
def _load(
    x1, x2, image, image2, channel, pixel, mask, c1, c2, pixels, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """A float32 tile of cat([x1[image], x2[image2]]); lanes outside `mask` are 0."""
    if HAS_X2:
        in_first = (channel < c1)[:, None]
        value1 = tl.load(
            x1 + image * c1 * pixels + _offset(channel, pixel, c1, pixels, CHANNELS_LAST),
            mask & in_first,
            other=0.0,
        ).to(tl.float32)
        value2 = tl.load(
            x2 + image2 * c2 * pixels + _offset(channel - c1, pixel, c2, pixels, CHANNELS_LAST),
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
def _difference(merged, bias):
    """(offset, tail): merged - bias as a float32 and what rounding it lost, exactly (Knuth's two-sum).

    x + bias - merged = (x - offset) - tail: with it a bias costs no digit, whichever of x and bias is large.
    """
    offset = merged - bias
    back = offset - merged
    return offset, (merged - (offset - back)) - (bias + back)


@triton.jit
def _moments(count, mean, m2, bias, size, HAS_BIAS: tl.constexpr):
    """(mean, residue, variance) of a whole [rows, columns] tile of lanes (count, mean, M2), by Chan's
    formula, with bias [rows] added to the means.

    The mean is mean + residue: what float32 rounds off it matters when it is many deviations from zero.
    Callers subtract the first part from the data, which is nearly exact, and the second from the small
    difference.
    """
    if HAS_BIAS:
        merged = tl.sum(tl.sum(count * (mean + bias[:, None]), 1), 0) / size
        offset, tail = _difference(merged, bias)
        delta = (mean - offset[:, None]) - tail[:, None]
    else:
        merged = tl.sum(tl.sum(count * mean, 1), 0) / size
        delta = mean - merged
    residue = tl.sum(tl.sum(count * delta, 1), 0) / size
    variance = tl.sum(tl.sum(m2 + count * delta * delta, 1), 0) / size - residue * residue
    return merged, residue, tl.maximum(variance, 0.0)


@triton.jit
def channel_row(rows, image, share, stride):
    """The row of `image` where every row, `stride` elements long, is that of `share` images in turn."""
    return rows + image // share * stride


@triton.jit
def _channel_bias(x_bias, channel, in_first, HAS_BIAS: tl.constexpr):
    """The bias of each channel, as a float32 row: 0 outside `in_first`, for the channels of x2."""
    if HAS_BIAS:
        return tl.load(x_bias + channel, in_first, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(channel).to(tl.float32)


@triton.jit
def _affine(weight, bias, scale, shift, image, channel, real, scale_stride, shift_stride, HAS_AFFINE: tl.constexpr):
    """(a, b): weight, bias and the AdaGN affine of each channel as one."""
    a = tl.load(weight + channel, real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, real, other=0.0).to(tl.float32)
    if HAS_AFFINE:
        outer = tl.load(scale + image * scale_stride + channel, real, other=0.0).to(tl.float32)
        a *= outer
        b = b * outer + tl.load(shift + image * shift_stride + channel, real, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _silu(y):
    return y * tl.sigmoid(y)


@triton.jit
def _inverse(code_scale, y, image, code_share):
    """1 / the scale of the image's codes of fp8, of which every one is that of `code_share` images; 1 where y holds no
    codes."""
    if y.dtype.element_ty == tl.float8e4nv:
        return 1.0 / tl.load(code_scale + image // code_share)
    else:
        return 1.0


@triton.jit
def _stored(out, y, inverse):
    """What is written to y; where y holds codes of fp8, out * inverse rounded to one, of at most 448."""
    if y.dtype.element_ty == tl.float8e4nv:
        out = tl.clamp(out * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return out.to(y.dtype.element_ty)


@triton.jit
def fused_kernel(
    x1, x2, x_bias, weight, bias, scale, shift, y, mean_out, rstd_out, code_scale,
    c1, c2, pixels, images2, bias_share, bias_stride, share, weight_stride, scale_stride, shift_stride, code_share, eps,
    GROUP_CHANNELS: tl.constexpr, SILU: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One group of one image: grid (groups, batch). BLOCK_C covers the group, STEPS * BLOCK_S the pixels."""
    group = tl.program_id(0)
    image, image2 = _images(tl.program_id(1), tl.num_programs(1), images2)
    lane_c = tl.arange(0, BLOCK_C)
    lane_s = tl.arange(0, BLOCK_S)
    real = lane_c < GROUP_CHANNELS
    channel = group * GROUP_CHANNELS + lane_c

    value = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    size = pixels * (GROUP_CHANNELS * 1.0)
    moved = _channel_bias(channel_row(x_bias, image, bias_share, bias_stride), channel, real & (channel < c1), HAS_BIAS)
    if STEPS == 1:
        # The whole group stays in registers: every element is a lane of its own.
        valid = real[:, None] & (lane_s < pixels)[None, :]
        value = _load(x1, x2, image, image2, channel, lane_s, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        count = tl.where(valid, 1.0, 0.0)
        mean, residue, variance = _moments(count, value, tl.zeros_like(value), moved, size, HAS_BIAS)
    else:
        lane_mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        lane_m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        for step in range(STEPS):
            pixel = step * BLOCK_S + lane_s
            valid = real[:, None] & (pixel < pixels)[None, :]
            tile = _load(x1, x2, image, image2, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
            lane_mean, lane_m2 = _welford(tile, valid, lane_mean, lane_m2, step + 1.0)
        count = tl.where(real[:, None], _lane_count(lane_s, pixels, BLOCK_S, STEPS), 0.0)
        mean, residue, variance = _moments(count, lane_mean, lane_m2, moved, size, HAS_BIAS)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    groups = tl.num_programs(0)
    tl.store(mean_out + image * groups + group, mean + residue)
    tl.store(rstd_out + image * groups + group, rstd)

    weight, bias = channel_row(weight, image, share, weight_stride), channel_row(bias, image, share, weight_stride)
    a, b = _affine(weight, bias, scale, shift, image, channel, real, scale_stride, shift_stride, HAS_AFFINE)
    a *= rstd
    if HAS_BIAS:
        offset, tail = _difference(mean, moved)
        b -= (residue + tail) * a
        offset = offset[:, None]
    else:
        b -= residue * a
        offset = mean
    channels = c1 + c2
    base = y + image * channels * pixels
    inverse = _inverse(code_scale, y, image, code_share)
    for step in range(STEPS):
        pixel = step * BLOCK_S + lane_s
        valid = real[:, None] & (pixel < pixels)[None, :]
        if STEPS > 1:
            value = _load(x1, x2, image, image2, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        out = (value - offset) * a[:, None] + b[:, None]
        if SILU:
            out = _silu(out)
        tl.store(base + _offset(channel, pixel, channels, pixels, CHANNELS_LAST), _stored(out, y, inverse), valid)


@triton.jit
def store_partial(
    partial, image, mean, m2, size, bias, channels, split, splits, PART: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the (mean, M2) of `size` pixels of each channel [BLOCK_C], with bias [BLOCK_C] added to the means, to
    partial [B, channels / PART, splits, 2]: runs of PART channels merged. PART divides BLOCK_C and channels."""
    row = tl.program_id(1) * (BLOCK_C // PART) + tl.arange(0, BLOCK_C // PART)
    if PART == 1:
        mean += bias
    else:
        bias = tl.reshape(bias, [BLOCK_C // PART, PART])
        mean = tl.reshape(mean, [BLOCK_C // PART, PART])
        merged = tl.sum(mean + bias, 1) * (1.0 / PART)
        offset, tail = _difference(merged[:, None], bias)
        delta = (mean - offset) - tail
        residue = tl.sum(delta, 1) * (1.0 / PART)
        m2 = tl.sum(tl.reshape(m2, [BLOCK_C // PART, PART]) + size * delta * delta, 1) - size * PART * residue * residue
        mean = merged + residue
    rows = channels // PART
    at = partial + ((image * rows + row) * splits + split) * 2
    tl.store(at, mean, row < rows)
    tl.store(at + 1, m2, row < rows)


@triton.jit
def stats_kernel(
    x1, x2, x_bias, partial, c1, c2, pixels, images2, bias_share, bias_stride, splits, chunk,
    PART: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """partial [B, (C1 + C2) / PART, splits, 2]: (mean, M2) of each run of PART channels over one split of `chunk`
    pixels, which STEPS * BLOCK_S cover. Grid (splits, channel blocks, batch)."""
    split = tl.program_id(0)
    image, image2 = _images(tl.program_id(2), tl.num_programs(2), images2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = c1 + c2
    real = channel < channels
    lane_s = tl.arange(0, BLOCK_S)
    first = split * chunk
    size = tl.minimum(pixels - first, chunk)
    lane_mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in tl.range(STEPS, loop_unroll_factor=LOADS // 2 if HAS_X2 else LOADS):
        lane = step * BLOCK_S + lane_s
        pixel = first + lane
        valid = real[:, None] & (lane < size)[None, :]
        tile = _load(x1, x2, image, image2, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        lane_mean, lane_m2 = _welford(tile, valid, lane_mean, lane_m2, step + 1.0)
    count = _lane_count(lane_s, size, BLOCK_S, STEPS)
    mean, m2 = _chan(tl.broadcast_to(count, [BLOCK_C, BLOCK_S]), lane_mean, lane_m2)
    bias = _channel_bias(channel_row(x_bias, image, bias_share, bias_stride), channel, channel < c1, HAS_BIAS)
    store_partial(partial, image, mean, m2, size.to(tl.float32), bias, channels, split, splits, PART, BLOCK_C)


@triton.jit
def merge_splits_kernel(
    partial, x_bias, stats, channels, pixels, splits, chunk,
    HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """stats [B, C, 2] from partial [B, C, splits, 2]: grid (channel blocks, batch). The bias comes last, so it
    leaves M2 as it is to the bit."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64) * channels + channel
    split = tl.arange(0, BLOCK_P)
    real = channel < channels
    valid = real[:, None] & (split < splits)[None, :]
    address = partial + (row[:, None] * splits + split[None, :]) * 2
    mean = tl.load(address, valid, other=0.0)
    m2 = tl.load(address + 1, valid, other=0.0)
    count = tl.minimum(tl.maximum(pixels - split * chunk, 0), chunk).to(tl.float32)[None, :]
    mean, m2 = _chan(tl.broadcast_to(count, [BLOCK_C, BLOCK_P]), mean, m2)
    mean += _channel_bias(x_bias, channel, real, HAS_BIAS)
    tl.store(stats + row * 2, mean, real)
    tl.store(stats + row * 2 + 1, m2, real)


@triton.jit
def _group_column(
    stats1, stats2, image, image2, channel, column, c1, c2, pixels, splits, chunk,
    GROUP_CHANNELS: tl.constexpr, PART: tl.constexpr, HAS_STATS2: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2), each [channels, columns]: what has to be merged to the statistics of each channel's
    group. Column `part * splits + split` of a row is one part of its group over one split of the pixels."""
    parts: tl.constexpr = GROUP_CHANNELS // PART
    split = column % splits
    row = (channel // GROUP_CHANNELS * parts)[:, None] + (column // splits)[None, :]
    valid = (channel < c1 + c2)[:, None] & (column < parts * splits)[None, :]
    count = tl.where(column < parts * splits, tl.minimum(pixels - split * chunk, chunk) * PART, 0)
    if HAS_STATS2:
        rows1 = c1 // PART
        first, second = valid & (row < rows1), valid & (row >= rows1)
        address1 = stats1 + ((image * rows1 + row) * splits + split[None, :]) * 2
        address2 = stats2 + ((image2 * (c2 // PART) + row - rows1) * splits + split[None, :]) * 2
        # A row belongs to one input only: the other's lanes are all zero.
        mean = tl.load(address1, first, other=0.0) + tl.load(address2, second, other=0.0)
        m2 = tl.load(address1 + 1, first, other=0.0) + tl.load(address2 + 1, second, other=0.0)
    else:
        address = stats1 + ((image * ((c1 + c2) // PART) + row) * splits + split[None, :]) * 2
        mean = tl.load(address, valid, other=0.0)
        m2 = tl.load(address + 1, valid, other=0.0)
    return count.to(tl.float32)[None, :], mean, m2


@triton.jit
def apply_kernel(
    x1, x2, x_bias, stats1, stats2, weight, bias, scale, shift, y, mean_out, rstd_out, code_scale,
    c1, c2, pixels, images2, bias_share, bias_stride, splits, chunk, share, weight_stride, scale_stride, shift_stride,
    code_share, eps,
    GROUP_CHANNELS: tl.constexpr, PART: tl.constexpr, SILU: tl.constexpr, HAS_AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_X2: tl.constexpr, HAS_STATS2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of every channel's group, then y = silu((x - mean) * a + b).
    Grid (pixel blocks, channel blocks, batch).

    stats1 is [B, (C1 + C2) / PART, splits, 2] as `stats_kernel` writes it, the bias in it; with HAS_STATS2,
    stats1 is [B, C1 / PART, splits, 2] and stats2 [B, C2 / PART, splits, 2]. Every program merges what it needs,
    from cache: cheaper than a launch between. MERGES * BLOCK_M covers the columns to merge.
    """
    image, image2 = _images(tl.program_id(2), tl.num_programs(2), images2)
    pixel = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = c1 + c2
    real = channel < channels
    valid = real[:, None] & (pixel < pixels)[None, :]
    size = pixels * (GROUP_CHANNELS * 1.0)
    lane_m = tl.arange(0, BLOCK_M)
    if MERGES == 1:
        count, lane_mean, lane_m2 = _group_column(
            stats1,
            stats2,
            image,
            image2,
            channel,
            lane_m,
            c1,
            c2,
            pixels,
            splits,
            chunk,
            GROUP_CHANNELS,
            PART,
            HAS_STATS2,
        )
        # Here: before, the compiler would move the tile to the statistics' layout through shared memory, and
        # back; after, it would wait for them.
        value = _load(x1, x2, image, image2, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
        mean = tl.sum(count * lane_mean, 1) / size
        delta = lane_mean - mean[:, None]
        # As in `_moments`.
        residue = tl.sum(count * delta, 1) / size
        variance = tl.sum(lane_m2 + count * delta * delta, 1) / size
    else:
        mean = tl.zeros([BLOCK_C], tl.float32)
        residue = tl.zeros([BLOCK_C], tl.float32)
        variance = tl.zeros([BLOCK_C], tl.float32)
        for step in range(MERGES):
            count, lane_mean, _m2 = _group_column(
                stats1, stats2, image, image2, channel, step * BLOCK_M + lane_m, c1, c2, pixels, splits, chunk,
                GROUP_CHANNELS, PART, HAS_STATS2,
            )  # fmt: skip
            mean += tl.sum(count * lane_mean, 1) / size
        for step in range(MERGES):
            count, lane_mean, lane_m2 = _group_column(
                stats1, stats2, image, image2, channel, step * BLOCK_M + lane_m, c1, c2, pixels, splits, chunk,
                GROUP_CHANNELS, PART, HAS_STATS2,
            )  # fmt: skip
            delta = lane_mean - mean[:, None]
            residue += tl.sum(count * delta, 1) / size
            variance += tl.sum(lane_m2 + count * delta * delta, 1) / size
        value = _load(x1, x2, image, image2, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST)
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(variance - residue * residue, 0.0) + eps)
    if tl.program_id(0) == 0:
        heads = real & (channel % GROUP_CHANNELS == 0)
        at = image * (channels // GROUP_CHANNELS) + channel // GROUP_CHANNELS
        tl.store(mean_out + at, mean + residue, heads)
        tl.store(rstd_out + at, rstd, heads)

    weight, bias = channel_row(weight, image, share, weight_stride), channel_row(bias, image, share, weight_stride)
    a, b = _affine(weight, bias, scale, shift, image, channel, real, scale_stride, shift_stride, HAS_AFFINE)
    a *= rstd
    if HAS_BIAS:
        mean, tail = _difference(
            mean, _channel_bias(channel_row(x_bias, image, bias_share, bias_stride), channel, channel < c1, HAS_BIAS)
        )
        residue += tail
    b -= residue * a
    out = (value - mean[:, None]) * a[:, None] + b[:, None]
    if SILU:
        out = _silu(out)
    address = y + image * channels * pixels + _offset(channel, pixel, channels, pixels, CHANNELS_LAST)
    tl.store(address, _stored(out, y, _inverse(code_scale, y, image, code_share)), valid)
