"""GroupNorm with everything that follows it in a diffusion U-Net: weight and bias, the AdaGN affine, and
SiLU, in one op.

    y = silu?( (GN(cat([x, x2], 1)) * weight + bias) * scale + shift )

`group_norm` is differentiable. `channel_stats` and `group_norm_apply` are its two halves for inference, where
one tensor feeds several norms (a U-Net skip read by two decoders): its channel statistics are computed once,
and each norm merges them with those of its other input. Groups may straddle the boundary between x and x2,
which is why statistics are kept per channel.

On CUDA these run the kernels of group_norm_triton.py; on the CPU, and wherever `fallback_reason` names an
obstacle, torch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import check_image, check_like, empty_image, is_channels_last, to_layout
from ._triton import fallback_reason, run

MAX_GROUP_CHANNELS = 4096  # a group's channels must fit one tile of the kernels


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
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs), returned in that precision. Arguments as
    `group_norm`."""
    x = x if x2 is None else torch.cat([x, x2], 1)
    x = x.to(_wide(x.dtype))
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    y = y * weight.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]
    if scale is not None:
        y = y * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None]
    return F.silu(y) if silu else y


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x2: Tensor | None = None,
) -> Tensor:
    """GroupNorm of cat([x, x2], 1) (the cat is not materialised on CUDA), then the affines, then SiLU if
    asked.

    x [B, C1, H, W] and x2 [B, C2, H, W] or None: one dtype (float32, float16, bfloat16; float64 by torch's
    path), NCHW or channels-last; other stride patterns are copied first. weight, bias [C1 + C2]. scale, shift
    [B, C1 + C2], both or neither: the collapsed AdaGN affine, so scale is 1 + s; rows may be strided. These
    four may be any floating dtype. The kernels compute in float32 and round once; torch's path also rounds
    before the SiLU. Returns [B, C1 + C2, H, W] in x's dtype and layout. Differentiable once in every tensor.

    Raises ValueError for wrong shapes, dtypes or devices, or channels not divisible by num_groups.
    """
    _check("group_norm", x, weight, bias, num_groups, scale, shift, x2)
    return _group_norm(x, weight, bias, num_groups, eps, scale, shift, silu, x2)[0]


def channel_stats(x: Tensor) -> Tensor:
    """Float32 [B, C, 2]: the mean of each channel of x [B, C, H, W] and its M2, the sum of squared deviations
    from that mean.

    For `group_norm_apply`; not differentiable. A saving on CUDA only: on the CPU torch reads a tensor's
    statistics faster than it applies given ones. Raises ValueError unless x is a floating-point image tensor.
    """
    check_image("channel_stats", "x", x)
    return _channel_stats(x)


def group_norm_apply(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x2: Tensor | None = None,
    stats2: Tensor | None = None,
) -> Tensor:
    """`group_norm` with the statistics given: stats = channel_stats(x), stats2 = channel_stats(x2). Not
    differentiable.

    Raises ValueError as `group_norm` does, for statistics of another shape, and when only one of x2 and
    stats2 is given.
    """
    _check("group_norm_apply", x, weight, bias, num_groups, scale, shift, x2)
    if (x2 is None) != (stats2 is None):
        raise ValueError("group_norm_apply: x2 and stats2 go together, got only one of them")
    for name, image, table in (("stats", x, stats), ("stats2", x2, stats2)):
        if image is not None:
            check_like("group_norm_apply", name, table, (image.shape[0], image.shape[1], 2), x.device)
    return _group_norm_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2)


