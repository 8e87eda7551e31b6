"""The group norm by torch's own operations: its definition, the CPU implementation, and the CUDA one where a kernel
cannot run. Arguments as the ops of group_norm.py have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import empty_image, is_channels_last, spread, to_layout

SMALL_MAP = 1024  # pixels from which torch's channels-last group norm of the CPU walks pixels instead of groups


def scalar_in_half(x: Tensor, num_groups: int) -> bool:
    """Whether torch's CPU group norm of a channels-last map falls back to scalar code in half precision: going through
    float32 is 2 to 6 times faster then, casts included."""
    _, channels, height, width = x.shape
    return (
        x.device.type == "cpu"
        and x.element_size() == 2
        and height * width < SMALL_MAP
        and channels // num_groups % 16 != 0
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def group_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs), returned in that precision. Arguments as
    `group_norm`."""
    wide = wide_dtype(x.dtype)
    weight, bias, x2, x_bias = whole(x, weight, bias, x2, x_bias)
    x = x.to(wide) if x_bias is None else x.to(wide) + x_bias.to(wide)[..., None, None]
    x = x if x2 is None else torch.cat([x, x2.to(wide)], 1)
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    y = y * weight.to(x.dtype)[..., None, None] + bias.to(x.dtype)[..., None, None]
    if scale is not None:
        y = y * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None]
    return F.silu(y) if silu else y


