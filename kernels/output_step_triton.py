"""Triton kernels of the end of a step, and their plan. Import only where Triton is installed.

`project_kernel` reads every pixel of a decoder's last map once: it normalises and activates it on the way and
multiplies it with all nine taps of the output convolution at once, so that the activation, the expensive part, is
computed once a pixel and not once a tap. What it leaves is nine float32 numbers a pixel and image channel; those of
the two heads are one sum already, eps - √(1-ᾱ) G. `fold_kernel` adds the nine where they belong and takes the DDIM
step. A tap outside the map is left out there: the padding is zeros of the activated map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ._layout import is_channels_last
from ._triton import Launch, power_of_two, processors
from .ddim_update_triton import advance
from .group_norm_plan import _statistics
from .group_norm_triton import _affine, _group_column, _load, _silu

if TYPE_CHECKING:
    from .output_step import Head

TAPS = 9
MERGE_TILE = 512  # channels x parts of statistics that are merged at once, while the map's tile holds its registers
FOLD_BLOCK = 256  # pixels a program of the second kernel: 9 loads, all of neighbours, and one store a thread
FOLD_WARPS = 4


@triton.jit
def _group_moments(
    partial, image, channel, channels, pixels, splits, chunk, eps,
    GROUP_CHANNELS: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    MERGES: tl.constexpr,
):  # fmt: skip
    """(mean, residue, 1 / deviation) of each channel's group, from statistics in parts; as `apply_kernel` merges
    them."""
    size = pixels * (GROUP_CHANNELS * 1.0)
    lane = tl.arange(0, BLOCK_M)
    mean = tl.zeros([BLOCK_C], tl.float32)
    residue = tl.zeros([BLOCK_C], tl.float32)
    variance = tl.zeros([BLOCK_C], tl.float32)
    for step in range(MERGES):
        count, lane_mean, _m2 = _group_column(
            partial, partial, image, channel, step * BLOCK_M + lane, channels, 0, pixels, splits, chunk,
            GROUP_CHANNELS, PART, False,
        )  # fmt: skip
        mean += tl.sum(count * lane_mean, 1) / size
    for step in range(MERGES):
        count, lane_mean, lane_m2 = _group_column(
            partial, partial, image, channel, step * BLOCK_M + lane, channels, 0, pixels, splits, chunk,
            GROUP_CHANNELS, PART, False,
        )  # fmt: skip
        delta = lane_mean - mean[:, None]
        residue += tl.sum(count * delta, 1) / size
        variance += tl.sum(lane_m2 + count * delta * delta, 1) / size
    return mean, residue, 1.0 / tl.sqrt_rn(tl.maximum(variance - residue * residue, 0.0) + eps)


@triton.jit
def _add_products(
    total, h, partial, norm_weight, norm_bias, weight, image, pixel, channels, columns, pixels, splits, chunk, eps,
    GROUP_CHANNELS: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_S] + weight [columns, C] @ silu(norm(h)): what each pixel adds to its neighbours."""
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(CHUNKS, num_stages=1):
        channel = step * BLOCK_C + tl.arange(0, BLOCK_C)
        real = channel < channels
        valid = real[:, None] & (pixel < pixels)[None, :]
        value = _load(h, h, image, channel, pixel, valid, channels, 0, pixels, False, True)
        mean, residue, rstd = _group_moments(
            partial, image, channel, channels, pixels, splits, chunk, eps, GROUP_CHANNELS, PART, BLOCK_C, BLOCK_M,
            MERGES,
        )  # fmt: skip
        a, b = _affine(norm_weight, norm_bias, norm_weight, norm_bias, image, channel, real, 0, 0, False)
        a *= rstd
        b -= residue * a
        # Lanes without a channel hold 0 before the activation and after it.
        active = _silu((value - mean[:, None]) * a[:, None] + b[:, None]).to(h.dtype.element_ty)
        taps = tl.load(
            weight + column[:, None] * channels + channel[None, :],
            (column < columns)[:, None] & real[None, :],
            other=0.0,
        )
        if WIDE:
            total = tl.dot(taps.to(tl.float32), active.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(taps, active, total)
    return total


@triton.jit
def project_kernel(
    h1, partial1, norm_weight1, norm_bias1, weight1, h2, partial2, norm_weight2, norm_bias2, weight2,
    coefficients, index, products, channels, columns, pixels, splits, chunk, eps,
    HAS_GRADIENT: tl.constexpr, PER_SAMPLE: tl.constexpr, GROUP_CHANNELS: tl.constexpr, PART: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """products [B, columns, pixels], a column an image channel's tap; grid (pixel blocks, batch). CHUNKS * BLOCK_C
    covers the channels, BLOCK_N the columns, MERGES * BLOCK_M the parts of a group's statistics."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    if HAS_GRADIENT:
        total = _add_products(
            total, h2, partial2, norm_weight2, norm_bias2, weight2, image, pixel, channels, columns, pixels, splits,
            chunk, eps, GROUP_CHANNELS, PART, WIDE, BLOCK_C, BLOCK_N, BLOCK_S, BLOCK_M, CHUNKS, MERGES,
        )  # fmt: skip
        total *= -tl.load(coefficients + tl.load(index + image * PER_SAMPLE) * 6 + 2)
    total = _add_products(
        total, h1, partial1, norm_weight1, norm_bias1, weight1, image, pixel, channels, columns, pixels, splits,
        chunk, eps, GROUP_CHANNELS, PART, WIDE, BLOCK_C, BLOCK_N, BLOCK_S, BLOCK_M, CHUNKS, MERGES,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_N)
    address = products + (image * columns + column[:, None]) * pixels + pixel[None, :]
    tl.store(address, total, (column < columns)[:, None] & (pixel < pixels)[None, :])


@triton.jit
def fold_kernel(
    x, products, bias1, bias2, coefficients, index, out, height, width,
    HAS_GRADIENT: tl.constexpr, PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The noise of each pixel from the products of its neighbourhood, and the step: grid (pixel blocks, image
    channels, batch)."""
    channel = tl.program_id(1)
    channels = tl.num_programs(1)
    image = tl.program_id(2).to(tl.int64)
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = pixel < pixels
    line = pixel // width
    place = pixel % width
    row = coefficients + tl.load(index + image * PER_SAMPLE) * 6
    bias = tl.load(bias1 + channel).to(tl.float32)
    if HAS_GRADIENT:
        bias -= tl.load(row + 2) * tl.load(bias2 + channel).to(tl.float32)
    noise = tl.zeros([BLOCK], tl.float32) + bias
    base = products + (image * channels + channel) * 9 * pixels
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            inside = (line + down >= 0) & (line + down < height) & (place + right >= 0) & (place + right < width)
            tap = (down + 1) * 3 + right + 1
            noise += tl.load(base + tap * pixels + pixel + down * width + right, real & inside, other=0.0)
    if CHANNELS_LAST:
        at = (image * pixels + pixel) * channels + channel
    else:
        at = (image * channels + channel) * pixels + pixel
    tl.store(out + at, advance(tl.load(x + at, real, other=0.0), noise, row, CLAMP), real)


def _blocks(h: torch.Tensor, columns: int, parts: int) -> tuple[dict, int]:
    """(blocks, warps) of `project_kernel` for maps like h, whose groups have their statistics in so many parts.

    Whole pixels where they fit: what waits for memory is then long enough, and merged statistics serve all channels.
    Smaller tiles for a chip that would stay empty, and in float32, which is multiplied without matrix units and whose
    operands take many registers.
    """
    batch, channels, height, width = h.shape
    wide = h.dtype == torch.float32
    few = batch * triton.cdiv(height * width, 64) < 2 * processors(h.device)
    exact = [size for size in (128, 64, 32) if channels % size == 0]
    block_c = max(16, exact[0] if exact else power_of_two(channels))
    block_c = min(block_c, 32 if wide else 64 if few else 128)
    block_s = max(16, min(power_of_two(height * width), 32 if wide or few else 64))
    block_m = min(power_of_two(parts), MERGE_TILE // block_c)
    blocks = {
        "WIDE": wide, "BLOCK_C": block_c, "BLOCK_N": max(16, power_of_two(columns)), "BLOCK_S": block_s,
        "BLOCK_M": block_m, "CHUNKS": triton.cdiv(channels, block_c), "MERGES": triton.cdiv(parts, block_m),
    }  # fmt: skip
    return blocks, 8 if block_c * block_s * h.element_size() >= 8192 else 4


def output_step_launches(
    x: torch.Tensor,
    eps: Head,
    gradient: Head | None,
    coefficients: torch.Tensor,
    index: torch.Tensor,
    num_groups: int,
    norm_eps: float,
    clamp: bool,
    out: torch.Tensor,
) -> list[Launch]:
    """Write out. x and out are [B, C, H, W] of one dense layout; the heads' maps and weights are channels-last,
    everything else is contiguous."""
    h = eps.h
    batch, channels, height, width = h.shape
    pixels, columns, per_group = height * width, TAPS * x.shape[1], channels // num_groups
    heads = [eps] if gradient is None else [eps, gradient]
    launches, statistics = map(list, zip(*(_statistics(head.h, None, None, per_group) for head in heads), strict=True))
    part, splits, chunk = statistics[0].part, statistics[0].splits, statistics[0].chunk
    blocks, warps = _blocks(h, columns, per_group // part * splits)
    products = torch.empty((batch, columns, pixels), dtype=torch.float32, device=h.device)
    step = {"coefficients": coefficients, "index": index}
    flags = {"HAS_GRADIENT": gradient is not None, "PER_SAMPLE": index.dim() == 1}
    arguments: dict[str, torch.Tensor | int | float] = {}
    for i in (0, 1):  # without G the first head stands in for it, never read
        head, table = heads[i % len(heads)], statistics[i % len(heads)].table
        arguments |= {
            f"h{i + 1}": head.h, f"partial{i + 1}": table, f"norm_weight{i + 1}": head.norm_weight,
            f"norm_bias{i + 1}": head.norm_bias, f"weight{i + 1}": head.weight,
        }  # fmt: skip
    arguments |= {
        **step, "products": products, "channels": channels, "columns": columns, "pixels": pixels, "splits": splits,
        "chunk": chunk, "eps": norm_eps,
    }  # fmt: skip
    constants = {**flags, "GROUP_CHANNELS": per_group, "PART": part, **blocks}
    launches.append(
        Launch(project_kernel, (triton.cdiv(pixels, blocks["BLOCK_S"]), batch), arguments, constants, warps)
    )
    arguments = {
        "x": x, "products": products, "bias1": heads[0].bias, "bias2": heads[-1].bias, **step, "out": out,
        "height": height, "width": width,
    }  # fmt: skip
    constants = {**flags, "CLAMP": clamp, "CHANNELS_LAST": is_channels_last(x), "BLOCK": FOLD_BLOCK}
    grid = (triton.cdiv(pixels, FOLD_BLOCK), x.shape[1], batch)
    return [*launches, Launch(fold_kernel, grid, arguments, constants, FOLD_WARPS)]
