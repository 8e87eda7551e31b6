"""The Triton kernel of a residual block's end: its 1x1 skip convolution, added to what it skips. Imports Triton. No GPU
has run it yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import Launch, power_of_two, processors, row_share
from .group_norm_triton import _images, channel_row, store_partial

# Of a program's sums and of what it multiplies at once: pixels (of two bytes a number; half as many of four), channels.
TILE_S, TILE_C = 128, 64


@triton.jit
def add_product(
    total, x, weight, pixel, valid, channel, real, count, channels, STEPS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """total + x weight of an image x [pixels, count] and weight [count, channels]; STEPS blocks hold all of count."""
    for step in range(STEPS):
        row = step * BLOCK_K + tl.arange(0, BLOCK_K)
        known = row < count
        a = tl.load(x + pixel[:, None] * count + row[None, :], valid[:, None] & known[None, :], other=0.0)
        b = tl.load(weight + row[:, None] * channels + channel[None, :], known[:, None] & real[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def add_projected_kernel(
    h, x, x2, weight, bias, out, partial, c1, c2, channels, pixels, images2, weight_share, bias_share, bias_stride,
    splits, chunk, STEPS: tl.constexpr, STEPS1: tl.constexpr, STEPS2: tl.constexpr, HAS_STATS: tl.constexpr,
    PART: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = h + bias + cat([x, x2]) weight, all maps channels-last, weight [S, C1 + C2, channels], and with HAS_STATS
    the partial statistics of what is stored. Grid (splits, channel blocks, batch): a program makes some channels of
    `chunk` pixels, which STEPS * BLOCK_S cover. A tile is [BLOCK_S, BLOCK_C]: its statistics are merged with those of
    the tiles before it, by Chan's formula."""
    split = tl.program_id(0)
    image, image2 = _images(tl.program_id(2), tl.num_programs(2), images2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    first = split * chunk
    size = tl.minimum(pixels - first, chunk)
    x += image * c1 * pixels
    x2 += image2 * c2 * pixels
    weight += image // weight_share * (c1 + c2) * channels
    bias = channel_row(bias, image, bias_share, bias_stride)
    added = tl.load(bias + channel, real, other=0.0).to(tl.float32)[None, :]
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    # Loads of the next product overlap this one; those of the next tile as well would take twice the shared memory.
    for step in tl.range(STEPS, num_stages=1):
        lane = step * BLOCK_S + tl.arange(0, BLOCK_S)
        pixel = first + lane
        valid = lane < size
        total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        total = add_product(total, x, weight, pixel, valid, channel, real, c1, channels, STEPS1, BLOCK_K)
        total = add_product(
            total, x2, weight + c1 * channels, pixel, valid, channel, real, c2, channels, STEPS2, BLOCK_K
        )
        inside = valid[:, None] & real[None, :]
        at = image * channels * pixels + pixel[:, None] * channels + channel[None, :]
        total += tl.load(h + at, inside, other=0.0).to(tl.float32) + added
        rounded = total.to(out.dtype.element_ty)
        tl.store(out + at, rounded, inside)
        if HAS_STATS:
            value = tl.where(inside, rounded.to(tl.float32), 0.0)
            before = step * BLOCK_S * 1.0
            count = tl.minimum(tl.maximum(size - step * BLOCK_S, 0), BLOCK_S).to(tl.float32)
            middle = tl.sum(value, 0) / tl.maximum(count, 1.0)
            delta = tl.where(inside, value - middle[None, :], 0.0)
            apart = middle - mean
            share = count / (before + count)
            mean += apart * share
            m2 += tl.sum(delta * delta, 0) + apart * apart * before * share
    if HAS_STATS:
        none = tl.zeros([BLOCK_C], tl.float32)
        store_partial(partial, image, mean, m2, size.to(tl.float32), none, channels, split, splits, PART, BLOCK_C)


def add_projected_launches(
    h: torch.Tensor,
    x: torch.Tensor,
    x2: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    splits: int,
) -> list[Launch]:
    """Write out = h + bias + cat([x, x2]) weight, and the partial statistics of it where there is a table for them.

    h and out [B, O, H, W], x [B, C1, H, W] and x2 [B2, C2, H, W], channels-last and of one dtype; weight [S, C1+C2, O],
    dense; bias as of `residual_launches`; ``splits`` of the pixels, one program's each.
    """
    batch, channels, height, width = out.shape
    pixels, c1, c2 = height * width, x.shape[1], x2.shape[1]
    part = 1 if partial is None else channels // partial.shape[1]
    chunk = cdiv(pixels, splits)
    block_s = max(16, min(2 * TILE_S // out.element_size(), power_of_two(chunk)))
    block_c = max(16, part, min(TILE_C, power_of_two(channels)))
    # Small maps take small tiles, to fill the chip.
    while block_c > max(32, part) and splits * cdiv(channels, block_c) * batch < processors(out.device):
        block_c //= 2
    block_k = 64 if out.element_size() == 2 else 16
    share, stride = row_share(bias, out)
    arguments = {
        "h": h, "x": x, "x2": x2, "weight": weight, "bias": bias, "out": out,
        "partial": bias if partial is None else partial, "c1": c1, "c2": c2, "channels": channels, "pixels": pixels,
        "images2": len(x2), "weight_share": batch // len(weight), "bias_share": share, "bias_stride": stride,
        "splits": splits, "chunk": chunk,
    }  # fmt: skip
    constants = {
        "STEPS": cdiv(chunk, block_s), "STEPS1": cdiv(c1, block_k), "STEPS2": cdiv(c2, block_k),
        "HAS_STATS": partial is not None, "PART": part, "BLOCK_S": block_s, "BLOCK_C": block_c, "BLOCK_K": block_k,
    }  # fmt: skip
    grid = (splits, cdiv(channels, block_c), batch)
    warps = 8 if block_s * block_c * out.element_size() >= 2**14 else 4
    return [Launch(add_projected_kernel, grid, arguments, constants, warps)]
