"""The Triton kernel of a U-Net's last convolution. Imports Triton. No GPU has run it yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import Launch, power_of_two
from .add_projected_triton import add_product

TILE_S = 128  # pixels of a program


@triton.jit
def head_kernel(
    x, weight, bias, out, channels, columns, outputs, height, width, weight_share, STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, outputs, H, W] = conv3x3(x) + bias, x channels-last, weight [S, 9, channels, columns], columns at least
    outputs. Grid (pixel blocks, batch). A tap reads the pixels beside those of the program: from cache, but the first.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    output = tl.arange(0, BLOCK_C)
    pixels = height * width
    row = pixel // width
    column = pixel % width
    real = output < outputs
    own = image // weight_share
    x += image * channels * pixels
    weight += own * 9 * channels * columns
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    # As in `add_projected_kernel`: the loop inside is the one whose loads overlap.
    for tap in tl.range(9, num_stages=1):
        y = row + tap // 3 - 1
        z = column + tap % 3 - 1
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        total = add_product(
            total, x, weight + tap * channels * columns, y * width + z, inside, output, output < columns, channels,
            columns, STEPS, BLOCK_K,
        )  # fmt: skip
    total += tl.load(bias + own * outputs + output, real, other=0.0).to(tl.float32)[None, :]
    at = (image * outputs + output[None, :]) * pixels + pixel[:, None]
    tl.store(out + at, total, (pixel < pixels)[:, None] & real[None, :])


def head_convolution_launches(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor
) -> list[Launch]:
    """Write out [B, O, H, W], float32 and NCHW: conv3x3 of x [B, C, H, W], channels-last, with weight [S, 9, C, P] of
    `head_weights` and bias [S, O], dense."""
    batch, outputs, height, width = out.shape
    block_s = max(16, min(TILE_S, power_of_two(height * width)))
    block_k = 64 if x.element_size() == 2 else 16
    arguments = {
        "x": x, "weight": weight, "bias": bias, "out": out, "channels": x.shape[1], "columns": weight.shape[3],
        "outputs": outputs, "height": height, "width": width, "weight_share": batch // len(weight),
    }  # fmt: skip
    constants = {
        "STEPS": cdiv(x.shape[1], block_k), "BLOCK_S": block_s, "BLOCK_C": power_of_two(weight.shape[3]),
        "BLOCK_K": block_k,
    }  # fmt: skip
    return [Launch(head_kernel, (cdiv(height * width, block_s), batch), arguments, constants, 4)]
