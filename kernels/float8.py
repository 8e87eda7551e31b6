"""fp8 (e4m3) on a GPU: the group norm that answers in codes, and the 3x3 convolution of codes.

A code is a value of `torch.float8_e4m3fn` that stands for itself times a scale. Inference alone; no GPU has run the
kernels yet. The CPU, and GPUs below compute capability 8.9, compute the same by torch's operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import run
from ._layout import empty_image, to_layout
from ._triton import MAX_IMAGE_ELEMENTS, fallback_reason, triton_status
from .group_norm import _group_norm_fake, _obstacle, _prepare, group_norm, group_norm_apply

CODE = torch.float8_e4m3fn
MIN_CAPABILITY = (8, 9)
LARGEST = 448.0


def float8_obstacle() -> str | None:
    """Why the kernels cannot run on this machine's current CUDA device, or None where they can."""
    usable, reason = triton_status()
    if not usable:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY)
    return None


def float8_codes(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale rounded to e4m3, in the layout of x: what is beyond 448 becomes 448, NaN stays."""
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(CODE)


def image_scales(scale: Tensor | float, x: Tensor) -> Tensor | float:
    """What divides x [B, C, H, W]: a number, or of float32 [S], one for every B / S images in turn, [B, 1, 1, 1]."""
    if not isinstance(scale, Tensor):
        return scale
    return scale[:, None].expand(-1, len(x) // len(scale)).reshape(-1, 1, 1, 1)


def group_norm_float8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    code_scale: Tensor | float,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    stats: Tensor | None = None,
    stats2: Tensor | None = None,
) -> Tensor:
    """`group_norm`, or with ``stats`` `group_norm_apply`, divided by ``code_scale``, a power of two, and rounded to
    e4m3, once by the kernels: [B, C1 + C2, H, W] of float8_e4m3fn in x's layout. Not differentiable.

    ``code_scale`` is a number, or float32 [S]: one for every B / S images in turn.
    """
    run_norm = _group_norm_float8_cuda if x.device.type == "cuda" else _group_norm_float8
    return run_norm(x, weight, bias, code_scale, (num_groups, eps, scale, shift, silu, x2, x_bias), stats, stats2)


def _torch_group_norm_float8(x, weight, bias, code_scale, rest, stats, stats2):
    code_scale = image_scales(code_scale, x)
    if stats is None:
        return float8_codes(group_norm(x, weight, bias, *rest), code_scale)
    *rest, x_bias = rest
    return float8_codes(group_norm_apply(x, stats, weight, bias, *rest, stats2, x_bias), code_scale)


# By the names of the other ops, which are registered: these are for inference alone.
_group_norm_float8 = _torch_group_norm_float8


def _group_norm_float8_cuda(x, weight, bias, code_scale, rest, stats, stats2):
    groups, eps, scale, shift, silu, x2, x_bias = rest
    like, mean, rstd = _group_norm_fake(x, weight, bias, *rest)
    if _obstacle(x, like, groups) or float8_obstacle():
        return _torch_group_norm_float8(x, weight, bias, code_scale, rest, stats, stats2)
    from .group_norm_plan import apply_launches, given_statistics, group_norm_launches

    y = empty_image(x, like.shape, CODE)
    x, weight, bias, scale, shift, x2, x_bias = _prepare(x, weight, bias, scale, shift, x2, x_bias)
    arguments = (weight, bias, groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd)
    if stats is None:
        run(group_norm_launches(x, *arguments, code_scale=code_scale))
    else:
        given = given_statistics(x, *(None if t is None else t.float().contiguous() for t in (stats, stats2)))
        run(apply_launches(x, given, *arguments, code_scale))
    return y


def conv_float8(
    x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, upsample: bool = False, out: Tensor | None = None
) -> Tensor:
    """scale[o] * conv3x3(x), or of nearest2x(x): [B, O, H, W] in ``dtype``, channels-last, padding 1, no bias; in the
    memory ``out`` where that is given.

    x [B, C, H, W] and weight [O, 3, 3, C] are codes, scale float32 [O] those of both together. Sums are float32, but
    tensor cores of compute capability 8.9 and 9.0 cut off what they add 13 binary digits below the sum: an error of
    2^-13 sqrt(9 C) of it at most, 0.4% for 96 channels and simulated a fifth of that, where rounding to codes costs a
    few percent. Raises ValueError for another ``out`` than the result.
    """
    shape = (len(x), len(weight), *(side << upsample for side in x.shape[2:]))
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"conv_float8: out must be {dtype} {shape}, channels-last; got {out.dtype} {tuple(out.shape)}")
    return (_conv_float8_cuda if x.device.type == "cuda" else _conv_float8)(x, weight, scale, out, upsample)


def _torch_conv_float8(x, weight, scale, y, upsample):
    values = x.float()
    if upsample:
        values = F.interpolate(values, scale_factor=2, mode="nearest")
    product = F.conv2d(values, weight.float().permute(0, 3, 1, 2), padding=1)
    return y.copy_(product.mul_(scale[:, None, None]))


_conv_float8 = _torch_conv_float8


def _conv_float8_cuda(x, weight, scale, y, upsample):
    # Pixels of all images, and the weights, are counted in 32 bits. Rows that begin at no multiple of 16 bytes are read
    # code by code, by more addresses than registers.
    large = max(y.numel() // len(weight), weight.numel()) > MAX_IMAGE_ELEMENTS
    if large or x.shape[1] % 16 or fallback_reason(y) or float8_obstacle():
        return _torch_conv_float8(x, weight, scale, y, upsample)
    from .float8_triton import conv_float8_launches

    run(conv_float8_launches(to_layout(x, True), weight, scale, y))
    return y
