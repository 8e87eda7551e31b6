"""Convolutions of several networks on one batch: every weight on its share of the images, into one map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import memory_format


def convolutions(x: Tensor, weights: list[Tensor], stride: int, padding: int) -> Tensor:
    """conv2d(x, weight) [B, O, H', W'] of x [B, C, H, W], the k-th of S ``weights`` [O, C, R, R] on the k-th B / S
    images, channels-last and without a copy where cuDNN runs them. All of one dtype.

    Not differentiable. Raises ValueError when the images do not fall into as many shares.
    """
    if len(x) % len(weights):
        raise ValueError(f"convolutions: {len(x)} images do not fall into {len(weights)} shares")
    return _convolutions(x, weights, stride, padding)


def _shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    sides = [(size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:]]
    return len(x), len(weight), *sides


def _empty(x: Tensor, weights: list[Tensor], stride: int, padding: int) -> Tensor:
    shape = _shape(x, weights[0], stride, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(True))


@torch.library.custom_op("pdae_fast::convolutions", mutates_args=(), device_types="cpu")
def _convolutions(x: Tensor, weights: list[Tensor], stride: int, padding: int) -> Tensor:
    y = _empty(x, weights, stride, padding)
    for part, weight, out in zip(x.chunk(len(weights)), weights, y.chunk(len(weights)), strict=True):
        out.copy_(F.conv2d(part, weight, None, stride, padding))
    return y


def _has_cudnn() -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


@_convolutions.register_kernel("cuda")
def _convolutions_cuda(x, weights, stride, padding):
    """As conv2d calls cuDNN, which takes the memory to write to; float32 is float32. No hardware has run it yet."""
    y, cudnn = _empty(x, weights, stride, padding), torch.backends.cudnn
    for part, weight, out in zip(x.chunk(len(weights)), weights, y.chunk(len(weights)), strict=True):
        if _has_cudnn():
            torch.ops.aten.cudnn_convolution.out(
                part, weight, [padding] * 2, [stride] * 2, [1, 1], 1, cudnn.benchmark,
                cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), False, out=out,
            )  # fmt: skip
        else:
            out.copy_(F.conv2d(part, weight, None, stride, padding))
    return y


@_convolutions.register_fake
def _(x, weights, stride, padding):
    return _empty(x, weights, stride, padding)
