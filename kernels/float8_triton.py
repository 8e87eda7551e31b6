"""The Triton kernel of 3x3 convolutions of fp8 codes. Imports Triton. No GPU has run it yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import Launch, power_of_two


@triton.jit
def conv_float8_kernel(
    x, weight, scale, y, channels, outputs, height, width, pixels,
    STEPS: tl.constexpr, UPSAMPLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [pixels, outputs] = scale * the product of 9 shifted maps of x and weight [outputs, 9, channels], all of them
    codes, summed in float32. Grid (pixel blocks, output blocks). ``pixels`` are those of all images of height x width;
    with UPSAMPLE x is half as high and wide, and each of its pixels is read as four. STEPS blocks hold all channels.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    image = (row // (height * width)).to(tl.int64)
    line, place = row // width % height, row % width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over taps and channels, so that loads of the next step overlap the product of this one.
    for step in range(9 * STEPS):
        tap = step // STEPS
        channel = step % STEPS * BLOCK_K + lane
        up, left = line + tap // 3 - 1, place + tap % 3 - 1
        inside = (row < pixels) & (up >= 0) & (up < height) & (left >= 0) & (left < width)
        if UPSAMPLE:
            at = (image * (height // 2) + up // 2) * (width // 2) + left // 2
        else:
            at = (image * height + up) * width + left
        real = channel < channels
        a = tl.load(x + (at * channels)[:, None] + channel[None, :], inside[:, None] & real[None, :], other=0.0)
        b = tl.load(
            weight + ((column * 9 + tap) * channels)[None, :] + channel[:, None],
            real[:, None] & (column < outputs)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    factor = tl.load(scale + column, column < outputs, other=0.0)
    address = y + (row.to(tl.int64) * outputs)[:, None] + column[None, :]
    tl.store(
        address, (total * factor[None, :]).to(y.dtype.element_ty), (row < pixels)[:, None] & (column < outputs)[None, :]
    )


def conv_float8_launches(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, y: torch.Tensor) -> list[Launch]:
    """Write y [B, O, H, W] from codes x [B, C, H, W] (or of half the size), both channels-last, and weight
    [O, 3, 3, C]."""
    batch, outputs, height, width = y.shape
    channels, pixels = x.shape[1], batch * height * width
    # Small maps take small tiles, to fill the chip; the least are those of the matrix units.
    block_n = max(32, min(128, power_of_two(outputs)))
    block_m, block_k = 128 if pixels >= 2**15 else 64, max(32, min(64, power_of_two(channels)))
    arguments = {
        "x": x, "weight": weight, "scale": scale, "y": y, "channels": channels, "outputs": outputs,
        "height": height, "width": width, "pixels": pixels,
    }  # fmt: skip
    constants = {
        "STEPS": cdiv(channels, block_k), "UPSAMPLE": x.shape[2] != height,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    grid = (cdiv(pixels, block_m), cdiv(outputs, block_n))
    return [Launch(conv_float8_kernel, grid, arguments, constants, 8 if block_m * block_n >= 2**14 else 4)]
