"""Triton kernel of the DDIM update, and its plan. Import only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch

# Four elements a thread: one 16-byte access of the float32 state. Eight would suit half-precision noise
# better and make the compiler move one of the two through shared memory.
BLOCK = 512


@triton.jit
def advance(x, noise, row, CLAMP: tl.constexpr):
    """The next state from the state, the shifted noise (float32 tiles) and a row of coefficients."""
    reciprocal = tl.load(row)
    ratio = tl.load(row + 1)
    inverse = tl.load(row + 3)
    next_signal = tl.load(row + 4)
    next_noise = tl.load(row + 5)
    x0 = x * reciprocal - ratio * noise
    if CLAMP:
        clamped = tl.minimum(tl.maximum(x0, -1.0), 1.0)  # drops a NaN, which the next line puts back
        noise += (x0 - clamped) * inverse
        x0 = clamped
    return x0 * next_signal + noise * next_noise


@triton.jit
def ddim_kernel(
    x, eps, gradient, coefficients, index, out, size,
    HAS_GRADIENT: tl.constexpr, PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`size` elements an image, in memory order (all tensors share one dense layout): grid (blocks,
    batch)."""
    image = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < size
    at = image * size + lane
    row = coefficients + tl.load(index + image * PER_SAMPLE) * 6
    noise = tl.load(eps + at, valid, other=0.0).to(tl.float32)
    if HAS_GRADIENT:
        noise -= tl.load(row + 2) * tl.load(gradient + at, valid, other=0.0).to(tl.float32)
    tl.store(out + at, advance(tl.load(x + at, valid, other=0.0), noise, row, CLAMP), valid)


def ddim_launches(
    x: torch.Tensor,
    eps: torch.Tensor,
    gradient: torch.Tensor | None,
    coefficients: torch.Tensor,
    index: torch.Tensor,
    clamp: bool,
    out: torch.Tensor,
) -> list[Launch]:
    """Write out; x, eps, gradient and out are [B, C, H, W] in one dense layout, coefficients [S, 6] and index
    contiguous."""
    batch, size = x.shape[0], x.numel() // x.shape[0]
    arguments = {
        "x": x, "eps": eps, "gradient": eps if gradient is None else gradient, "coefficients": coefficients,
        "index": index, "out": out, "size": size,
    }  # fmt: skip
    constants = {
        "HAS_GRADIENT": gradient is not None, "PER_SAMPLE": index.dim() == 1, "CLAMP": clamp, "BLOCK": BLOCK,
    }  # fmt: skip
    return [Launch(ddim_kernel, (triton.cdiv(size, BLOCK), batch), arguments, constants, 4)]