def whole(x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor | None, x_bias: Tensor | None) -> tuple:
    """weight, bias, x2 and x_bias with as many rows and images as x, but for the vectors among them."""
    weight, bias, x_bias = (None if t is None else spread(t, len(x)) for t in (weight, bias, x_bias))
    if x2 is not None and len(x2) < len(x):
        x2 = x2.repeat(len(x) // len(x2), 1, 1, 1)
    return weight, bias, x2, x_bias


def collapse(weight, bias, scale, shift, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a, b), each [B, C] in `dtype`: the two affines as one, normalised * a + b."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    if scale is None:
        return weight.expand(batch, -1), bias.expand(batch, -1)
    scale = scale.to(dtype)
    return weight * scale, bias * scale + shift.to(dtype)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _native(x: Tensor, a: Tensor, b: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's group norm of a dense x with an affine per image, a, b [B, C]: y, and mean and rstd [B,
    groups]."""
    batch, channels, height, width = x.shape
    if not _on_cpu(x):
        # CUDA's operator takes neither channels-last maps nor an affine that is wider than the map.
        x = x.contiguous().to(a.dtype)
    if is_channels_last(x):
        images = [_native_channels_last(x[i : i + 1], a[i], b[i], num_groups, eps) for i in range(batch)]
        return images[0] if batch == 1 else tuple(torch.cat(parts) for parts in zip(*images, strict=True))
    # A batch is one image of B * C channels: then an affine a channel is an affine an (image, channel).
    y, mean, rstd = torch.native_group_norm(
        x.reshape(1, batch * channels, height, width), a.flatten(), b.flatten(),
        1, batch * channels, height * width, batch * num_groups, eps,
    )  # fmt: skip
    return y.view(x.shape), mean.view(batch, num_groups), rstd.view(batch, num_groups)


def _native_channels_last(x: Tensor, a: Tensor, b: Tensor, num_groups: int, eps: float):
    """`_native` of one image on the CPU; a, b [C]."""
    _, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    if scalar_in_half(x, num_groups):
        x = x.float()
    y, mean, rstd = torch.native_group_norm(x, a, b, 1, channels, pixels, num_groups, eps)
    if x.element_size() > 2 and (mean * rstd).abs().max() > 2:
        # That loop forms E[x^2] - E[x]^2, which at a mean of 5 deviations has lost up to two digits: centre
        # the image first.
        centred = x - mean.view(num_groups, 1).expand(-1, per_group).reshape(1, channels, 1, 1)
        y, offset, rstd = torch.native_group_norm(centred, a, b, 1, channels, pixels, num_groups, eps)
        mean = mean + offset
    return y, mean, rstd


def _biased(x: Tensor, x_bias: Tensor | None) -> Tensor:
    """x + x_bias, added in the wider of their dtypes and rounded once to x's, in x's layout."""
    if x_bias is None:
        return x
    return torch.add(x, x_bias[..., None, None], out=torch.empty_like(x))


def torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, x2, x_bias = whole(x, weight, bias, x2, x_bias)
    channels_last = is_channels_last(x)
    dtype = x.dtype
    x = _biased(to_layout(x, channels_last), x_bias)
    x = x if x2 is None else torch.cat([x, to_layout(x2, channels_last)], 1)
    a, b = collapse(weight, bias, scale, shift, x.shape[0], wide_dtype(dtype))
    y, mean, rstd = _native(x, a, b, num_groups, eps)
    if silu:
        y = F.silu(y, inplace=True)
    return to_layout(y.to(dtype), channels_last), mean.to(wide_dtype(dtype)), rstd.to(wide_dtype(dtype))


def torch_stats(x: Tensor, x_bias: Tensor | None) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    mean = wide.mean((2, 3), keepdim=True)
    m2 = (wide - mean).square_().sum((2, 3))  # torch.var_mean is 15 times slower here
    mean = mean[:, :, 0, 0]
    return torch.stack([mean if x_bias is None else mean + x_bias.to(mean.dtype), m2], 2).float()


def torch_partial_stats(x: Tensor, part: int, splits: int, x_bias: Tensor | None) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    wide = wide if x_bias is None else wide + spread(x_bias, len(x)).to(wide.dtype)[..., None, None]
    wide = wide.flatten(2).reshape(x.shape[0], x.shape[1] // part, part, -1)
    found = []
    for piece in wide.split(-(-wide.shape[3] // splits), 3):
        mean = piece.mean((2, 3), keepdim=True)
        found.append(torch.stack([mean[:, :, 0, 0], (piece - mean).square_().sum((2, 3))], 2))
    return torch.stack(found, 2).float()


def torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias) -> Tensor:
    batch, _, height, width = x.shape
    weight, bias, x2, x_bias = whole(x, weight, bias, x2, x_bias)
    if stats2 is not None and len(stats2) < batch:
        stats2 = stats2.repeat(batch // len(stats2), *[1] * (stats2.dim() - 1))
    pixels, channels = height * width, x.shape[1] + (0 if x2 is None else x2.shape[1])
    splits = stats.shape[2] if stats.dim() == 4 else 1
    stats = stats if stats2 is None else torch.cat([stats, stats2], 1)
    level, m2 = stats.to(wide_dtype(x.dtype)).view(batch, num_groups, -1, splits, 2).unbind(4)
    chunk = -(-pixels // splits)
    # Of a group's elements each split has as many as it has pixels.
    share = torch.full((splits,), chunk / pixels, dtype=level.dtype, device=x.device)
    share[-1:] = (pixels - (splits - 1) * chunk) / pixels
    mean = (level * share).sum(3).mean(2, keepdim=True)
    spread = (share * (level - mean[..., None]).square()).sum(3).mean(2, keepdim=True)
    variance = m2.sum((2, 3)).unsqueeze(2) / (channels // num_groups * pixels) + spread
    a, b = collapse(weight, bias, scale, shift, batch, mean.dtype)
    a = (a.reshape(batch, num_groups, -1) * torch.rsqrt(variance + eps)).view(batch, channels, 1, 1)
    mean = mean.expand(-1, -1, channels // num_groups).reshape(batch, channels, 1, 1)
    b = b.reshape(batch, channels, 1, 1)
    if x_bias is not None:  # x + x_bias - mean
        mean = mean - F.pad(x_bias.to(mean.dtype), (0, channels - x.shape[1]))[..., None, None]
    y = empty_image(x, (batch, channels, height, width))
    start = 0
    for image in (x, x2):
        if image is not None:
            part = slice(start, start + image.shape[1])
            out = torch.sub(image, mean[:, part]).mul_(a[:, part]).add_(b[:, part])
            y[:, part] = F.silu(out, inplace=True) if silu else out
            start = part.stop
    return y


def torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2, x_bias):
    weight, bias, x2, x_bias = whole(x, weight, bias, x2, x_bias)
    channels_last, split = is_channels_last(x), x.shape[1]
    x = _biased(x, x_bias)
    x = x.contiguous() if x2 is None else torch.cat([x, x2], 1).contiguous()
    batch, channels, height, width = x.shape
    a, b = (t.flatten() for t in collapse(weight, bias, scale, shift, batch, mean.dtype))
    flat = (1, batch * channels, height, width)
    mean, rstd = mean.reshape(1, -1), rstd.reshape(1, -1)
    grad = grad.contiguous()
    if silu:
        # The pre-activation again, from the saved statistics, in the wide dtype: it decides the sign of the
        # slope.
        per_channel = channels // num_groups
        wide = x.to(mean.dtype).view(batch * num_groups, per_channel, -1)
        wide = (wide - mean.view(-1, 1, 1)).mul_(rstd.view(-1, 1, 1)).mul_(a.view(-1, per_channel, 1))
        wide = wide.add_(b.view(-1, per_channel, 1)).view(x.shape)
        grad = torch.ops.aten.silu_backward(grad.to(wide.dtype), wide).to(x.dtype)
    dx, da, db = torch.ops.aten.native_group_norm_backward(
        grad.view(flat),
        x.view(flat),
        mean,
        rstd,
        a,
        1,
        batch * channels,
        height * width,
        batch * num_groups,
        [True] * 3,
    )
    dx = dx.view(x.shape)
    first = to_layout(dx[:, :split], channels_last)
    second = dx.new_empty(0) if x2 is None else to_layout(dx[:, split:], channels_last)
    # A slice of all channels is dx itself, which nothing else holds.
    return first, second, da.view(batch, channels), db.view(batch, channels)