def _check(op, x, weight, bias, num_groups, scale, shift, x2) -> None:
    check_image(op, "x", x)
    channels = x.shape[1]
    if x2 is not None:
        check_image(op, "x2", x2)
        check_like(op, "x2", x2, (x.shape[0], x2.shape[1], *x.shape[2:]), x.device)
        if x2.dtype != x.dtype:
            raise ValueError(f"{op}: x2 is {x2.dtype} but x is {x.dtype}")
        channels += x2.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels cannot be split into {num_groups} groups")
    check_like(op, "weight", weight, (channels,), x.device)
    check_like(op, "bias", bias, (channels,), x.device)
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: scale and shift go together, got only one of them")
    if scale is not None:
        check_like(op, "scale", scale, (x.shape[0], channels), x.device)
        check_like(op, "shift", shift, (x.shape[0], channels), x.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _collapse(weight, bias, scale, shift, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a, b), each [B, C] in `dtype`: the two affines as one, normalised * a + b."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    if scale is None:
        return weight.expand(batch, -1), bias.expand(batch, -1)
    scale = scale.to(dtype)
    return weight * scale, bias * scale + shift.to(dtype)


def _prepare(x, weight, bias, scale, shift, x2):
    """The tensors as the kernels take them: x and x2 dense in x's layout, unit stride along the channels of
    the rest."""
    channels_last = is_channels_last(x)
    scale, shift = (None if t is None else t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    x2 = None if x2 is None else to_layout(x2, channels_last)
    return to_layout(x, channels_last), weight.contiguous(), bias.contiguous(), scale, shift, x2


def _obstacle(x: Tensor, y: Tensor, num_groups: int) -> str | None:
    if y.shape[1] // num_groups > MAX_GROUP_CHANNELS:
        return f"a group of more than {MAX_GROUP_CHANNELS} channels"
    return fallback_reason(x, y)


# --- torch's path: the CPU implementation, and the CUDA one where a kernel cannot run ---


def _native(x: Tensor, a: Tensor, b: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's group norm of a dense x with an affine per image, a, b [B, C]: y, and mean and rstd [B,
    groups]."""
    batch, channels, height, width = x.shape
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
    """`_native` of one image; a, b [C]."""
    _, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    on_cpu = x.device.type == "cpu"
    if on_cpu and x.element_size() == 2 and pixels < 1024 and per_group % 16:
        # torch's loop here is scalar in half precision; going through float32 is 2 to 6 times faster.
        x = x.float()
    y, mean, rstd = torch.native_group_norm(x, a, b, 1, channels, pixels, num_groups, eps)
    if on_cpu and x.element_size() > 2 and (mean * rstd).abs().max() > 2:
        # That loop forms E[x^2] - E[x]^2, which at a mean of 5 deviations has lost up to two digits: centre
        # the image first.
        centred = x - mean.view(num_groups, 1).expand(-1, per_group).reshape(1, channels, 1, 1)
        y, offset, rstd = torch.native_group_norm(centred, a, b, 1, channels, pixels, num_groups, eps)
        mean = mean + offset
    return y, mean, rstd


def _torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(x)
    dtype = x.dtype
    x = to_layout(x, channels_last)
    x = x if x2 is None else torch.cat([x, to_layout(x2, channels_last)], 1)
    a, b = _collapse(weight, bias, scale, shift, x.shape[0], _wide(dtype))
    y, mean, rstd = _native(x, a, b, num_groups, eps)
    if silu:
        y = F.silu(y, inplace=True)
    return to_layout(y.to(dtype), channels_last), mean.to(_wide(dtype)), rstd.to(_wide(dtype))


def _torch_stats(x: Tensor) -> Tensor:
    wide = x.to(_wide(x.dtype))
    mean = wide.mean((2, 3), keepdim=True)
    m2 = (wide - mean).square_().sum((2, 3))  # torch.var_mean is 15 times slower here
    return torch.stack([mean[:, :, 0, 0], m2], 2).float()


def _torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2) -> Tensor:
    batch, _, height, width = x.shape
    stats = stats if stats2 is None else torch.cat([stats, stats2], 1)
    channels = stats.shape[1]
    grouped = stats.to(_wide(x.dtype)).view(batch, num_groups, -1, 2)
    mean = grouped[..., 0].mean(2, keepdim=True)
    variance = (grouped[..., 1] / (height * width) + (grouped[..., 0] - mean).square()).mean(2, keepdim=True)
    a, b = _collapse(weight, bias, scale, shift, batch, mean.dtype)
    a = (a.reshape(batch, num_groups, -1) * torch.rsqrt(variance + eps)).view(batch, channels, 1, 1)
    mean = mean.expand(-1, -1, channels // num_groups).reshape(batch, channels, 1, 1)
    b = b.reshape(batch, channels, 1, 1)
    y = empty_image(x, (batch, channels, height, width))
    start = 0
    for image in (x, x2):
        if image is not None:
            part = slice(start, start + image.shape[1])
            out = torch.sub(image, mean[:, part]).mul_(a[:, part]).add_(b[:, part])
            y[:, part] = F.silu(out, inplace=True) if silu else out
            start = part.stop
    return y


def _torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2):
    channels_last, split = is_channels_last(x), x.shape[1]
    x = x.contiguous() if x2 is None else torch.cat([x, x2], 1).contiguous()
    batch, channels, height, width = x.shape
    a, b = (t.flatten() for t in _collapse(weight, bias, scale, shift, batch, mean.dtype))
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


# --- custom ops ---


@torch.library.custom_op("pdae_fast::group_norm", mutates_args=(), device_types="cpu")
def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2)


@_group_norm.register_kernel("cuda")
def _group_norm_cuda(x, weight, bias, num_groups, eps, scale, shift, silu, x2):
    y, mean, rstd = _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2)
    if _obstacle(x, y, num_groups):
        return _torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2)
    from .group_norm_plan import group_norm_launches

    x, weight, bias, scale, shift, x2 = _prepare(x, weight, bias, scale, shift, x2)
    run(group_norm_launches(x, weight, bias, num_groups, eps, scale, shift, silu, x2, y, mean, rstd))
    return y, mean, rstd


@_group_norm.register_fake
def _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2):
    y = empty_image(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=_wide(x.dtype)) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op("pdae_fast::group_norm_backward", mutates_args=(), device_types="cpu")
def _group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of x2 (empty without one), and of the collapsed affine's a and b [B, C]."""
    return _torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2)


@_group_norm_backward.register_kernel("cuda")
def _group_norm_backward_cuda(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2):
    # With g the gradient before the SiLU, N elements a group, and sums over the group,
    # dx = rstd * (a g - sum(a g) / N - normalised * sum(a g normalised) / N).
    if _obstacle(x, grad, num_groups):
        return _torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2)
    from .group_norm_plan import gradient_input_launches, gradient_sums_launches

    x, weight, bias, scale, shift, x2 = _prepare(x, weight, bias, scale, shift, x2)
    grad = to_layout(grad, is_channels_last(x))
    batch, channels = grad.shape[:2]
    per_group = channels // num_groups
    size = per_group * grad.shape[2] * grad.shape[3]
    a, b = _collapse(weight, bias, scale, shift, batch, torch.float32)
    mean, rstd = (t.repeat_interleave(per_group, 1) for t in (mean, rstd))
    table = torch.stack([mean, a * rstd, b])
    launches, partial = gradient_sums_launches(grad, x, x2, table, silu)
    run(launches)
    sum_g, sum_gx = partial.sum(2).unbind(2)
    per_channel = torch.stack([a * rstd * sum_g, a * rstd * sum_gx]).view(2, batch, num_groups, per_group)
    level, slope = (-per_channel.sum(3) / size).repeat_interleave(per_group, 2)
    table = torch.cat([table, torch.stack([slope * rstd * rstd, level])])
    dx = empty_image(x, x.shape)
    dx2 = x.new_empty(0) if x2 is None else empty_image(x, x2.shape)
    run(gradient_input_launches(grad, x, x2, table, silu, dx, dx2))
    return dx, dx2, sum_gx * rstd, sum_g.clone()


