"""The end of a residual block that reads two maps: h + W cat([x, x2]) + bias, in one pass, for inference.

Neither the cat nor the product of the 1x1 skip convolution is ever written, and what the GroupNorm that reads the sum
needs to know of it is left beside it, as `add_with_stats` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import run
from ._layout import check_image, check_like, check_partial, check_rows, empty_partial, spread, to_layout, unit_rows
from ._triton import fallback_reason
from .group_norm_torch import torch_partial_stats


def add_projected_reference(h: Tensor, x: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + cat([x, x2]) weight + bias in float32 (float64 for float64 inputs); see `add_projected`."""
    wide, B = torch.promote_types(h.dtype, torch.float32), len(h)
    maps = torch.cat([x, x2.repeat(B // len(x2), 1, 1, 1)], 1).to(wide).flatten(2)
    product = weight.to(wide).mT.repeat_interleave(B // len(weight), 0) @ maps
    return h.to(wide) + product.view(h.shape) + spread(bias, B).to(wide)[..., None, None]


def add_projected(
    h: Tensor, x: Tensor, x2: Tensor, weight: Tensor, bias: Tensor, part: int = 0, splits: int = 1
) -> tuple[Tensor, Tensor | None]:
    """(y, partial statistics of y): y = h + conv1x1(cat([x, x2], 1)) + bias, rounded once, channels-last.

    h [B, O, H, W], x [B, C1, H, W] and x2 [B2, C2, H, W] of one dtype: B2 divides B, and image i of x goes with image
    i % B2 of x2. weight [S, C1 + C2, O] of that dtype and bias of any, [O] or [S, O]: one for every B / S images in
    turn. Statistics as of `partial_stats`, or None for part 0. Not differentiable.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    for name, image in (("h", h), ("x", x), ("x2", x2)):
        check_image("add_projected", name, image)
    check_like("add_projected", "x", x, (len(h), x.shape[1], *h.shape[2:]), h.device)
    shape = (len(x2) if len(x2) and not len(h) % len(x2) else "a divisor of h's batch", x2.shape[1], *h.shape[2:])
    check_like("add_projected", "x2", x2, shape, h.device)
    rows = len(weight) if weight.dim() == 3 and len(weight) and not len(h) % len(weight) else "a divisor of h's batch"
    check_like("add_projected", "weight", weight, (rows, x.shape[1] + x2.shape[1], h.shape[1]), h.device)
    for name, given in (("x", x), ("x2", x2), ("weight", weight)):
        if given.dtype != h.dtype:
            raise ValueError(f"add_projected: {name} is {given.dtype} but h is {h.dtype}")
    check_rows("add_projected", "bias", bias, h.shape[1], h)
    if part:
        check_partial("add_projected", h, part, splits)
    y, partial = _add_projected(h, x, x2, weight, bias, part, splits)
    return y, partial if part else None


def _empty(h: Tensor, part: int, splits: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    return out, empty_partial(h, part, splits) if part else h.new_empty(0, dtype=torch.float32)


def _torch_add_projected(h, x, x2, weight, bias, part, splits) -> tuple[Tensor, Tensor]:
    y = to_layout(add_projected_reference(h, x, x2, weight, bias).to(h.dtype), True)
    return y, torch_partial_stats(y, part, splits, None) if part else h.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("pdae_fast::add_projected", mutates_args=(), device_types="cpu")
def _add_projected(
    h: Tensor, x: Tensor, x2: Tensor, weight: Tensor, bias: Tensor, part: int, splits: int
) -> tuple[Tensor, Tensor]:
    return _torch_add_projected(h, x, x2, weight, bias, part, splits)


@_add_projected.register_kernel("cuda")
def _add_projected_cuda(h, x, x2, weight, bias, part, splits):
    # Rows that do not begin at a multiple of 16 bytes are read number by number, by more addresses than registers.
    unaligned = any(image.shape[1] % 16 for image in (h, x, x2))
    if fallback_reason(h, x, x2) or unaligned:
        return _torch_add_projected(h, x, x2, weight, bias, part, splits)
    from .add_projected_triton import add_projected_launches

    out, partial = _empty(h, part, splits)
    h, x, x2 = (to_layout(image, True) for image in (h, x, x2))
    rest = weight.contiguous(), unit_rows(bias), out, partial if part else None, splits
    run(add_projected_launches(h, x, x2, *rest))
    return out, partial


@_add_projected.register_fake
def _(h, x, x2, weight, bias, part, splits):
    return _empty(h, part, splits)
