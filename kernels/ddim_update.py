"""One DDIM step as one op: shift the noise by the gradient, predict x0, clamp it, re-derive the noise, move
to the next point.

PDAE, Algorithm 3 (arXiv 2212.12990). With ᾱ at the current point and ᾱ' at the next:

    ε'  = ε - √(1-ᾱ) G
    x̂0  = clamp(x/√ᾱ - √(1/ᾱ-1) ε', -1, 1)
    ε'' = (x/√ᾱ - x̂0) / √(1/ᾱ-1)
    x   ← √ᾱ' x̂0 + √(1-ᾱ') ε''

ᾱ' > ᾱ decodes, ᾱ' < ᾱ inverts (encodes). The op forms ε'' as ε' + (x̂0 before the clamp - x̂0 after) /
√(1/ᾱ-1), which is the same number: where nothing is clamped it is ε' itself, while the formula above would
divide a rounding error by √(1/ᾱ-1), 0.01 at t = 0. That term is also how a point with ᾱ = 1 stays finite.

All arithmetic is float32 whatever the network's dtype. The coefficients are a table on the device and the
step an index on the device, so that one captured CUDA graph replays every step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._launch import run
from ._layout import check_image, check_like, empty_image, is_channels_last, to_layout
from ._triton import fallback_reason

# Columns of the coefficient table: 1/√ᾱ, √(1/ᾱ-1), √(1-ᾱ), 1/√(1/ᾱ-1), √ᾱ', √(1-ᾱ').
COEFFICIENTS = 6


def ddim_coefficients(alpha_bar_now, alpha_bar_next) -> Tensor:
    """Float32 CPU table [S, 6] for `ddim_update` from two sequences of S float64 values of ᾱ: at each step's
    start and at its end.

    Computed in float64 and rounded once; an end may be 0, which leaves ε'' itself. Raises ValueError unless both
    are one-dimensional, equally long and in (0, 1] and [0, 1].
    """
    now, following = (np.asarray(a, dtype=np.float64) for a in (alpha_bar_now, alpha_bar_next))
    if now.ndim != 1 or now.shape != following.shape:
        raise ValueError(f"ddim_coefficients: need two sequences of one length, got {now.shape} and {following.shape}")
    if not (np.all((now > 0) & (now <= 1)) and np.all((following >= 0) & (following <= 1))):
        raise ValueError("ddim_coefficients: every alpha_bar must lie in (0, 1], at the ends in [0, 1]")
    ratio = np.sqrt((1 - now) / now)
    # At ᾱ = 1 there is no noise to re-derive: a zero leaves ε' as it is.
    inverse = np.divide(1.0, ratio, out=np.zeros_like(ratio), where=ratio > 0)
    table = np.stack(
        [1 / np.sqrt(now), ratio, np.sqrt(1 - now), inverse, np.sqrt(following), np.sqrt(1 - following)],
        axis=1,
    )
    return torch.from_numpy(table.astype(np.float32))


def _check_state(x: Tensor, coefficients: Tensor, index: Tensor) -> None:
    """Raise ValueError unless x is a float32 image, and coefficients and index are as `ddim_update` takes them."""
    check_image("ddim_update", "x", x)
    if x.dtype != torch.float32:
        raise ValueError(f"ddim_update: x must be float32, the sampler's precision, got {x.dtype}")
    if coefficients.dim() != 2 or coefficients.shape[1] != COEFFICIENTS or coefficients.dtype != torch.float32:
        raise ValueError(
            f"ddim_update: coefficients must be float32 [S, {COEFFICIENTS}], "
            f"got {coefficients.dtype} {tuple(coefficients.shape)}"
        )
    if index.dtype != torch.int64 or tuple(index.shape) not in ((), (x.shape[0],)):
        raise ValueError(
            f"ddim_update: index must be int64 [] or [{x.shape[0]}], got {index.dtype} {tuple(index.shape)}"
        )
    if coefficients.device != x.device or index.device != x.device:
        raise ValueError(
            f"ddim_update: coefficients on {coefficients.device} and index on {index.device}, x on {x.device}"
        )


def ddim_update_reference(
    x: Tensor, eps: Tensor, gradient: Tensor | None, coefficients: Tensor, index: Tensor, clamp: bool = True
) -> Tensor:
    """Algorithm 3 as printed, in x's precision (pass float64 tensors for a float64 answer). Arguments as
    `ddim_update`."""
    column = coefficients.to(x.dtype)[index.expand(x.shape[0])].T[..., None, None, None]
    reciprocal, ratio, sigma, _inverse, next_signal, next_noise = column
    eps = eps.to(x.dtype)
    if gradient is not None:
        eps = eps - sigma * gradient.to(x.dtype)
    x0 = x * reciprocal - ratio * eps
    if clamp:
        x0 = x0.clamp(-1, 1)
    return next_signal * x0 + next_noise * ((x * reciprocal - x0) / ratio)


def ddim_update(
    x: Tensor, eps: Tensor, gradient: Tensor | None, coefficients: Tensor, index: Tensor, clamp: bool = True
) -> Tensor:
    """The next state of the sampler, float32 [B, C, H, W] in x's layout.

    x float32 [B, C, H, W]; eps, and gradient or None, of x's shape in any floating dtype. coefficients
    float32 [S, 6] from `ddim_coefficients`. index int64, on x's device: the row to use, shape [] for one step
    or [B] for one a sample; 0 <= index < S is the caller's duty (it is read on the device, unchecked). For
    inference: not differentiable.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check_state(x, coefficients, index)
    check_like("ddim_update", "eps", eps, x.shape, x.device)
    if gradient is not None:
        check_like("ddim_update", "gradient", gradient, x.shape, x.device)
    return _ddim_update(x, eps, gradient, coefficients, index, clamp)


