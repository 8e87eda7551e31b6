"""Triton kernel of the residual addition with 2x upsampling, and its plan. Import only where Triton is
installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._layout import is_channels_last
from ._triton import Launch


@triton.jit
def upsample_kernel(
    h, residual, out, rows,
    WIDTH: tl.constexpr, INNER: tl.constexpr, H_IS_LARGE: tl.constexpr, BLOCK: tl.constexpr,
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
    if H_IS_LARGE:
        odd_value = value + tl.load(h + even + length, valid, other=0.0).to(tl.float32)
        value += tl.load(h + even, valid, other=0.0).to(tl.float32)
        tl.store(out + even, value.to(out.dtype.element_ty), valid)
        tl.store(out + even + length, odd_value.to(out.dtype.element_ty), valid)
    else:
        tl.store(out + even, value.to(out.dtype.element_ty), valid)
        tl.store(out + even + length, value.to(out.dtype.element_ty), valid)


def upsample_launches(h: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> list[Launch]:
    """Write out [B, C, 2H, 2W]: upsample2x(h + residual) when h is [B, C, H, W], h + upsample2x(residual)
    when it is out's size.

    residual is [B, C, H, W]; all three share one dense layout.
    """
    batch, channels, height, width = residual.shape
    # Not residual's own answer: one pixel or one channel is dense in both layouts.
    channels_last = is_channels_last(out)
    inner, rows = (channels, batch * height) if channels_last else (1, batch * channels * height)
    elements = 2 * rows * width * inner
    warps = 4
    # One 16-byte access a thread: then doubled loads and stores agree on who holds what, and nothing is
    # exchanged.
    block = 32 * warps * 16 // out.element_size()
    constants = {"WIDTH": width, "INNER": inner, "H_IS_LARGE": h.shape == out.shape, "BLOCK": block}
    arguments = {"h": h, "residual": residual, "out": out, "rows": rows}
    return [Launch(upsample_kernel, (triton.cdiv(elements, block),), arguments, constants, warps)]
