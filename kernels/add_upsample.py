"""A residual addition in one pass: with the bias of the convolution before it, or a 2x upsampling, or both.

A ResBlock ends in h + x, h being a convolution's output. cuDNN adds a convolution's bias in a pass of its own:
`residual_add` takes that bias along instead. The up ResBlock of an ADM U-Net ends in h + upsample2x(x):
`upsample_add` reads x at its own size, so the four times larger upsampled residual is never written.
`add_upsample` is upsample2x(h + residual), for an addition that is only read upsampled. These are differentiable,
keep the layout of h, add in float32 and round once. For inference `add_with_stats` also leaves what the GroupNorm
that reads the result needs to know of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import run
from ._layout import (
    check_image,
    check_like,
    check_partial,
    check_rows,
    empty_image,
    empty_partial,
    gathered,
    is_channels_last,
    spread,
    to_layout,
    unit_rows,
)
from ._triton import MAX_IMAGE_ELEMENTS, fallback_reason
from .group_norm_torch import torch_partial_stats


def add_upsample_reference(h: Tensor, residual: Tensor) -> Tensor:
    """upsample2x(h + residual) by indexing, in float32 (float64 for float64 inputs)."""
    total = h.to(torch.promote_types(h.dtype, torch.float32)) + residual
    return total.repeat_interleave(2, 2).repeat_interleave(2, 3)


def residual_add_reference(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h + residual + bias, in float32 (float64 for float64 inputs)."""
    total = h.to(torch.promote_types(h.dtype, torch.float32)) + residual
    return total if bias is None else total + spread(bias, len(h)).to(total.dtype)[..., None, None]


