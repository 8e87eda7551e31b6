"""GroupNorm with the affine and the SiLU that follow it: by the framework's operators, by the project's kernels, or
by its native code for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..config import NORM_GROUPS
from . import rewrites
from .options import Rewrites
from .rewrites import Affine


class Skip(NamedTuple):
    """A map that the trunk leaves for the decoders, and its channel statistics where both decoders share them.

    ``product`` [B * H * W, O] is its part of the 1x1 skip convolution of the one block that reads it, to be used up.
    """

    x: Tensor
    statistics: Tensor | None = None
    product: Tensor | None = None


class Join(NamedTuple):
    """cat([h, skip.x], 1), not made: what a decoder block reads."""

    h: Tensor
    skip: Skip


def materialise(x: Tensor | Join) -> Tensor:
    if not isinstance(x, Join):
        return x
    parts, out = [x.h, x.skip.x], None
    if x.h.device.type == "cpu":
        B, C, H, W = x.h.shape
        out = kernels.empty_map(B, C + x.skip.x.shape[1], H, W, x.h.dtype)
    return torch.cat(parts, dim=1, out=out)


def normalise(
    x: Tensor,
    affine: Affine | tuple[Tensor, Tensor],
    silu: bool = True,
    x_bias: Tensor | None = None,
    overwrite: bool = False,
    groups: int = NORM_GROUPS,
    eps: float = 1e-5,
) -> Tensor:
    """SiLU(GN(x + x_bias) * multiplier + addend) by the framework; x may be used up where ``overwrite`` allows it.

    x_bias is [C]: an offset of the affine is the caller's to give.
    """
    y = rewrites.group_norm(x if x_bias is None else x + x_bias.to(x.dtype)[:, None, None], *affine[:2], groups, eps)
    return F.silu(y, inplace=True) if silu else y


@functools.cache  # never given up: captured graphs know them by their addresses
def _identity(channels: int, device: torch.device) -> Affine:
    with torch.inference_mode(False):  # kept for callers in any mode
        return tuple(make(channels, dtype=torch.float32, device=device) for make in (torch.ones, torch.zeros))


def normalise_fused(
    x: Tensor | Join,
    affine: Affine | tuple[Tensor, Tensor],
    silu: bool = True,
    x_bias: Tensor | None = None,
    overwrite: bool = False,
    groups: int = NORM_GROUPS,
    eps: float = 1e-5,
    code_scale: float | None = None,
) -> Tensor:
    """The same in one op, which also reads a :class:`Join` from its two parts.

    ``x_bias`` [C] is the bias that the convolution before x left out: it is added as x (h of a join) is read. With
    ``code_scale`` the result is its codes of fp8.
    """
    multiplier, addend = affine[:2]
    h, (skip, statistics, _) = x if isinstance(x, Join) else (x, (None, None, None))
    if len(multiplier) == 1:
        weight, bias, scale, shift = multiplier[0], addend[0], None, None
    else:
        weight, bias = _identity(multiplier.shape[1], multiplier.device)
        scale, shift = multiplier, addend
    own = None if statistics is None else kernels.channel_stats(h, x_bias=x_bias)
    arguments = (groups, eps, scale, shift, silu, skip)
    if code_scale is not None:
        return kernels.group_norm_float8(h, weight, bias, code_scale, *arguments, x_bias, own, statistics)
    if statistics is None:
        return kernels.group_norm(h, weight, bias, *arguments, x_bias=x_bias)
    return kernels.group_norm_apply(h, own, weight, bias, *arguments, statistics, x_bias=x_bias)


def normalise_native(
    x: Tensor | Join,
    affine: Affine | tuple[Tensor, Tensor],
    silu: bool = True,
    x_bias: Tensor | None = None,
    overwrite: bool = False,
    groups: int = NORM_GROUPS,
    eps: float = 1e-5,
) -> Tensor:
    """The same by native code, in place where ``overwrite`` allows it. It is called directly: the framework's way to an
    operator takes as long as a small map."""
    h, skip = (x.h, x.skip.x) if isinstance(x, Join) else (x, None)
    if not kernels.native_fits(h, skip):
        return normalise_fused(x, affine, silu, x_bias, groups=groups, eps=eps)
    in_place = overwrite and skip is None
    return kernels.group_norm_native(h, *affine[:2], groups, eps, silu, skip, x_bias, overwrite=in_place)


def normaliser(options: Rewrites, norm: nn.GroupNorm) -> Callable[..., Tensor]:
    """The function above that a plan with these options runs for ``norm``, whose affine is the caller's to give."""
    run = normalise_native if options.native_norms else normalise_fused if options.kernels else normalise
    return functools.partial(run, groups=norm.num_groups, eps=norm.eps)


def fixed_normaliser(options: Rewrites, norm: nn.Module, silu: bool = True) -> Callable[[Tensor | Join], Tensor]:
    """The same with the affine of ``norm`` itself, which may be the identity."""
    if isinstance(norm, nn.Identity):
        return norm
    affine = Affine(norm.weight.detach().float()[None], norm.bias.detach().float()[None])
    return functools.partial(normaliser(options, norm), affine=affine, silu=silu)
