"""Convolutions whose weights are laid out once instead of at every call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..models.layers import ResBlock, Upsample
from .device import has_amx

# Pixels of a map up to which weights, of which 2x2 tiles have 16/9 as many as the layer and 4x4 tiles four times as
# many, take longer to read than to multiply.
SMALL_MAP = 64
# Of all layers; held only by the first calls.
TRANSFORMING = threading.Lock()


def native_status(dtype: torch.dtype) -> tuple[bool, str]:
    """(usable, reason): is native code to run the 3x3 convolutions of maps of ``dtype`` here?"""
    usable, reason = kernels.winograd_status()
    if usable and dtype is torch.bfloat16 and has_amx():
        return False, "AMX multiplies bfloat16 as it stands"
    return usable, reason


def native_fits(layer: nn.Module) -> bool:
    """Whether native code is to run ``layer``, where it can. It reads float32 weights."""
    return (
        isinstance(layer, nn.Conv2d)
        and len(layer.weight) >= 16
        and kernels.winograd_fits(layer.weight, torch.float32, layer.stride[0], layer.padding[0])
    )


def native_layers(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if native_fits(layer)]


def forget(layers: list[nn.Conv2d]) -> None:
    """Leave ``layers`` without the values of their weights."""
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)


def upsampled_layers(network: nn.Module) -> list[nn.Conv2d]:
    """Those of `native_layers` that read a map upsampled by nearest-2x."""
    blocks = [m for m in network.modules() if isinstance(m, ResBlock) and m.resample == "up"]
    layers = [block.in_layers[2] for block in blocks] + [m.conv for m in network.modules() if isinstance(m, Upsample)]
    return [layer for layer in layers if native_fits(layer)]


def native_bytes(layers: list[nn.Conv2d], dtype: torch.dtype, tile: int) -> int:
    """What the transformed weights of ``layers`` take at most, in tiles of at most ``tile``."""
    return sum(kernels.winograd_bytes(*layer.weight.shape[:2], tile, dtype) for layer in layers)


def default_tile(dtype: torch.dtype) -> int:
    """The largest tile that costs maps of ``dtype`` no more than rounding does."""
    return 4 if dtype is torch.float32 else 2


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's pre-packed convolutions can be used here."""
    ops = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_convolution_weight")
        and hasattr(ops, "_convolution_pointwise")
        and (dtype is torch.float32 or dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported())
    )


