"""Attention backends: PyTorch's own, on the CPU native code by default, xformers when asked for or measured to be
faster here."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..errors import UserError

BACKENDS = ("auto", "sdpa", "xformers")
PROBE_TOLERANCE = 2e-2  # relative, between two half-precision implementations of one formula
PROBE_ROUNDS = 20
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, heads, head_dim] -> [B, N, heads, head_dim]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v by torch.nn.functional.scaled_dot_product_attention."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by native code, where it takes the shape."""
    return (kernels.attention_native if kernels.attention_fits(q, k, v) else sdpa)(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by xformers.ops.memory_efficient_attention."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def probe_xformers(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[str | None, float]:
    """(why xformers cannot be used, or None; its time over SDPA's) for q, k, v of ``shape``, by running both."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed: pip install 'pdae_fast[xformers]'", float("inf")
    if device.type != "cuda":
        return f"xformers has no kernels for {device.type}", float("inf")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    try:
        found, expected = xformers(q, k, v), sdpa(q, k, v)
        error = float((found - expected).float().norm() / expected.float().norm())
        if not error < PROBE_TOLERANCE:
            return f"xformers disagrees with PyTorch on {list(shape)} ({error:.1e})", float("inf")
        seconds = []
        for attend in (xformers, sdpa):
            attend(q, k, v)
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(PROBE_ROUNDS):
                attend(q, k, v)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # noqa: BLE001 - a broken build of an optional backend may raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"xformers failed its probe call: {line}", float("inf")
    return None, seconds[0] / seconds[1]


def resolve_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int] | None,
    has_native: bool = False,
) -> tuple[str, Attend]:
    """(name, function) of the backend to use for q, k, v of ``shape`` [B, N, heads, head_dim]; None: no attention.

    "auto" is SDPA, on a CPU with ``has_native`` in native code, unless a probe call finds that xformers works here,
    agrees, and takes less than 0.9 of the time. UserError for an unknown name, or when xformers was asked for and
    cannot be used.
    """
    if name not in BACKENDS:
        raise UserError(f"attention {name!r} is not known; expected {', '.join(BACKENDS)}")
    if name == "sdpa" or shape is None:
        return "sdpa", sdpa
    if name == "auto" and device.type != "cuda":
        return "sdpa", native if has_native else sdpa
    reason, ratio = probe_xformers(device, dtype, shape)
    if name == "xformers":
        if reason:
            raise UserError(f"attention xformers cannot be used: {reason}; use sdpa")
        return "xformers", xformers
    return ("xformers", xformers) if reason is None and ratio < 0.9 else ("sdpa", sdpa)
