"""GroupNorm with everything that follows it in a diffusion U-Net: weight and bias, the AdaGN affine, and
SiLU, in one op.

    y = silu?( (GN(cat([x + x_bias, x2], 1)) * weight + bias) * scale + shift )

x_bias is the bias of the convolution that made x: given here, it costs nothing, while cuDNN's convolutions add
theirs in a pass of its own. It moves the mean of each channel and leaves the sum of squared deviations alone,
so the kernels never add it to a pixel: it goes into the offset that is subtracted from the channel anyway.

`group_norm` is differentiable. `channel_stats` and `group_norm_apply` are its two halves for inference, where
one tensor feeds several norms (a U-Net skip read by two decoders): its channel statistics are computed once,
and each norm merges them with those of its other input. Groups may straddle the boundary between x and x2,
which is why statistics are kept per channel.

On CUDA these run the kernels of group_norm_triton.py. On the CPU, `group_norm` of channels-last float32 or
bfloat16 maps runs native code (group_norm_native.py) where that can be compiled. Everything else, and whatever
`fallback_reason` names an obstacle for, is left to torch's own operators (group_norm_torch.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import processors, run
from ._layout import (
    check_image,
    check_like,
    check_partial,
    check_rows,
    count_splits,
    empty_image,
    empty_partial,
    gathered,
    is_channels_last,
    spread,
    to_layout,
    unit_rows,
)
from ._triton import fallback_reason
from .group_norm_native import group_norm_native, native_fits, native_status
from .group_norm_torch import (
    collapse,
    torch_apply,
    torch_backward,
    torch_forward,
    torch_partial_stats,
    torch_stats,
    whole,
    wide_dtype,
)

MAX_GROUP_CHANNELS = 4096  # a group's channels must fit one tile of the kernels
# Of partial statistics: programs of one split of an image that a processor holds, when an image has four blocks of
# channels; the fewest pixels that are worth a program; and the most that a norm should have to merge.
SPLITS_RESIDENT, MIN_SPLIT, MAX_SPLITS = 1, 64, 32


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
    x_bias: Tensor | None = None,
) -> Tensor:
    """GroupNorm of cat([x + x_bias, x2], 1) (neither sum nor cat is materialised by the kernels), then the affines,
    then SiLU if asked.

    x [B, C1, H, W] and x2 [B, C2, H, W] or None: one dtype (float32, float16, bfloat16; float64 by torch's
    path), NCHW or channels-last; other stride patterns are copied first. x2 may have fewer images, a divisor of
    B: they are read again for every so many of x. weight, bias [C1 + C2], or [S, C1 + C2]: a row for every B / S
    images in turn. scale, shift [B, C1 + C2], both or neither: the collapsed AdaGN affine, so scale is 1 + s. x_bias
    [C1], [S, C1] or None: added to every pixel of x before the norm. These five may be any floating dtype, rows may
    be strided. The kernels, and the CPU's native code, compute in float32 and round once; torch's path also rounds
    x + x_bias, and before the SiLU. Returns [B, C1 + C2, H, W] in x's dtype and layout. Differentiable once in
    every tensor.

    Raises ValueError for wrong shapes, dtypes or devices, or channels not divisible by num_groups.
    """
    _check("group_norm", x, weight, bias, num_groups, scale, shift, x2, x_bias)
    return _group_norm(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias)[0]


def channel_stats(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """Float32 [B, C, 2]: the mean of each channel of x + x_bias, x [B, C, H, W] and x_bias [C] or None, and its
    M2, the sum of squared deviations from that mean.

    For `group_norm_apply`; not differentiable. A saving on CUDA only: on the CPU torch reads a tensor's
    statistics faster than it applies given ones. Raises ValueError unless x is a floating-point image tensor
    and x_bias a floating-point vector of its channels.
    """
    check_image("channel_stats", "x", x)
    if x_bias is not None:
        check_like("channel_stats", "x_bias", x_bias, (x.shape[1],), x.device)
    return _channel_stats(x, x_bias)


def partial_stats(x: Tensor, part: int, splits: int, x_bias: Tensor | None = None) -> Tensor:
    """Float32 [B, C / part, splits, 2]: as `channel_stats` does, of every `part` channels together, and of every
    ceil(H * W / splits) pixels in their order apart; x_bias may be [S, C] as in `group_norm`. One launch, where
    `channel_stats` may take two.

    Raises ValueError as that does, and for what `check_partial` refuses.
    """
    check_image("partial_stats", "x", x)
    check_partial("partial_stats", x, part, splits)
    if x_bias is not None:
        check_rows("partial_stats", "x_bias", x_bias, x.shape[1], x)
    return _partial_stats(x, part, splits, x_bias)


def stats_splits(batch: int, pixels: int, device: torch.device) -> int:
    """The splits of partial statistics with which ``batch`` maps of ``pixels`` each keep a device busy, and that a
    norm merges from cache for little."""
    if device.type == "cpu":
        return 1
    wanted = max(1, min(SPLITS_RESIDENT * processors(device) // batch, pixels // MIN_SPLIT, MAX_SPLITS))
    return count_splits(pixels, 1 << wanted.bit_length() - 1)


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
    x_bias: Tensor | None = None,
) -> Tensor:
    """`group_norm` with the statistics given: stats = channel_stats(x, x_bias), stats2 = channel_stats(x2); or
    partial statistics of both, of one part, which divides a group and both inputs, and one number of splits.
    Not differentiable.

    Raises ValueError as `group_norm` does, for statistics of another shape, and when only one of x2 and
    stats2 is given.
    """
    _check("group_norm_apply", x, weight, bias, num_groups, scale, shift, x2, x_bias)
    if (x2 is None) != (stats2 is None):
        raise ValueError("group_norm_apply: x2 and stats2 go together, got only one of them")
    shape, part = (2,), 1
    if stats.dim() == 4 and stats.shape[1]:
        shape, part = (stats.shape[2], 2), max(1, x.shape[1] // stats.shape[1])
        check_partial("group_norm_apply", x, part, stats.shape[2])
        if weight.shape[-1] // num_groups % part:
            raise ValueError(f"group_norm_apply: statistics of {part} channels do not make up a group")
    for name, image, table in (("stats", x, stats), ("stats2", x2, stats2)):
        if image is not None:
            check_like("group_norm_apply", name, table, (image.shape[0], image.shape[1] // part, *shape), x.device)
    return _group_norm_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias)


def _check(op, x, weight, bias, num_groups, scale, shift, x2, x_bias) -> None:
    check_image(op, "x", x)
    channels = x.shape[1]
    if x2 is not None:
        check_image(op, "x2", x2)
        images = len(x2) if len(x2) and len(x) % len(x2) == 0 else len(x)
        check_like(op, "x2", x2, (images, x2.shape[1], *x.shape[2:]), x.device)
        if x2.dtype != x.dtype:
            raise ValueError(f"{op}: x2 is {x2.dtype} but x is {x.dtype}")
        channels += x2.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels cannot be split into {num_groups} groups")
    check_rows(op, "weight", weight, channels, x)
    check_like(op, "bias", bias, weight.shape, x.device)
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: scale and shift go together, got only one of them")
    if scale is not None:
        check_like(op, "scale", scale, (x.shape[0], channels), x.device)
        check_like(op, "shift", shift, (x.shape[0], channels), x.device)
    if x_bias is not None:
        check_rows(op, "x_bias", x_bias, x.shape[1], x)


def _prepare(x, weight, bias, scale, shift, x2, x_bias):
    """The tensors as the kernels take them: x and x2 dense in x's layout, unit stride along the channels of
    the rest."""
    channels_last = is_channels_last(x)
    weight, bias, scale, shift, x_bias = map(unit_rows, (weight, bias, scale, shift, x_bias))
    if weight.stride() != bias.stride():
        weight, bias = weight.contiguous(), bias.contiguous()
    x2 = None if x2 is None else to_layout(x2, channels_last)
    return to_layout(x, channels_last), weight, bias, scale, shift, x2, x_bias


def _obstacle(x: Tensor, y: Tensor, num_groups: int) -> str | None:
    if y.shape[1] // num_groups > MAX_GROUP_CHANNELS:
        return f"a group of more than {MAX_GROUP_CHANNELS} channels"
    return fallback_reason(x, y)


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
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if is_channels_last(x) and native_status()[0]:
        x, x2 = to_layout(x, True), None if x2 is None else to_layout(x2, True)
        plain = (x_bias is None or x_bias.dim() == 1) and (x2 is None or len(x2) == len(x))
        if plain and native_fits(x, x2):
            # One row for all images where there is no affine of each image's own.
            rows = 1 if scale is None and weight.dim() == 1 else x.shape[0]
            weight, bias = spread(weight, rows), spread(bias, rows)
            a, b = (t.contiguous() for t in collapse(weight, bias, scale, shift, rows, torch.float32))
            x_bias = None if x_bias is None else x_bias.to(torch.float32).contiguous()
            shape = (x.shape[0], num_groups)
            mean, rstd = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
            y = group_norm_native(x, a, b, num_groups, eps, silu, x2, x_bias, statistics=(mean, rstd))
            return y, mean, rstd
    return torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias)


@_group_norm.register_kernel("cuda")
def _group_norm_cuda(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias=None):
    y, mean, rstd = _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias)
    if _obstacle(x, y, num_groups):
        return torch_forward(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias)
    from .group_norm_plan import group_norm_launches

    x, weight, bias, scale, shift, x2, x_bias = _prepare(x, weight, bias, scale, shift, x2, x_bias)
    run(group_norm_launches(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd))
    return y, mean, rstd


@_group_norm.register_fake
def _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias=None):
    y = empty_image(x, (x.shape[0], weight.shape[-1], *x.shape[2:]))
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=wide_dtype(x.dtype)) for _ in range(2))
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
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of x2 for every image of x (empty without one), and of the collapsed affine's a and b [B, C]."""
    return torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2, x_bias)


