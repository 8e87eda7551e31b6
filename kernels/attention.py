"""softmax(q k^T / sqrt(width)) v on the CPU by native/attention.c, q, k and v read where they stand."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from ._native import NATIVE_DTYPES, multiplying

ATTENTION = struct.Struct("4P12qd")  # struct attention
WIDTH = 8  # what a head's columns have to be a multiple of
# RMS error of a result, relative to it, that the self-check allows.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """(library or None, one line about it)."""
    return multiplying("attention", ("pdae_attention",), _check)[:2]


def attention_status() -> tuple[bool, str]:
    """(usable, reason), as `native_status` says it of the group norm: does attention run as native code here?"""
    library, reason = _library()
    return library is not None, reason


def attention_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_native` takes these here."""
    return (
        _library()[0] is not None
        and q.device.type == "cpu"
        and q.dtype in NATIVE_DTYPES
        and q.shape == k.shape == v.shape
        and q.stride() == k.stride() == v.stride()
        and q.stride(3) == 1
        and q.shape[3] % WIDTH == 0
    )


def attention_native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, N, heads, width] as `attention_fits` has them -> softmax(q k^T / sqrt(width)) v, dense, likewise.

    The softmax is float32, and a result is rounded once to their dtype. The same to the bit for any number of threads,
    and for an image in any batch. Not differentiable, and arguments are not checked. Needs `attention_status`; raises
    MemoryError.
    """
    return _call(_library()[0], q, k, v)


def _call(library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    images, tokens, heads, width = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    failed = library.pdae_attention(
        ATTENTION.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), images, tokens, heads, width,
            *q.stride()[:3], *y.stride()[:3], q.dtype is torch.bfloat16, torch.get_num_threads(), width**-0.5,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError(f"attention of {tuple(q.shape)}: no memory for keys and values")
    return y


def _check(library: ctypes.CDLL, _panel: int) -> str | None:
    """What is wrong with the compiled function on a case of every kind, or None."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        # Odd numbers of keys, more than a panel of them and of columns, and large scores.
        rows = torch.randn((2, 45, 2, 3, 48), generator=generator, dtype=torch.float32, device="cpu") * 1.7 + 0.3
        for dtype in NATIVE_DTYPES:
            q, k, v = rows.to(dtype).unbind(3)
            scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 48**-0.5
            expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
            error = float((_call(library, q, k, v).double() - expected).norm() / expected.norm())
            if not error <= TOLERANCE[dtype]:
                return f"the compiled attention is off by {error:.1e} in {dtype}"
    return None