def _torch_update(x, eps, gradient, coefficients, index, clamp) -> Tensor:
    # Views of one row broadcast over the batch, or of a row a sample. Indexing by a tensor of no dimension would wait
    # for it.
    columns = coefficients.index_select(0, index.reshape(-1)).T[..., None, None, None]
    reciprocal, ratio, sigma, inverse, next_signal, next_noise = columns
    eps = eps.float()
    if gradient is not None:
        eps = eps - gradient.float() * sigma
    x0 = x * reciprocal - eps * ratio
    if clamp:
        clamped = x0.clamp(-1, 1)
        eps = eps + (x0 - clamped).mul_(inverse)
        x0 = clamped
    return to_layout(x0.mul_(next_signal).add_(eps * next_noise), is_channels_last(x))


@torch.library.custom_op("pdae_fast::ddim_update", mutates_args=(), device_types="cpu")
def _ddim_update(
    x: Tensor, eps: Tensor, gradient: Tensor | None, coefficients: Tensor, index: Tensor, clamp: bool
) -> Tensor:
    return _torch_update(x, eps, gradient, coefficients, index, clamp)


@_ddim_update.register_kernel("cuda")
def _ddim_update_cuda(x, eps, gradient, coefficients, index, clamp):
    if fallback_reason(x, eps) or (gradient is not None and fallback_reason(gradient)):
        return _torch_update(x, eps, gradient, coefficients, index, clamp)
    from .ddim_update_triton import ddim_launches

    channels_last = is_channels_last(x)
    x, eps = to_layout(x, channels_last), to_layout(eps, channels_last)
    gradient = None if gradient is None else to_layout(gradient, channels_last)
    out = empty_image(x, x.shape)
    run(ddim_launches(x, eps, gradient, coefficients.contiguous(), index.contiguous(), clamp, out))
    return out


@_ddim_update.register_fake
def _(x, eps, gradient, coefficients, index, clamp):
    return empty_image(x, x.shape)
