"""1x1 convolutions of channels-last maps on the CPU by native/pointwise.c, of two maps without a cat; bias and residual
added inside."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import NATIVE_DTYPES, multiplying
from .buffers import empty_map

CHANNELS = 2  # what the channels of a map have to be a multiple of
POINTWISE = struct.Struct("6P6q")  # struct pointwise
# RMS error of a result, relative to it, that the self-check allows.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str, int]:
    """(library or None, one line about it, output channels that weights are padded to a multiple of)."""
    return multiplying("pointwise", ("pdae_pointwise",), _check)


def pointwise_status() -> tuple[bool, str]:
    """(usable, reason), as `native_status` says it of the group norm: do 1x1 convolutions run as native code here?"""
    library, reason, _ = _library()
    return library is not None, reason


def pointwise_fits(weight: Tensor, stride: int = 1, padding: int = 0) -> bool:
    """Whether `pointwise` computes a convolution with ``weight`` [N, C, kh, kw] here."""
    return (
        _library()[0] is not None
        and weight.dtype in NATIVE_DTYPES
        and weight.device.type == "cpu"
        and weight.shape[2:] == (1, 1)
        and (stride, padding) == (1, 0)
        and weight.shape[1] % CHANNELS == 0
    )


def pointwise_weights(weight: Tensor) -> Tensor:
    """[N, C, 1, 1] -> what `pointwise` multiplies maps of its dtype with."""
    return _weights(_library()[2], weight)


def _weights(panel: int, weight: Tensor) -> Tensor:
    outputs, channels = weight.shape[:2]
    side = 4 // weight.dtype.itemsize  # channels that are multiplied at once
    u = F.pad(weight.reshape(outputs, channels), (0, 0, 0, -outputs % panel))
    return u.view(-1, panel, channels // side, side).transpose(1, 2).contiguous()


def pointwise(
    x: Tensor, u: Tensor, bias: Tensor | None, outputs: int, x2: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """conv1x1(cat([x, x2], 1)) + bias + residual, rounded once to x's dtype.

    x [B, C1, H, W], and x2 [B, C2, H, W] or None, channels-last, of the dtype of ``u``, which `pointwise_weights` made
    of weights for C1 + C2 channels, both even; bias float32 [N] or None; residual as the result. Returns [B, N, H, W],
    channels-last. The same to the bit for any number of threads, and for an image in any batch.

    Not differentiable, and arguments are not checked. Needs `pointwise_status`.
    """
    return _call(_library()[0], x, u, bias, outputs, x2, residual)


def _call(library, x, u, bias, outputs, x2, residual) -> Tensor:
    batch, channels, height, width = x.shape
    y = empty_map(batch, outputs, height, width, x.dtype)
    library.pdae_pointwise(
        POINTWISE.pack(
            x.data_ptr(), 0 if x2 is None else x2.data_ptr(), u.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), y.data_ptr(), batch * height * width, channels,
            0 if x2 is None else x2.shape[1], outputs, x.dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def _check(library: ctypes.CDLL, panel: int) -> str | None:
    """What is wrong with the compiled function on a case of every kind, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    # Several rows of the micro-kernel and a remainder of them, a panel's remainder.
    batch, channels, outputs, side = 2, (48, 22), panel + 5, 5
    with torch.inference_mode():
        maps = [draw(batch, c, side, side) - 2.3 for c in (*channels, outputs)]
        weight, bias = draw(outputs, sum(channels), 1, 1) / sum(channels) ** 0.5, draw(outputs)
        for dtype in NATIVE_DTYPES:
            x, x2, residual = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in maps)
            rounded = weight.to(dtype)
            expected = F.conv2d(torch.cat([x, x2], 1).double(), rounded.double(), bias.double()) + residual.double()
            found = _call(library, x, _weights(panel, rounded), bias, outputs, x2, residual)
            error = float((found.double() - expected).norm() / expected.norm())
            if not error <= TOLERANCE[dtype]:
                return f"the compiled 1x1 convolution is off by {error:.1e} in {dtype}"
    return None
