"""Triton kernels of the residual addition, plain and with 2x upsampling, and their plans. Import only where
Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from ._layout import is_channels_last

WARPS = 4
# One 16-byte access a thread: then doubled loads and stores agree on who holds what, and nothing is exchanged.
BLOCK_BYTES = 32 * WARPS * 16


@triton.jit
def upsample_kernel(
    h, residual, bias, out, rows, height, channels,
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
        value += tl.load(bias + channel, valid, other=0.0).to(tl.float32)
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
    h, residual, bias, out, size,
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
    value += tl.load(bias + channel, valid, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), valid)


def residual_launches(h: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> list[Launch]:
    """Write out = h + residual + bias: three [B, C, H, W] of one dense layout, and contiguous [C]."""
    batch, channels, height, width = out.shape
    size = channels * height * width
    block = BLOCK_BYTES // out.element_size()
    arguments = {"h": h, "residual": residual, "bias": bias, "out": out, "size": size}
    constants = {
        "CHANNELS": channels, "PIXELS": height * width, "CHANNELS_LAST": is_channels_last(out), "BLOCK": block,
    }  # fmt: skip
    return [Launch(residual_kernel, (triton.cdiv(size, block), batch), arguments, constants, WARPS)]


def upsample_launches(
    h: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> list[Launch]:
    """Write out [B, C, 2H, 2W]: upsample2x(h + residual) + bias when h is [B, C, H, W], h + upsample2x(residual)
    + bias when it is out's size.

    residual is [B, C, H, W]; all three share one dense layout. bias is contiguous [C] or None.
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
        "h": h, "residual": residual, "bias": h if bias is None else bias, "out": out, "rows": rows,
        "height": height, "channels": channels,
    }  # fmt: skip
    return [Launch(upsample_kernel, (triton.cdiv(elements, block),), arguments, constants, WARPS)]
