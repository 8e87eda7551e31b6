"""Convolutions whose weights are laid out once instead of at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's pre-packed convolutions can be used here."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class PlainConvolution:
    """conv(x) [+ residual] by the framework's operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> None:
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.stride, self.padding = bias, stride, padding

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if residual is None else y.add_(residual)


class PackedConvolution:
    """conv(x) [+ residual] by oneDNN, the residual added inside it, weights in the layout it wants.

    The layout is chosen for the first input seen; other shapes are computed as well, through a slower path.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.packed = [stride] * 2, [padding] * 2, False

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, [1, 1], 1, list(x.shape)
            )
            self.packed = True
        arguments = (self.weight, self.bias, self.padding, self.stride, [1, 1], 1)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *arguments, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, residual, *arguments, "add", None, None, [], None)


def convolution(
    layer: nn.Conv2d, packed: bool, *, weight: Tensor | None = None, padding: int | None = None, bias: bool = True
):
    """The callable for ``layer``, or for ``weight`` in its place; without its bias when that is added elsewhere."""
    cls = PackedConvolution if packed else PlainConvolution
    return cls(
        layer.weight.detach() if weight is None else weight,
        layer.bias.detach() if bias else None,
        layer.stride[0],
        layer.padding[0] if padding is None else padding,
    )
