"""Triton kernels of the group norm's gradient; group_norm_plan.py launches them. Imports Triton.

Tiles and layouts are those of group_norm_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_triton import _load, _offset


@triton.jit
def _coefficient(table, plane, image, channel, channels):
    """One plane of a [planes, B, channels] table, as a column; the grid's axis 2 is the batch."""
    row = (plane * tl.num_programs(2) + image) * channels
    return tl.load(table + row + channel, channel < channels, other=0.0)[:, None]


@triton.jit
def _silu_gradient(y):
    s = tl.sigmoid(y)
    return s * (1.0 + y * (1.0 - s))


@triton.jit
def gradient_sums_kernel(
    grad, x1, x2, table, partial, c1, c2, pixels, splits,
    SILU: tl.constexpr, HAS_X2: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """partial [B, C, splits, 2]: sums over pixels of g and of g * (x - mean), g the gradient before the SiLU.
    Grid (splits, channel blocks, batch); table [3, B, C] = mean - bias, a, b."""
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
        centred = _load(x1, x2, image, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST) - mean
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
    """dx = a * g + slope * (x - mean) + level with table [5, B, C] = mean - bias, a, b, slope, level.
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
    centred = _load(x1, x2, image, image, channel, pixel, valid, c1, c2, pixels, HAS_X2, CHANNELS_LAST) - mean
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
