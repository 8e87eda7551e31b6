"""The group norm of channels-last maps on the CPU by native/group_norm.c: statistics, then affine and SiLU in one
read and one write."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ._native import NATIVE_DTYPES, Unavailable, threaded
from .buffers import empty_map
from .group_norm_torch import group_norm_reference

NORM = struct.Struct("8P10qd")  # struct norm
# RMS error, relative to the result, that the self-check allows: several roundings of the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@functools.cache
def _function() -> tuple[Callable[[bytes], int] | None, str]:
    """The compiled function, or None, and one line about it; the first call may compile for a second."""
    try:
        library, reason = threaded("group_norm", "pdae_group_norm")
    except Unavailable as obstacle:
        return None, str(obstacle)
    obstacle = _check(library.pdae_group_norm)
    return (None, obstacle) if obstacle else (library.pdae_group_norm, reason)


def native_status() -> tuple[bool, str]:
    """(usable, reason): does the CPU's group norm run as native code here? `reason` is one line for a person, also
    when usable.

    The first call may compile it, which takes about a second, once a machine; PDAE_FAST_NATIVE=0 in the environment
    prevents that. The answer is kept for the life of the process.
    """
    function, reason = _function()
    return function is not None, reason


def native_fits(x: Tensor, x2: Tensor | None = None) -> bool:
    """Whether `group_norm_native` takes these maps, given that native code runs here."""
    return all(
        t.dtype in NATIVE_DTYPES
        and t.dtype is x.dtype
        and t.device.type == "cpu"
        and t.is_contiguous(memory_format=torch.channels_last)
        and t.numel() > 0
        for t in ((x,) if x2 is None else (x, x2))
    )


def group_norm_native(
    x: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    *,
    overwrite: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """silu?(GN(cat([x + x_bias, x2], 1)) * multiplier + addend), computed in float32, rounded once to x's dtype.

    x [B, C1, H, W] and x2 [B, C2, H, W] or None as `native_fits` has them. multiplier, addend float32 [B, C1 + C2],
    or [1, C1 + C2] for all images; unit stride along the channels. x_bias float32 [C1] or None, dense. Returns
    [B, C1 + C2, H, W], channels-last: x itself with ``overwrite``, which goes without x2. ``statistics`` are two
    dense float32 tensors [B, num_groups] that get mean and reciprocal standard deviation of the groups.

    Not differentiable, and arguments are not checked. Needs `native_status`; raises MemoryError.
    """
    return _call(_function()[0], x, multiplier, addend, num_groups, eps, silu, x2, x_bias, overwrite, statistics)


def _call(function, x, multiplier, addend, num_groups, eps, silu, x2, x_bias, overwrite, statistics) -> Tensor:
    batch, channels, height, width = x.shape
    channels2 = 0 if x2 is None else x2.shape[1]
    if overwrite:
        y = x
    else:
        y = empty_map(batch, channels + channels2, height, width, x.dtype)
    mean, rstd = (0, 0) if statistics is None else (statistics[0].data_ptr(), statistics[1].data_ptr())
    failed = function(
        NORM.pack(
            x.data_ptr(), 0 if x2 is None else x2.data_ptr(), y.data_ptr(), multiplier.data_ptr(), addend.data_ptr(),
            0 if x_bias is None else x_bias.data_ptr(), mean, rstd,
            0 if len(multiplier) == 1 else multiplier.stride(0), 0 if len(addend) == 1 else addend.stride(0),
            batch, height * width, channels, channels2, num_groups,
            x.dtype is torch.bfloat16, silu, torch.get_num_threads(), eps,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError(f"group norm of {tuple(y.shape)}: no memory for the statistics")
    return y


def _check(function) -> str | None:
    """What is wrong with the compiled function on a case of every kind, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    with torch.inference_mode():
        for dtype, allowed in TOLERANCE.items():
            # Straddling groups, a vector's remainder, several chunks; the second is large enough for threads.
            for batch, c1, c2, side, groups in ((2, 22, 13, 9, 7), (1, 64, 32, 32, 32)):
                x, x2 = (
                    (draw(batch, c, side, side) - 2.3).to(dtype).contiguous(memory_format=torch.channels_last)
                    for c in (c1, c2)
                )
                a, b, x_bias = draw(batch, c1 + c2), draw(batch, c1 + c2), draw(c1)
                found = _call(function, x, a, b, groups, 1e-5, True, x2, x_bias, False, None)
                ones = torch.ones(c1 + c2, dtype=torch.float32, device="cpu")
                expected = group_norm_reference(x, ones, 0 * ones, groups, 1e-5, a, b, True, x2, x_bias)
                error = float((found.float() - expected).norm() / expected.norm())
                if not error <= allowed:
                    return f"the compiled group norm is off by {error:.1e} in {dtype}"
    return None