@_group_norm_backward.register_kernel("cuda")
def _group_norm_backward_cuda(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2, x_bias=None):
    # With g the gradient before the SiLU, N elements a group, and sums over the group,
    # dx = rstd * (a g - sum(a g) / N - normalised * sum(a g normalised) / N).
    if _obstacle(x, grad, num_groups):
        return torch_backward(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2, x_bias)
    from .group_norm_plan import gradient_input_launches, gradient_sums_launches

    weight, bias, x2, x_bias = whole(x, weight, bias, x2, x_bias)
    x, weight, bias, scale, shift, x2, x_bias = _prepare(x, weight, bias, scale, shift, x2, x_bias)
    grad = to_layout(grad, is_channels_last(x))
    batch, channels = grad.shape[:2]
    per_group = channels // num_groups
    size = per_group * grad.shape[2] * grad.shape[3]
    a, b = collapse(weight, bias, scale, shift, batch, torch.float32)
    mean, rstd = (t.repeat_interleave(per_group, 1) for t in (mean, rstd))
    if x_bias is not None:
        mean = mean - F.pad(x_bias.to(mean.dtype), (0, channels - x.shape[1]))
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
def _(grad, x, weight, bias, mean, rstd, num_groups, scale, shift, silu, x2, x_bias=None):
    dx2 = x.new_empty(0) if x2 is None else empty_image(x, (len(x), *x2.shape[1:]))
    da, db = (
        torch.empty_like(grad[:, :, 0, 0], dtype=mean.dtype, memory_format=torch.contiguous_format) for _ in range(2)
    )
    return empty_image(x, x.shape), dx2, da, db


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, num_groups, _eps, scale, shift, silu, x2, x_bias = inputs
    _y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, scale, shift, x2, x_bias)
    ctx.num_groups, ctx.silu = num_groups, silu


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    x, weight, bias, mean, rstd, scale, shift, x2, x_bias = ctx.saved_tensors
    dx, dx2, da, db = torch.ops.pdae_fast.group_norm_backward(
        grad, x, weight, bias, mean, rstd, ctx.num_groups, scale, shift, ctx.silu, x2, x_bias
    )
    wide = da.dtype
    dscale = dshift = None
    outer_a, outer_b = da, db
    if scale is not None:
        inner = (spread(t.to(wide), len(da)) for t in (weight, bias))
        dscale = sum(g * t for g, t in zip((da, db), inner, strict=True)).to(scale.dtype)
        dshift = db.to(shift.dtype)
        outer_a, outer_b = da * scale.to(wide), db * scale.to(wide)
    dweight, dbias = gathered(outer_a, weight.shape).to(weight.dtype), gathered(outer_b, bias.shape).to(bias.dtype)
    dx_bias = None
    if x_bias is not None and ctx.needs_input_grad[9]:
        dx_bias = gathered(dx.sum((2, 3), dtype=wide), x_bias.shape).to(x_bias.dtype)
    if x2 is None:
        dx2 = None
    elif len(x2) < len(x):
        dx2 = dx2.unflatten(0, (-1, len(x2))).sum(0)
    return dx, dweight, dbias, None, None, dscale, dshift, None, dx2, dx_bias


