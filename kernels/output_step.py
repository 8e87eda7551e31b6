"""The end of a sampler's step as one op: both decoders' heads (GroupNorm, SiLU, 3x3 convolution to the image's
channels) and the DDIM update of what they return.

    ε = conv(silu(GN(h)))    and the same for G, from a map of its own
    x ← the step of `ddim_update` by ε and G

On CUDA the activated maps are never written, and neither are ε and G: the maps are read twice, once for their
statistics by the kernels of the group norm, and once by a matrix product with all nine taps of the convolution that
normalises and activates what it reads. It leaves 9 C_out float32 numbers a pixel, which a last pass over the state adds
up where they belong. Estimated traffic of a step at FFHQ-128, batch 64, bfloat16 (128 channels at 128 x 128): apart the
two heads and the update move 2.2 GB, here 1.3 GB. That is counted, not measured.

ε and G are never rounded to the maps' dtype; activated maps are, as a convolution in that dtype has them.

On the CPU, and wherever `fallback_reason` names an obstacle, the framework's operators run one after the other. Nothing
is to gain there: both convolutions and the update are 1% of a step of fashion32 and less of larger networks (`pytest
bench/test_rewrites.py --benchmark-only`, the last row of a case).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import check_image, check_like, empty_image, is_channels_last, to_layout
from ._triton import MAX_IMAGE_ELEMENTS, fallback_reason, run
from .ddim_update import check_state, ddim_update_reference, torch_update
from .group_norm import group_norm, group_norm_reference

MAX_IMAGE_CHANNELS = 7  # the products of all taps fit one tile of the kernel


class Head(NamedTuple):
    """What turns a decoder's last map into ε or G.

    h [B, C, H, W]: the map before its norm, float32, float16 or bfloat16 (float64 by the framework). norm_weight,
    norm_bias [C] in any floating dtype. weight [C_out, C, 3, 3] and bias [C_out] in h's dtype. The kernels read h and
    weight channels-last and copy what is not.
    """

    h: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


def output_step_reference(
    x: Tensor,
    eps: Head,
    gradient: Head | None,
    coefficients: Tensor,
    index: Tensor,
    clamp: bool = True,
    num_groups: int = 32,
    norm_eps: float = 1e-5,
) -> Tensor:
    """The definition, in x's precision (pass float64 tensors for a float64 answer). Arguments as `output_step`."""

    def predict(head: Head | None) -> Tensor | None:
        if head is None:
            return None
        h, norm_weight, norm_bias, weight, bias = (tensor.to(x.dtype) for tensor in head)
        y = group_norm_reference(h, norm_weight, norm_bias, num_groups, norm_eps, silu=True)
        return F.conv2d(y, weight, bias, padding=1)

    return ddim_update_reference(x, predict(eps), predict(gradient), coefficients, index, clamp)


def output_step(
    x: Tensor,
    eps: Head,
    gradient: Head | None,
    coefficients: Tensor,
    index: Tensor,
    clamp: bool = True,
    num_groups: int = 32,
    norm_eps: float = 1e-5,
) -> Tensor:
    """The next state of the sampler, float32 [B, C_out, H, W] in x's layout (PDAE, Algorithm 3, arXiv 2212.12990).

    x float32 [B, C_out, H, W]; eps, and gradient or None for a step without G, the heads of the two decoders, their
    maps of one shape and dtype. coefficients, index and clamp as `ddim_update` takes them, downward or upward, with one
    index or one a sample. For inference: not differentiable.

    Raises ValueError for wrong shapes, dtypes or devices, or channels not divisible by num_groups.
    """
    check_state("output_step", x, coefficients, index)
    for name, head in (("eps", eps), ("gradient", gradient)):
        if head is not None:
            _check_head(name, head, x, eps.h, num_groups)
    return _output_step(x, *eps, *(gradient or [None] * 5), coefficients, index, clamp, num_groups, norm_eps)


def _check_head(name: str, head: Head, x: Tensor, first: Tensor, num_groups: int) -> None:
    op, h = "output_step", head.h
    check_image(op, f"{name}.h", h)
    channels, outputs = h.shape[1], x.shape[1]
    check_like(op, f"{name}.h", h, (x.shape[0], first.shape[1], *x.shape[2:]), x.device)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels cannot be split into {num_groups} groups")
    check_like(op, f"{name}.norm_weight", head.norm_weight, (channels,), x.device)
    check_like(op, f"{name}.norm_bias", head.norm_bias, (channels,), x.device)
    check_like(op, f"{name}.weight", head.weight, (outputs, channels, 3, 3), x.device)
    check_like(op, f"{name}.bias", head.bias, (outputs,), x.device)
    for part, tensor in (("h", h), ("weight", head.weight), ("bias", head.bias)):
        if tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {name}.{part} is {tensor.dtype} but eps.h is {first.dtype}")


def _torch_output_step(x, eps, gradient, coefficients, index, clamp, num_groups, norm_eps) -> Tensor:
    def predict(head: Head) -> Tensor:
        y = group_norm(head.h, head.norm_weight, head.norm_bias, num_groups, norm_eps, silu=True)
        return F.conv2d(y, head.weight, head.bias, padding=1)

    predicted = None if gradient is None else predict(gradient)
    return torch_update(x, predict(eps), predicted, coefficients, index, clamp)


@torch.library.custom_op("pdae_fast::output_step", mutates_args=(), device_types="cpu")
def _output_step(
    x: Tensor,
    h: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    gradient_h: Tensor | None,
    gradient_norm_weight: Tensor | None,
    gradient_norm_bias: Tensor | None,
    gradient_weight: Tensor | None,
    gradient_bias: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    clamp: bool,
    num_groups: int,
    norm_eps: float,
) -> Tensor:
    eps = Head(h, norm_weight, norm_bias, weight, bias)
    gradient = None
    if gradient_h is not None:
        gradient = Head(gradient_h, gradient_norm_weight, gradient_norm_bias, gradient_weight, gradient_bias)
    return _torch_output_step(x, eps, gradient, coefficients, index, clamp, num_groups, norm_eps)


def _prepare(head: Head) -> Head:
    """The head as the kernels take it."""
    vectors = (head.norm_weight.contiguous(), head.norm_bias.contiguous())
    return Head(to_layout(head.h, True), *vectors, to_layout(head.weight, True), head.bias.contiguous())


def _obstacle(x: Tensor, h: Tensor) -> str | None:
    if x.shape[1] > MAX_IMAGE_CHANNELS:
        return f"more than {MAX_IMAGE_CHANNELS} image channels"
    if 9 * x[0].numel() > MAX_IMAGE_ELEMENTS:
        return "an image is too large for 32-bit offsets"
    return fallback_reason(x, h)


@_output_step.register_kernel("cuda")
def _output_step_cuda(x, *arguments):
    *heads, coefficients, index, clamp, num_groups, norm_eps = arguments
    eps, gradient = Head(*heads[:5]), None if heads[5] is None else Head(*heads[5:])
    if _obstacle(x, eps.h):
        return _torch_output_step(x, eps, gradient, coefficients, index, clamp, num_groups, norm_eps)
    from .output_step_triton import output_step_launches

    eps, gradient = (None if head is None else _prepare(head) for head in (eps, gradient))
    x, out = to_layout(x, is_channels_last(x)), empty_image(x, x.shape)
    table = coefficients.contiguous(), index.contiguous()
    run(output_step_launches(x, eps, gradient, *table, num_groups, norm_eps, clamp, out))
    return out


@_output_step.register_fake
def _(x, *_arguments):
    return empty_image(x, x.shape)
