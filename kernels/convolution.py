"""A convolution into memory that is there: several networks on one batch each write their share of one map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolution_into(x: Tensor, weight: Tensor, out: Tensor, stride: int = 1, padding: int = 0) -> None:
    """Write conv2d(x, weight) of x [B, C, H, W] and weight [O, C, R, R] to out [B, O, H', W'], all of one dtype;
    without a copy where cuDNN runs it and all are channels-last.

    Not differentiable. Raises ValueError for an ``out`` of another shape or dtype.
    """
    sides = [(size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:]]
    shape = (len(x), len(weight), *sides)
    if out.shape != shape or out.dtype != x.dtype:
        raise ValueError(f"convolution_into: out must be {x.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    _convolution_into(x, weight, out, stride, padding)


@torch.library.custom_op("pdae_fast::convolution_into", mutates_args=("out",), device_types="cpu")
def _convolution_into(x: Tensor, weight: Tensor, out: Tensor, stride: int, padding: int) -> None:
    out.copy_(F.conv2d(x, weight, None, stride, padding))


def _has_cudnn() -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


@_convolution_into.register_kernel("cuda")
def _convolution_into_cuda(x, weight, out, stride, padding):
    """As conv2d calls cuDNN, which takes the memory to write to; float32 is float32. No hardware has run it yet."""
    if not _has_cudnn():
        out.copy_(F.conv2d(x, weight, None, stride, padding))
        return
    cudnn = torch.backends.cudnn
    torch.ops.aten.cudnn_convolution.out(
        x, weight, [padding] * 2, [stride] * 2, [1, 1], 1, cudnn.benchmark,
        cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), False, out=out,
    )  # fmt: skip


@_convolution_into.register_fake
def _(x, weight, out, stride, padding):
    return None
