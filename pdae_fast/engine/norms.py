"""GroupNorm with the affine and the SiLU that follow it: by the framework's operators, by the project's kernels, or
by its native code for the CPU."""

from __future__ import annotations

import functools
import math
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

# Elements of a group up to which a norm reads it from registers or cache, in one launch, statistics and all.
SMALL_GROUP = 8192


class Skip(NamedTuple):
    """A map that several read, as those that the trunk leaves for the decoders, and its statistics where they are known
    (of `kernels.partial_stats`, or another part of them).

    ``product`` [B * H * W, O] is its part of the 1x1 skip convolution of the one block that reads it, to be used up.
    """

    x: Tensor
    statistics: Tensor | None = None
    product: Tensor | None = None


class Join(NamedTuple):
    """cat([h, skip.x], 1), not made: what a decoder block reads; ``statistics`` are those of h."""

    h: Tensor
    skip: Skip
    statistics: Tensor | None = None


def common_part(network: nn.Module) -> int:
    """How many channels, at most 8, fit every group of the network's norms a whole number of times, in a power of two:
    then the groups of all maps, and of joined ones, are made of such parts."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    common = math.gcd(8, *(norm.num_channels // norm.num_groups for norm in norms))
    return common & -common


def bare(x: Tensor | Skip) -> Tensor:
    """The map alone."""
    return x.x if isinstance(x, Skip) else x


def statistics_of(x: Tensor, part: int, x_bias: Tensor | None = None) -> Tensor:
    """Of ``part`` channels together, in the splits that every map of this size and batch comes in."""
    return kernels.partial_stats(x, part, splits_of(x, len(x)), x_bias)


def splits_of(x: Tensor, images: int) -> int:
    """Those of maps like x, of ``images`` together: of stacked networks as of the skips, which are not stacked."""
    return kernels.stats_splits(images, x.shape[2] * x.shape[3], x.device)


def add(h: Tensor, residual: Tensor, bias: Tensor, part: int) -> Tensor | Skip:
    """h + residual + bias, the residual upsampled where it is half as high and wide; with ``part``, which is not 0, and
    its statistics."""
    if part:
        splits = splits_of(h, len(h) // (len(bias) if bias.dim() == 2 else 1))
        return Skip(*kernels.add_with_stats(h, residual, bias, part, splits))
    return (kernels.residual_add if residual.shape == h.shape else kernels.upsample_add)(h, residual, bias)


def materialise(x: Tensor | Skip | Join) -> Tensor:
    if not isinstance(x, Join):
        return bare(x)
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


def normalise_fused(
    x: Tensor | Skip | Join,
    affine: Affine | tuple[Tensor, Tensor],
    silu: bool = True,
    x_bias: Tensor | None = None,
    overwrite: bool = False,
    groups: int = NORM_GROUPS,
    eps: float = 1e-5,
    code_scale: float | None = None,
) -> Tensor:
    """The same in one op, which also reads a :class:`Join` from its two parts, and takes the statistics that are known.

    ``x_bias`` [C] is the bias that the convolution before x left out: it is added as x (h of a join) is read, and known
    statistics of x are of the sum. With ``code_scale`` the result is its codes of fp8.
    """
    multiplier, addend = affine[:2]
    h, (skip, theirs, _), own = x if isinstance(x, Join) else (bare(x), Skip(None), getattr(x, "statistics", None))
    weight, bias = (multiplier[0], addend[0]) if len(multiplier) == 1 else (multiplier, addend)
    if skip is not None and (own is None) != (theirs is None):
        if multiplier.shape[1] // groups * h.shape[2] * h.shape[3] <= SMALL_GROUP:
            own = None
        elif own is None:
            own = kernels.partial_stats(h, skip.shape[1] // theirs.shape[1], theirs.shape[2], x_bias)
        else:
            theirs = kernels.partial_stats(skip, h.shape[1] // own.shape[1], own.shape[2])
    arguments = (groups, eps, None, None, silu, skip)
    if code_scale is not None:
        return kernels.group_norm_float8(h, weight, bias, code_scale, *arguments, x_bias, own, theirs)
    if own is None:
        return kernels.group_norm(h, weight, bias, *arguments, x_bias=x_bias)
    return kernels.group_norm_apply(h, own, weight, bias, *arguments, theirs, x_bias=x_bias)


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