_group_norm.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("pdae_fast::channel_stats", mutates_args=(), device_types="cpu")
def _channel_stats(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    return torch_stats(x, x_bias)


@_channel_stats.register_kernel("cuda")
def _channel_stats_cuda(x, x_bias=None):
    if fallback_reason(x):
        return torch_stats(x, x_bias)
    from .group_norm_plan import channel_stats_launches

    stats = torch.empty((*x.shape[:2], 2), dtype=torch.float32, device=x.device)
    x_bias = None if x_bias is None else x_bias.contiguous()
    run(channel_stats_launches(to_layout(x, is_channels_last(x)), x_bias, stats))
    return stats


@_channel_stats.register_fake
def _(x, x_bias=None):
    return x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


@torch.library.custom_op("pdae_fast::partial_stats", mutates_args=(), device_types="cpu")
def _partial_stats(x: Tensor, part: int, splits: int, x_bias: Tensor | None = None) -> Tensor:
    return torch_partial_stats(x, part, splits, x_bias)


@_partial_stats.register_kernel("cuda")
def _partial_stats_cuda(x, part, splits, x_bias=None):
    if fallback_reason(x):
        return torch_partial_stats(x, part, splits, x_bias)
    from .group_norm_plan import partial_stats_launches

    partial = empty_partial(x, part, splits)
    run(partial_stats_launches(to_layout(x, is_channels_last(x)), unit_rows(x_bias), partial))
    return partial


@_partial_stats.register_fake
def _(x, part, splits, x_bias=None):
    return empty_partial(x, part, splits)


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
    x_bias: Tensor | None = None,
) -> Tensor:
    return torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias)


@_group_norm_apply.register_kernel("cuda")
def _group_norm_apply_cuda(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias=None):
    y, mean, rstd = _group_norm_fake(x, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias)
    if _obstacle(x, y, num_groups):
        return torch_apply(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias)
    from .group_norm_plan import apply_launches, given_statistics

    x, weight, bias, scale, shift, x2, x_bias = _prepare(x, weight, bias, scale, shift, x2, x_bias)
    statistics = given_statistics(x, *(None if t is None else t.float().contiguous() for t in (stats, stats2)))
    run(apply_launches(x, statistics, weight, bias, num_groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd))
    return y


@_group_norm_apply.register_fake
def _(x, stats, weight, bias, num_groups, eps, scale, shift, silu, x2, stats2, x_bias=None):
    return empty_image(x, (x.shape[0], weight.shape[-1], *x.shape[2:]))