class PlainConvolution:
    """conv(x) [+ residual] by the framework's operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> None:
        self.weight, self.dtype = weight.contiguous(memory_format=torch.channels_last), weight.dtype
        self.bias, self.stride, self.padding = bias, stride, padding

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if residual is None else y.add_(residual)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the result."""
        sides = ((n + 2 * self.padding - self.weight.shape[2]) // self.stride + 1 for n in x.shape[2:])
        return (len(x), len(self.weight), *sides)

    def into(self, x: Tensor, out: Tensor) -> None:
        """The same, of a layer without a bias, in the memory ``out``, channels-last."""
        kernels.convolution_into(x, self.weight, out, self.stride, self.padding)


class StemConvolution:
    """conv(x) + bias of few channels to many, x float32. In a lower precision x is read as two maps that add up to it:
    rounded, an x_t that is nearly the image is another one. The bias is the weight of one more channel, of ones, at
    the centre, which never lies in the padding: added afterwards it would take a pass over the map."""

    def __init__(self, layer: nn.Conv2d, packed: bool = False) -> None:
        weight, padding = layer.weight.detach(), layer.padding[0]
        bias = torch.zeros_like(weight[:, :1])
        bias[:, 0, padding, padding] = layer.bias.detach()
        self.ones = weight.new_ones(1, 1, 1, 1)
        self.split = weight.dtype is not torch.float32
        weight = torch.cat([*[weight] * (1 + self.split), bias], 1)
        self.conv = (PackedConvolution if packed else PlainConvolution)(weight, None, layer.stride[0], padding)

    def __call__(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        rounded = x.to(self.ones.dtype)
        parts = [rounded]
        if self.split:
            parts.append(torch.sub(x, rounded, out=torch.empty_like(rounded)))
        shape, last = (B, len(parts) * C + 1, H, W), torch.channels_last
        joined = torch.empty(shape, dtype=rounded.dtype, device=x.device, memory_format=last)
        return self.conv(torch.cat([*parts, self.ones.expand(B, 1, H, W)], 1, out=joined))


class PackedConvolution:
    """conv(x) [+ residual] by oneDNN, the residual added inside it, weights in the layout it wants.

    The layout is chosen for the first input seen; other shapes are computed as well, through a slower path.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.packed = [stride] * 2, [padding] * 2, False

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.packed:
            with TRANSFORMING:
                if not self.packed:
                    self._pack(x)
        arguments = (self.weight, self.bias, self.padding, self.stride, [1, 1], 1)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *arguments, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, residual, *arguments, "add", None, None, [], None)

    def _pack(self, x: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight, self.padding, self.stride, [1, 1], 1, list(x.shape)
        )
        self.packed = True


class HeadConvolution:
    """conv3x3(x) in float32, of a map in a lower precision: what a network that predicts eps knows of an image where
    x_t is nearly noise is the small difference of x_t and its output, and would be rounded away."""

    def __init__(self, layer: nn.Conv2d, packed: bool) -> None:
        weight, bias, self.conv = layer.weight.detach(), layer.bias.detach().float(), None
        if packed:
            self.conv = PackedConvolution(weight.float(), bias, 1, 1)
        else:
            self.weight, self.bias = kernels.head_weights([weight]), bias[None]

    def __call__(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return kernels.head_convolution(x, self.weight, self.bias)
        return self.conv(kernels.empty_map(*x.shape, torch.float32).copy_(x))


class WinogradConvolution:
    """conv3x3(x) [+ residual], or conv3x3(nearest2x(x)), by native code with fewer multiplications.

    The weights, float32, are transformed when the first map comes: for upsampled maps for tiles of their own, else for
    2x2 pixels where maps have at most `SMALL_MAP`, for ``largest`` (0: `default_tile`) elsewhere; for 2x2 where that
    is ``largest``. A layer's maps have one size, so a result depends neither on the batch nor on the run.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, upsample: bool = False, largest: int = 0) -> None:
        self.weight, self.bias = weight, None if bias is None else bias.float()
        self.outputs, self.upsample, self.largest, self.tile = len(weight), upsample, largest, 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if not self.tile:
            with TRANSFORMING:
                if not self.tile:
                    self._transform(x)
        return kernels.winograd(x, self.weight, self.bias, self.outputs, self.tile, residual, upsample=self.upsample)

    def _transform(self, x: Tensor) -> None:
        tile = 2 if x.shape[2] * x.shape[3] <= SMALL_MAP else self.largest or default_tile(x.dtype)
        if self.upsample and self.largest != 2:
            tile = kernels.UPSAMPLED
        self.weight = kernels.winograd_weights(self.weight, tile, x.dtype)
        self.tile = tile


class PointwiseConvolution:
    """conv1x1(x) [+ residual] by native code, or conv1x1(cat([x, x2], 1)) without the cat."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = kernels.pointwise_weights(weight), None if bias is None else bias.float()
        self.outputs = len(weight)

    def __call__(self, x: Tensor, residual: Tensor | None = None, x2: Tensor | None = None) -> Tensor:
        last = torch.channels_last
        x, x2, residual = (t if t is None else t.contiguous(memory_format=last) for t in (x, x2, residual))
        return kernels.pointwise(x, self.weight, self.bias, self.outputs, x2, residual)


def convolution(
    layer: nn.Conv2d,
    packed: bool,
    *,
    native: int | None = None,
    weight: Tensor | None = None,
    padding: int | None = None,
    bias: bool = True,
    upsample: bool = False,
):
    """The callable for ``layer``, or for ``weight`` in its place; without its bias when that is added elsewhere.

    With ``native``, a `WinogradConvolution` of such a largest tile where that fits the layer, and only then with
    ``upsample``; or a `PointwiseConvolution`.
    """
    given, own = weight, layer.bias.detach() if bias else None
    weight, stride = layer.weight.detach() if given is None else given, layer.stride[0]
    padding = layer.padding[0] if padding is None else padding
    if native is not None:
        if given is None and native_fits(layer):
            return WinogradConvolution(weight, own, upsample, native)
        if kernels.pointwise_fits(weight, stride, padding):
            return PointwiseConvolution(weight, own)
    return (PackedConvolution if packed else PlainConvolution)(weight, own, stride, padding)