@_group_norm_backward.register_fake
def _(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2):
    dx2 = x.new_empty(0) if x2 is None else empty_image(x, x2.shape)
    da, db = (
        torch.empty_like(grad[:, :, 0, 0], dtype=mean.dtype, memory_format=torch.contiguous_format) for _ in range(2)
    )
    return empty_image(x, x.shape), dx2, da, db


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, num_groups, _eps, scale, shift, silu, x2 = inputs
    _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, scale, shift, x2)
    ctx.num_groups, ctx.silu = num_groups, silu


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    x, weight, bias, mean, rstd, scale, shift, x2 = ctx.saved_tensors
    dx, dx2, da, db = torch.ops.pdae_fast.group_norm_backward(
        grad, x, weight, bias, mean, rstd, ctx.num_groups, scale, shift, ctx.silu, x2
    )
    wide = da.dtype
    dscale = dshift = None
    outer_a, outer_b = da, db
    if scale is not None:
        dscale = (da * weight.to(wide) + db * bias.to(wide)).to(scale.dtype)
        dshift = db.to(shift.dtype)
        outer_a, outer_b = da * scale.to(wide), db * scale.to(wide)
    dweight, dbias = outer_a.sum(0).to(weight.dtype), outer_b.sum(0).to(bias.dtype)
    return dx, dweight, dbias, None, None, dscale, dshift, None, None if x2 is None else dx2


_group_norm.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("pdae_fast::channel_stats", mutates_args=(), device_types="cpu")
def _channel_stats(x: Tensor) -> Tensor:
    return _torch_stats(x)


@_channel_stats.register_kernel("cuda")
def _channel_stats_cuda(x):
    if fallback_reason(x):
        return _torch_stats(x)
    from .group_norm_plan import channel_stats_launches

    stats = torch.empty((*x.shape[:2], 2), dtype=torch.float32, device=x.device)
    run(channel_stats_launches(to_layout(x, is_channels_last(x)), stats))
    return stats


@_channel_stats.register_fake
def _(x):
    return x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


@torch.library.custom_op("pdae_fast::group_norm_apply", mutates_args=(), device_types="cpu")
def _group_norm_apply(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x2: Tensor | None,
    stats2: Tensor | None,
) -> Tensor:
    return _torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2)


@_group_norm_apply.register_kernel("cuda")
def _group_norm_apply_cuda(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2):
    y, mean, rstd = _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2)
    if _obstacle(x, y, num_groups):
        return _torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2)
    from .group_norm_plan import apply_launches

    x, weight, bias, scale, shift, x2 = _prepare(x, weight, bias, scale, shift, x2)
    pixels = x.shape[2] * x.shape[3]
    tables = [None if t is None else (t.float().contiguous(), 1, pixels) for t in (stats, stats2)]
    run(apply_launches(x, tables[0], weight, bias, num_groups, eps, scale, shift, silu, x2, tables[1], y, mean, rstd))
    return y


@_group_norm_apply.register_fake
def _(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2):
    return empty_image(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
