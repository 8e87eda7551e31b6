"""fp8, an approximation: both convolutions of every residual block multiply values rounded to e4m3 (four significant
bits, 2^-9 to 448), maps by one scale a layer and weights by one an output channel.

Every scale is a power of two. To multiply by it is exact, so that a rounded value times its scale is a number that all
dtypes hold, and a convolution of such numbers in float32 or bfloat16 gives what a product of fp8 codes with float32
sums gives. This is how it is computed wherever it runs today, faster nowhere; `by_codes` multiplies the codes
themselves, on a GPU that has them, and is off until one has run it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import UserError
from ..kernels.float8 import LARGEST
from ..limits import brief, is_number, load_json
from ..models import PDAE, Prior, unet_of
from ..models.layers import ResBlock
from ..models.unet import UNet
from ..tensors import weights_fingerprint
from .ownership import sharing

M = TypeVar("M", PDAE, Prior)
FORMAT = "pdae_fast-fp8-1"
EXPECTED = "what python -m pdae_fast.calibrate wrote"
# Of a map's largest magnitude: nothing of a layer's range is smaller.
LEAST, MOST = 1e-6, 1e6


def scale_for(largest: Tensor) -> Tensor:
    """The smallest power of two that brings magnitudes up to ``largest`` into the range of e4m3."""
    mantissa, exponent = torch.frexp(largest.float().clamp_min(LEAST) / LARGEST)
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    """The codes of x times scale, in the dtype of x."""
    return kernels.float8_codes(x, scale).to(x.dtype).mul_(scale)


class Float8Conv2d(nn.Conv2d):
    """``layer``, a 3x3 convolution, of rounded weights and rounded maps, whose largest magnitude is ``largest``."""

    def __init__(self, layer: nn.Conv2d, largest: float) -> None:
        bias = layer.bias is not None
        super().__init__(layer.in_channels, layer.out_channels, 3, padding=layer.padding, bias=bias, device="meta")
        weight = layer.weight.detach().float()
        scale = scale_for(weight.abs().amax((1, 2, 3), keepdim=True))
        self.weight = nn.Parameter(rounded(weight, scale), requires_grad=False)
        self.bias = layer.bias
        self.scale = float(scale_for(torch.tensor(largest)))

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d."""
        return super().forward(rounded(x, self.scale))


class RoundedConvolution:
    """``conv``, of the fused plan, of rounded maps."""

    def __init__(self, conv: Callable[..., Tensor], scale: float) -> None:
        self.conv, self.scale = conv, scale

    def __call__(self, x: Tensor, *arguments: Tensor) -> Tensor:
        return self.conv(rounded(x, self.scale), *arguments)


def reading(layer: nn.Conv2d, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run``, the fused plan's convolution for ``layer``, of maps that are rounded first where the layer asks it."""
    return RoundedConvolution(run, layer.scale) if isinstance(layer, Float8Conv2d) else run


class CodedConvolution:
    """conv3x3(x), or conv3x3(nearest2x(x)), of codes x, without its bias, in the dtype of the layer's weights."""

    def __init__(self, layer: Float8Conv2d, upsample: bool) -> None:
        weight = layer.weight.detach()
        scale = scale_for(weight.abs().amax((1, 2, 3)))
        self.weight = kernels.float8_codes(weight, scale[:, None, None, None]).permute(0, 2, 3, 1).contiguous()
        self.scale, self.dtype, self.upsample = scale * layer.scale, weight.dtype, upsample

    def __call__(self, x: Tensor) -> Tensor:
        return self.into(x, None)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the result."""
        return (len(x), len(self.weight), *(side << self.upsample for side in x.shape[2:]))

    def into(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The same in the memory ``out``, channels-last."""
        return kernels.conv_float8(x, self.weight, self.scale, self.dtype, self.upsample, out)


def by_codes(
    norm: Callable[..., Tensor], layer: nn.Conv2d, run: Callable[..., Tensor], upsample: bool = False
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused plan's norm and the convolution ``run`` for ``layer`` right behind it, as ones that write and multiply
    codes where the layer rounds."""
    if not isinstance(layer, Float8Conv2d):
        return norm, run
    scale = torch.full((1,), layer.scale, dtype=torch.float32, device=layer.weight.device)
    return functools.partial(norm, code_scale=scale), CodedConvolution(layer, upsample)


def float8_layers(unet: UNet) -> dict[str, nn.Conv2d]:
    """What fp8 acts on, by name: all but the first and the last convolution, those that resample and the 1x1 ones."""
    return {
        f"{name}.{part}": block.get_submodule(part)
        for name, block in unet.named_modules()
        if isinstance(block, ResBlock)
        for part in ("in_layers.2", "out_layers.3")
    }


def in_float8(model: M, scales: str | os.PathLike | Mapping[str, Any]) -> M:
    """``model`` with rounded layers, which shares all else with it; ``scales``: of `calibration`, or a file that holds
    it. UserError for scales of other weights and for what is no scales."""
    model = sharing(model)
    unet = unet_of(model)
    round_layers(unet, _checked(scales, unet))
    return model


def round_layers(unet: UNet, largest: Mapping[str, float]) -> None:
    """Put layers that round, by the ``largest`` magnitudes that they read, in the place of those of ``unet``."""
    layers = float8_layers(unet)
    for name, value in largest.items():
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, Float8Conv2d(layers[name], value))


def describe(unet: UNet, how: str = "emulated") -> dict[str, str]:
    """A line for reports; nothing where nothing is rounded."""
    count = sum(isinstance(layer, Float8Conv2d) for layer in unet.modules())
    return {"fp8": f"{count} convolutions of rounded values, {how}"} if count else {}


# -- calibration -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(unet: UNet) -> Iterator[dict[str, float]]:
    """What the layers of ``unet``, whose modules run inside, read: name -> largest magnitude, brought up to date."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(arguments[0].abs().amax()))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in float8_layers(unet).items()]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def calibration(model: PDAE | Prior, largest: Mapping[str, float]) -> dict[str, Any]:
    """What `in_float8` takes for ``model``: its weights' fingerprint, and of every layer the largest magnitude that it
    reads."""
    return {"format": FORMAT, "weights": weights_fingerprint(unet_of(model)), "largest": dict(largest)}


def _checked(scales: str | os.PathLike | Mapping[str, Any], unet: UNet) -> Mapping[str, float]:
    """The largest magnitudes of ``scales``, which are those of all its layers; UserError for anything else."""
    where = "fp8"
    if isinstance(scales, (str, os.PathLike)):
        where = os.fspath(scales)
        scales = load_json(Path(scales).expanduser(), EXPECTED)
    if not isinstance(scales, Mapping) or scales.get("format") != FORMAT:
        raise UserError(f"{where}: not a calibration ({brief(scales)}); expected {EXPECTED}")
    if scales.get("weights") != weights_fingerprint(unet):
        raise UserError(f"{where}: scales of other weights; calibrate this model (python -m pdae_fast.calibrate)")
    largest = scales.get("largest")
    if not isinstance(largest, Mapping) or largest.keys() != float8_layers(unet).keys():
        raise UserError(f"{where}: not the layers of this model; expected {EXPECTED}")
    for name, value in largest.items():
        if not is_number(value, 0, MOST):
            raise UserError(f"{where}: {name} is {brief(value)}; expected a number from 0 to {MOST:g}")
    return largest
