"""A residual addition and a nearest-neighbour 2x upsampling in one pass.

The up ResBlock of an ADM U-Net ends in h + upsample2x(x): `upsample_add` reads x at its own size, so the four
times larger upsampled residual is never written. `add_upsample` is upsample2x(h + residual), for an addition
that is only read upsampled. Both are differentiable, keep the layout of h, add in float32 and round once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import check_image, check_like, empty_image, is_channels_last, to_layout
from ._triton import MAX_IMAGE_ELEMENTS, fallback_reason, run


def add_upsample_reference(h: Tensor, residual: Tensor) -> Tensor:
    """upsample2x(h + residual) by indexing, in float32 (float64 for float64 inputs)."""
    total = h.to(torch.promote_types(h.dtype, torch.float32)) + residual
    return total.repeat_interleave(2, 2).repeat_interleave(2, 3)


def upsample_add_reference(h: Tensor, residual: Tensor) -> Tensor:
    """h + upsample2x(residual) by indexing, in float32 (float64 for float64 inputs)."""
    residual = residual.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return h.to(torch.promote_types(h.dtype, torch.float32)) + residual


def add_upsample(h: Tensor, residual: Tensor) -> Tensor:
    """Nearest 2x upsampling of h + residual, both [B, C, H, W] of one dtype: [B, C, 2H, 2W] in h's dtype and
    layout.

    NCHW or channels-last; other stride patterns are copied first. Raises ValueError for wrong shapes, dtypes
    or devices.
    """
    _check("add_upsample", h, residual, 1)
    return _add_upsample(h, residual)


def upsample_add(h: Tensor, residual: Tensor) -> Tensor:
    """h [B, C, 2H, 2W] plus the nearest 2x upsampling of residual [B, C, H, W], of one dtype; in h's dtype
    and layout.

    NCHW or channels-last; other stride patterns are copied first. Raises ValueError for wrong shapes, dtypes
    or devices.
    """
    _check("upsample_add", h, residual, 2)
    return _upsample_add(h, residual)


def _check(op: str, h: Tensor, residual: Tensor, factor: int) -> None:
    check_image(op, "h", h)
    check_image(op, "residual", residual)
    if h.shape[2] % factor or h.shape[3] % factor:
        raise ValueError(f"{op}: h must have even height and width, got {tuple(h.shape)}")
    check_like(op, "residual", residual, (*h.shape[:2], h.shape[2] // factor, h.shape[3] // factor), h.device)
    if residual.dtype != h.dtype:
        raise ValueError(f"{op}: residual is {residual.dtype} but h is {h.dtype}")


def _sum_windows(grad: Tensor) -> Tensor:
    """The transpose of nearest upsampling: sums over 2x2 windows (a mean times 4 is exact in binary)."""
    return F.avg_pool2d(grad, 2) * 4


def _upsample(x: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return to_layout(F.interpolate(to_layout(x, True), scale_factor=2.0), True)
    # torch's NCHW interpolation walks pixel by pixel on the CPU: four strided copies are five times faster.
    out = x.new_empty((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    for row in (0, 1):
        for column in (0, 1):
            out[:, :, row::2, column::2] = x
    return out


def _torch_add_upsample(h: Tensor, residual: Tensor) -> Tensor:
    return _upsample(h + residual, is_channels_last(h))


def _torch_upsample_add(h: Tensor, residual: Tensor) -> Tensor:
    return _upsample(residual, is_channels_last(h)).add_(h)


@torch.library.custom_op("pdae_fast::add_upsample", mutates_args=(), device_types="cpu")
def _add_upsample(h: Tensor, residual: Tensor) -> Tensor:
    return _torch_add_upsample(h, residual)


@_add_upsample.register_kernel("cuda")
def _add_upsample_cuda(h, residual):
    if fallback_reason(h) or 4 * h[0].numel() > MAX_IMAGE_ELEMENTS:
        return _torch_add_upsample(h, residual)
    from .add_upsample_triton import upsample_launches

    channels_last = is_channels_last(h)
    out = empty_image(h, (*h.shape[:2], 2 * h.shape[2], 2 * h.shape[3]))
    run(upsample_launches(to_layout(h, channels_last), to_layout(residual, channels_last), out))
    return out


@_add_upsample.register_fake
def _(h, residual):
    return empty_image(h, (*h.shape[:2], 2 * h.shape[2], 2 * h.shape[3]))


def _add_upsample_backward(ctx, grad):
    grad = _sum_windows(grad)
    return grad, grad


_add_upsample.register_autograd(_add_upsample_backward)


@torch.library.custom_op("pdae_fast::upsample_add", mutates_args=(), device_types="cpu")
def _upsample_add(h: Tensor, residual: Tensor) -> Tensor:
    return _torch_upsample_add(h, residual)


@_upsample_add.register_kernel("cuda")
def _upsample_add_cuda(h, residual):
    if fallback_reason(h):
        return _torch_upsample_add(h, residual)
    from .add_upsample_triton import upsample_launches

    channels_last = is_channels_last(h)
    out = empty_image(h, h.shape)
    run(upsample_launches(to_layout(h, channels_last), to_layout(residual, channels_last), out))
    return out


@_upsample_add.register_fake
def _(h, residual):
    return empty_image(h, h.shape)


def _upsample_add_backward(ctx, grad):
    return grad, _sum_windows(grad)


_upsample_add.register_autograd(_upsample_add_backward)