def upsample_add_reference(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h + upsample2x(residual) + bias by indexing, in float32 (float64 for float64 inputs)."""
    return residual_add_reference(h, residual.repeat_interleave(2, 2).repeat_interleave(2, 3), bias)


def add_upsample(h: Tensor, residual: Tensor) -> Tensor:
    """Nearest 2x upsampling of h + residual, both [B, C, H, W] of one dtype: [B, C, 2H, 2W] in h's dtype and
    layout.

    NCHW or channels-last; other stride patterns are copied first. Raises ValueError for wrong shapes, dtypes
    or devices.
    """
    _check("add_upsample", h, residual, 1)
    return _add_upsample(h, residual)


def residual_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h + residual, both [B, C, H, W] of one dtype, + bias of any floating dtype, [C], or [S, C] with a row for every
    B / S images in turn, or None: in h's dtype and layout.

    NCHW or channels-last; other stride patterns are copied first. Raises ValueError for wrong shapes, dtypes
    or devices.
    """
    _check("residual_add", h, residual, 1, bias)
    return _residual_add(h, residual, bias)


def upsample_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """h [B, C, 2H, 2W] plus the nearest 2x upsampling of residual [B, C, H, W], of one dtype, + bias as of
    `residual_add`, or None: in h's dtype and layout.

    NCHW or channels-last; other stride patterns are copied first. Raises ValueError for wrong shapes, dtypes
    or devices.
    """
    _check("upsample_add", h, residual, 2, bias)
    return _upsample_add(h, residual, bias)


def add_with_stats(h: Tensor, residual: Tensor, bias: Tensor | None, part: int, splits: int) -> tuple[Tensor, Tensor]:
    """(y, partial statistics of y): y as `residual_add` makes it, or where residual is half as high and wide as
    `upsample_add` does; the statistics as `partial_stats`. Not differentiable.

    Raises ValueError as these do.
    """
    _check("add_with_stats", h, residual, 1 if residual.shape == h.shape else 2, bias)
    check_partial("add_with_stats", h, part, splits)
    return _add_with_stats(h, residual, bias, part, splits)


def _check(op: str, h: Tensor, residual: Tensor, factor: int, bias: Tensor | None = None) -> None:
    check_image(op, "h", h)
    check_image(op, "residual", residual)
    if h.shape[2] % factor or h.shape[3] % factor:
        raise ValueError(f"{op}: h must have even height and width, got {tuple(h.shape)}")
    check_like(op, "residual", residual, (*h.shape[:2], h.shape[2] // factor, h.shape[3] // factor), h.device)
    if residual.dtype != h.dtype:
        raise ValueError(f"{op}: residual is {residual.dtype} but h is {h.dtype}")
    if bias is not None:
        check_rows(op, "bias", bias, h.shape[1], h)


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


def _torch_residual_add(h: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.add(h, residual, out=empty_image(h, h.shape))
    wide = torch.promote_types(h.dtype, torch.float32)
    # Promoted: a vector is no scalar.
    total = torch.add(h, spread(bias, len(h)).to(wide)[..., None, None]).add_(residual)
    return to_layout(total.to(h.dtype), is_channels_last(h))


def _torch_upsample_add(h: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    channels_last = is_channels_last(h)
    if bias is None:
        return _upsample(residual, channels_last).add_(h)
    # The bias is added where there are a quarter of the pixels.
    wide = torch.promote_types(h.dtype, torch.float32)
    total = _upsample(torch.add(residual, spread(bias, len(h)).to(wide)[..., None, None]), channels_last).add_(h)
    return total.to(h.dtype)


def _torch_add_with_stats(
    h: Tensor, residual: Tensor, bias: Tensor | None, part: int, splits: int
) -> tuple[Tensor, Tensor]:
    y = (_torch_residual_add if residual.shape == h.shape else _torch_upsample_add)(h, residual, bias)
    return y, torch_partial_stats(y, part, splits, None)


def _bias_gradient(ctx, grad: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[2]:  # in this order: an absent bias has no entry
        return None
    per_image = grad.sum((2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
    return gathered(per_image, ctx.bias_shape).to(ctx.bias_dtype)


def _keep_bias_dtype(ctx, inputs, output) -> None:
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.bias_shape = None if inputs[2] is None else inputs[2].shape


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
def _upsample_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    return _torch_upsample_add(h, residual, bias)


@_upsample_add.register_kernel("cuda")
def _upsample_add_cuda(h, residual, bias=None):
    if fallback_reason(h):
        return _torch_upsample_add(h, residual, bias)
    from .add_upsample_triton import upsample_launches

    channels_last = is_channels_last(h)
    out = empty_image(h, h.shape)
    h, residual = to_layout(h, channels_last), to_layout(residual, channels_last)
    run(upsample_launches(h, residual, out, unit_rows(bias)))
    return out


@_upsample_add.register_fake
def _(h, residual, bias=None):
    return empty_image(h, h.shape)


def _upsample_add_backward(ctx, grad):
    return grad, _sum_windows(grad), _bias_gradient(ctx, grad)


_upsample_add.register_autograd(_upsample_add_backward, setup_context=_keep_bias_dtype)


@torch.library.custom_op("pdae_fast::residual_add", mutates_args=(), device_types="cpu")
def _residual_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    return _torch_residual_add(h, residual, bias)


@_residual_add.register_kernel("cuda")
def _residual_add_cuda(h, residual, bias=None):
    if bias is None or fallback_reason(h):  # torch's own addition is one pass already
        return _torch_residual_add(h, residual, bias)
    from .add_upsample_triton import residual_launches

    channels_last = is_channels_last(h)
    out = empty_image(h, h.shape)
    h, residual = to_layout(h, channels_last), to_layout(residual, channels_last)
    run(residual_launches(h, residual, unit_rows(bias), out))
    return out


@_residual_add.register_fake
def _(h, residual, bias=None):
    return empty_image(h, h.shape)


def _residual_add_backward(ctx, grad):
    return grad, grad, _bias_gradient(ctx, grad)


_residual_add.register_autograd(_residual_add_backward, setup_context=_keep_bias_dtype)


@torch.library.custom_op("pdae_fast::add_with_stats", mutates_args=(), device_types="cpu")
def _add_with_stats(h: Tensor, residual: Tensor, bias: Tensor | None, part: int, splits: int) -> tuple[Tensor, Tensor]:
    return _torch_add_with_stats(h, residual, bias, part, splits)


@_add_with_stats.register_kernel("cuda")
def _add_with_stats_cuda(h, residual, bias, part, splits):
    if fallback_reason(h):
        return _torch_add_with_stats(h, residual, bias, part, splits)
    from .add_upsample_triton import add_stats_launches

    channels_last = is_channels_last(h)
    out, partial = empty_image(h, h.shape), empty_partial(h, part, splits)
    h, residual = to_layout(h, channels_last), to_layout(residual, channels_last)
    run(add_stats_launches(h, residual, unit_rows(bias), out, partial))
    return out, partial


@_add_with_stats.register_fake
def _(h, residual, bias, part, splits):
    return empty_image(h, h.shape), empty_partial(h, part, splits)
