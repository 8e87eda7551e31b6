"""The last convolution of a U-Net, 3x3 to the few channels of an image, for inference: of a map in a lower precision to
a result in float32.

A framework's convolution rounds its result to the map's dtype. Of a network that predicts eps that is most of what
lower precision costs: where x_t is nearly noise, the image is the small difference of x_t and eps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import run
from ._layout import check_image, check_like, to_layout
from ._triton import fallback_reason

TAPS = 9


def head_weights(weights: Sequence[Tensor]) -> Tensor:
    """[S, 9, C, P] of S weights [O, C, 3, 3], as `head_convolution` takes them: P is the next multiple of 16 of O."""
    rows = torch.stack([weight.permute(2, 3, 1, 0).flatten(0, 1) for weight in weights])
    return F.pad(rows, (0, -rows.shape[-1] % 16)).contiguous()


def head_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d(x, weight, bias, padding=1), float32 [B, O, H, W], NCHW: products are summed in float32, and not rounded.

    x [B, C, H, W]; weight [S, 9, C, P] of `head_weights`, of x's dtype, and bias [S, O]: one for every B / S images in
    turn. Not differentiable. Raises ValueError for wrong shapes, dtypes or devices.
    """
    check_image("head_convolution", "x", x)
    rows = len(weight) if weight.dim() == 4 and len(weight) and not len(x) % len(weight) else "a divisor of x's batch"
    columns = -(-bias.shape[-1] // 16) * 16
    check_like("head_convolution", "weight", weight, (rows, TAPS, x.shape[1], columns), x.device)
    if weight.dtype != x.dtype:
        raise ValueError(f"head_convolution: weight is {weight.dtype} but x is {x.dtype}")
    check_like("head_convolution", "bias", bias, (rows, bias.shape[-1]), x.device)
    return _head_convolution(x, weight, bias)


def _empty(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty((len(x), bias.shape[1], *x.shape[2:]), dtype=torch.float32, device=x.device)


def _torch_head_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    kernels = weight[..., : bias.shape[1]].to(wide).permute(0, 3, 2, 1).unflatten(3, (3, 3))
    parts = zip(x.chunk(len(weight)), kernels, bias.to(wide), strict=True)
    return torch.cat([F.conv2d(part.to(wide), *own, padding=1) for part, *own in parts]).float().contiguous()


@torch.library.custom_op("pdae_fast::head_convolution", mutates_args=(), device_types="cpu")
def _head_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _torch_head_convolution(x, weight, bias)


@_head_convolution.register_kernel("cuda")
def _head_convolution_cuda(x, weight, bias):
    if fallback_reason(x) or x.shape[1] % 16:  # as for `add_projected`
        return _torch_head_convolution(x, weight, bias)
    from .head_convolution_triton import head_convolution_launches

    out = _empty(x, bias)
    run(head_convolution_launches(to_layout(x, True), weight.contiguous(), bias.contiguous(), out))
    return out


@_head_convolution.register_fake
def _(x, weight, bias):
    return _empty(x, bias)
