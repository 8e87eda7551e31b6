"""Triton kernels of the residual addition, plain and with 2x upsampling, and their plans. Import only where
Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, row_share
from ._layout import is_channels_last
from .group_norm_plan import partial_blocks
from .group_norm_triton import LOADS, _chan, _lane_count, _offset, _welford, channel_row, store_partial

WARPS = 4
# One 16-byte access a thread: then doubled loads and stores agree on who holds what, and nothing is exchanged.
BLOCK_BYTES = 32 * WARPS * 16


@triton.jit
def upsample_kernel(
    h, residual, bias, out, rows, height, channels, bias_share, bias_stride,
    WIDTH: tl.constexpr, INNER: tl.constexpr, H_IS_LARGE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both output rows of some low-resolution pixels. A low-resolution image is [rows, WIDTH, INNER]: NCHW
    has B * C * H rows and INNER 1, channels-last B * H rows and INNER C. A program makes BLOCK elements of
    the even rows and the same of the odd ones: grid (blocks,). WIDTH and INNER are compile-time so that the
    divisions cost nothing and contiguity is seen."""
    length: tl.constexpr = 2 * WIDTH * INNER  # of one output row
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = lane // length
    column = lane % length
    valid = row < rows
    even = row * (2 * length) + column
    if INNER == 1:
        # One contiguous load, doubled in registers, instead of loading every value twice.
        half = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        once = tl.load(residual + half, half < rows * WIDTH, other=0.0).to(tl.float32)
        if not H_IS_LARGE:
            once += tl.load(h + half, half < rows * WIDTH, other=0.0).to(tl.float32)
        value = tl.interleave(once, once)
    else:
        small = row * (WIDTH * INNER) + column // (2 * INNER) * INNER + column % INNER
        value = tl.load(residual + small, valid, other=0.0).to(tl.float32)
        if not H_IS_LARGE:
            value += tl.load(h + small, valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        channel = row // height % channels if INNER == 1 else column % INNER
        image = row // height // channels if INNER == 1 else row // height
        value += tl.load(channel_row(bias, image, bias_share, bias_stride) + channel, valid, other=0.0).to(tl.float32)
    if H_IS_LARGE:
        odd_value = value + tl.load(h + even + length, valid, other=0.0).to(tl.float32)
        value += tl.load(h + even, valid, other=0.0).to(tl.float32)
        tl.store(out + even, value.to(out.dtype.element_ty), valid)
        tl.store(out + even + length, odd_value.to(out.dtype.element_ty), valid)
    else:
        tl.store(out + even, value.to(out.dtype.element_ty), valid)
        tl.store(out + even + length, value.to(out.dtype.element_ty), valid)


@triton.jit
def residual_kernel(
    h, residual, bias, out, size, bias_share, bias_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h + residual + bias, `size` elements an image in memory order: grid (blocks, batch). CHANNELS and PIXELS
    are compile-time as in `upsample_kernel`."""
    image = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < size
    at = image * size + lane
    value = tl.load(h + at, valid, other=0.0).to(tl.float32)
    value += tl.load(residual + at, valid, other=0.0).to(tl.float32)
    channel = lane % CHANNELS if CHANNELS_LAST else lane // PIXELS
    value += tl.load(channel_row(bias, image, bias_share, bias_stride) + channel, valid, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), valid)


@triton.jit
def add_stats_kernel(
    h, residual, bias, out, partial, channels, pixels, bias_share, bias_stride, splits, chunk,
    WIDTH: tl.constexpr, UPSAMPLE: tl.constexpr, HAS_BIAS: tl.constexpr, PART: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """h + residual + bias and its partial statistics [B, channels / PART, splits, 2], of what is stored: with
    UPSAMPLE the residual has WIDTH columns, half as many as h. Grid and blocks as of `stats_kernel`."""
    split = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    lane_s = tl.arange(0, BLOCK_S)
    first = split * chunk
    size = tl.minimum(pixels - first, chunk)
    base = image * channels * pixels
    if HAS_BIAS:
        row = channel_row(bias, image, bias_share, bias_stride)
        added = tl.load(row + channel, real, other=0.0).to(tl.float32)[:, None]
    lane_mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in tl.range(STEPS, loop_unroll_factor=LOADS // 2):
        lane = step * BLOCK_S + lane_s
        pixel = first + lane
        valid = real[:, None] & (lane < size)[None, :]
        at = base + _offset(channel, pixel, channels, pixels, CHANNELS_LAST)
        value = tl.load(h + at, valid, other=0.0).to(tl.float32)
        if UPSAMPLE:
            small = pixel // (4 * WIDTH) * WIDTH + pixel % (2 * WIDTH) // 2
            low = (image * channels * (pixels // 4)) + _offset(channel, small, channels, pixels // 4, CHANNELS_LAST)
            value += tl.load(residual + low, valid, other=0.0).to(tl.float32)
        else:
            value += tl.load(residual + at, valid, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += added
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + at, rounded, valid)
        lane_mean, lane_m2 = _welford(rounded.to(tl.float32), valid, lane_mean, lane_m2, step + 1.0)
    count = _lane_count(lane_s, size, BLOCK_S, STEPS)
    mean, m2 = _chan(tl.broadcast_to(count, [BLOCK_C, BLOCK_S]), lane_mean, lane_m2)
    none = tl.zeros([BLOCK_C], tl.float32)
    store_partial(partial, image, mean, m2, size.to(tl.float32), none, channels, split, splits, PART, BLOCK_C)


def _terms(h: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> dict:
    """Kernel arguments of the sum; an absent bias is h, never read."""
    share, stride = row_share(bias, out)
    return {
        "h": h, "residual": residual, "bias": h if bias is None else bias, "out": out, "bias_share": share,
        "bias_stride": stride,
    }  # fmt: skip


def add_stats_launches(
    h: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, partial: torch.Tensor
) -> list[Launch]:
    """Write out [B, C, H, W] = h + residual + bias, residual of out's size or of half its height and width, and its
    partial statistics [B, C / part, splits, 2]. One dense layout, out's; bias as of `residual_launches`, or None."""
    batch, channels, height, width = out.shape
    splits = partial.shape[2]
    chunk = triton.cdiv(height * width, splits)
    constants, warps = partial_blocks(out, channels // partial.shape[1], chunk)
    constants |= {"WIDTH": residual.shape[3], "UPSAMPLE": residual.shape != h.shape, "HAS_BIAS": bias is not None}
    arguments = {
        **_terms(h, residual, bias, out), "partial": partial,
        "channels": channels, "pixels": height * width, "splits": splits, "chunk": chunk,
    }  # fmt: skip
    grid = (splits, triton.cdiv(channels, constants["BLOCK_C"]), batch)
    return [Launch(add_stats_kernel, grid, arguments, constants, warps)]


def residual_launches(h: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> list[Launch]:
    """Write out = h + residual + bias: three [B, C, H, W] of one dense layout, and [C] or [S, C] with unit stride along
    the channels."""
    batch, channels, height, width = out.shape
    size = channels * height * width
    block = BLOCK_BYTES // out.element_size()
    arguments = {**_terms(h, residual, bias, out), "size": size}
    constants = {
        "CHANNELS": channels, "PIXELS": height * width, "CHANNELS_LAST": is_channels_last(out), "BLOCK": block,
    }  # fmt: skip
    return [Launch(residual_kernel, (triton.cdiv(size, block), batch), arguments, constants, WARPS)]


def upsample_launches(
    h: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> list[Launch]:
    """Write out [B, C, 2H, 2W]: upsample2x(h + residual) + bias when h is [B, C, H, W], h + upsample2x(residual)
    + bias when it is out's size.

    residual is [B, C, H, W]; all three share one dense layout. bias as of `residual_launches`, or None.
    """
    batch, channels, height, width = residual.shape
    # Not residual's own answer: one pixel or one channel is dense in both layouts.
    channels_last = is_channels_last(out)
    inner, rows = (channels, batch * height) if channels_last else (1, batch * channels * height)
    elements = 2 * rows * width * inner
    block = BLOCK_BYTES // out.element_size()
    constants = {
        "WIDTH": width, "INNER": inner, "H_IS_LARGE": h.shape == out.shape, "HAS_BIAS": bias is not None,
        "BLOCK": block,
    }  # fmt: skip
    arguments = {
        **_terms(h, residual, bias, out), "rows": rows, "height": height, "channels": channels,
    }  # fmt: skip
    return [Launch(upsample_kernel, (triton.cdiv(elements, block),), arguments, constants, WARPS)]
