"""3x3 convolutions of channels-last maps on the CPU by native/winograd.c: a quarter (4x4 tiles) or 4/9 (2x2 tiles) of
the multiplications, of maps upsampled by nearest-2x 25/144; bias and residual added inside."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import NATIVE_DTYPES, multiplying
from .buffers import empty_map

UPSAMPLED = 3  # in place of m: tiles of 4 pixels a side from maps that are read upsampled
TILES = (2, UPSAMPLED, 4)  # m: output pixels of a tile's side
CHANNELS = 16  # what the input channels have to be a multiple of
CONVOLUTION = struct.Struct("5P9q")  # struct convolution
WEIGHTS = struct.Struct("2P9q")  # struct weights
# RMS error of a result, relative to it, that the self-check allows.
TOLERANCE = {
    (torch.float32, 2): 2e-6, (torch.float32, UPSAMPLED): 2e-6, (torch.float32, 4): 5e-6,
    (torch.bfloat16, 2): 1e-2, (torch.bfloat16, UPSAMPLED): 1e-2, (torch.bfloat16, 4): 3e-2,
}  # fmt: skip


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str, int]:
    """(library or None, one line about it, output channels that weights are padded to a multiple of)."""
    return multiplying("winograd", ("pdae_winograd", "pdae_winograd_weights"), _check)


def winograd_status() -> tuple[bool, str]:
    """(usable, reason), as `native_status` says it of the group norm: do 3x3 convolutions run as native code here?"""
    library, reason, _ = _library()
    return library is not None, reason


def winograd_fits(weight: Tensor, dtype: torch.dtype, stride: int = 1, padding: int = 1) -> bool:
    """Whether `winograd` computes a convolution with ``weight`` [N, C, kh, kw] on maps of ``dtype`` here."""
    return (
        _library()[0] is not None
        and dtype in NATIVE_DTYPES
        and weight.device.type == "cpu"
        and weight.shape[2:] == (3, 3)
        and (stride, padding) == (1, 1)
        and weight.shape[1] % CHANNELS == 0
    )


def winograd_bytes(outputs: int, channels: int, tile: int, dtype: torch.dtype) -> int:
    """What the transformed weights take."""
    return _bytes(_library()[2], outputs, channels, tile, dtype)


def _bytes(panel: int, outputs: int, channels: int, tile: int, dtype: torch.dtype) -> int:
    return (tile + 2) ** 2 * -(-outputs // panel) * panel * channels * dtype.itemsize


def winograd_weights(weight: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    """float32 [N, C, 3, 3] -> what `winograd` multiplies maps of ``dtype`` with, in tiles of ``tile`` (of `TILES`).

    Transformed in double precision and rounded once: give it float32 weights for bfloat16 maps too.
    """
    library, _, panel = _library()
    return _weights(library, panel, weight, tile, dtype)


def _weights(library: ctypes.CDLL, panel: int, weight: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    outputs, channels = weight.shape[:2]
    u = torch.empty(_bytes(panel, outputs, channels, tile, dtype) // dtype.itemsize, dtype=dtype, device="cpu")
    library.pdae_winograd_weights(
        WEIGHTS.pack(
            weight.data_ptr(), u.data_ptr(), *weight.stride(), outputs, channels, tile,
            dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip
    return u


def winograd(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    outputs: int,
    tile: int,
    residual: Tensor | None = None,
    *,
    upsample: bool = False,
) -> Tensor:
    """conv3x3(nearest2x?(x)) + bias + residual, stride 1, padding 1, rounded once to x's dtype.

    x [B, C, H, W], channels-last, of the dtype that ``u`` was made for by `winograd_weights`; bias float32 [N] or
    None; residual as the result. Returns [B, N, H, W], or [B, N, 2H, 2W] with ``upsample``, channels-last; `UPSAMPLED`
    is for that alone, and the fastest then. The same to the bit for any number of threads, and for an image in any
    batch.

    Not differentiable, and arguments are not checked. Needs `winograd_status`; raises MemoryError.
    """
    return _call(_library()[0], x, u, bias, outputs, tile, residual, upsample)


def _call(library, x, u, bias, outputs, tile, residual, upsample) -> Tensor:
    batch, channels, height, width = x.shape
    height, width = height << upsample, width << upsample
    y = empty_map(batch, outputs, height, width, x.dtype)
    failed = library.pdae_winograd(
        CONVOLUTION.pack(
            x.data_ptr(), u.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), y.data_ptr(), batch, height, width, channels, outputs,
            tile, upsample, x.dtype is torch.bfloat16, torch.get_num_threads(),
        )
    )  # fmt: skip
    if failed:
        raise MemoryError(f"convolution to {tuple(y.shape)}: no memory for the transformed map")
    return y


def _check(library: ctypes.CDLL, panel: int) -> str | None:
    """What is wrong with the compiled functions on a case of every kind, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    # Several rows of the micro-kernel, a panel's remainder, tiles cut by both edges.
    batch, channels, outputs, height, width = 2, 48, panel + 5, 9, 7
    with torch.inference_mode():
        x, weight = draw(batch, channels, height, width) - 2.3, draw(outputs, channels, 3, 3) / (9 * channels) ** 0.5
        bias, residual = draw(outputs), draw(batch, outputs, 2 * height, 2 * width)
        for dtype in NATIVE_DTYPES:
            map_, added = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual))
            up = F.interpolate(map_.double(), scale_factor=2.0)
            expected = F.conv2d(up, weight.double(), bias.double(), padding=1) + added.double()
            for tile in TILES:
                u = _weights(library, panel, weight, tile, dtype)
                found = _call(library, map_, u, bias, outputs, tile, added, True)
                error = float((found.double() - expected).norm() / expected.norm())
                if not error <= TOLERANCE[dtype, tile]:
                    kind = "upsampled" if tile == UPSAMPLED else f"{tile}x{tile}"
                    return f"the compiled convolution is off by {error:.1e} in {dtype}, {kind} tiles"
    return None
