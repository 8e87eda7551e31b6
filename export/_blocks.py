"""The blocks of the traced modules: norms that stay float32, residual blocks with an affine from outside, attention."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS
from ..models.layers import AttentionBlock, ResBlock

NORMS = ("group", "instance")


class Norm(nn.Module):
    """float32 GN(x) * multiplier + addend; x [N, C, H, W] of any dtype.

    The affine is [C], or [N, C] when it differs between images. ``form`` "group" is one GroupNormalization node;
    "instance" is InstanceNormalization over [N, groups, *], which some runtimes compute faster and, where the mean is
    far from zero, more precisely.
    """

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("ones", torch.ones(channels), persistent=False)
        self.register_buffer("zeros", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor, multiplier: Tensor, addend: Tensor) -> Tensor:
        x = x.float()
        if self.form == "group":
            if multiplier.ndim == 1:
                return F.group_norm(x, NORM_GROUPS, multiplier, addend)
            normal = F.group_norm(x, NORM_GROUPS, self.ones, self.zeros)
        else:
            normal = F.instance_norm(x.reshape(x.shape[0], NORM_GROUPS, -1)).reshape(x.shape)
        return normal * multiplier[..., None, None] + addend[..., None, None]


class FixedNorm(Norm):
    """A Norm whose affine is the layer's own."""

    def __init__(self, layer: nn.GroupNorm, form: str) -> None:
        super().__init__(layer.num_channels, form)
        self.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.weight, self.bias)


def as_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``layer`` with its weights in ``dtype``."""
    return copy.deepcopy(layer).to(dtype).requires_grad_(False)


class Residual(nn.Module):
    """One ResBlock whose adaptive norm gets its affine from outside."""

    def __init__(self, block: ResBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.resample = dtype, block._resample
        self.norm_in = FixedNorm(block.in_layers[0], form)
        self.conv_in = as_dtype(block.in_layers[2], dtype)
        self.norm_out = Norm(block.out_layers[0].num_channels, form)
        self.conv_out = as_dtype(block.out_layers[3], dtype)
        self.skip = as_dtype(block.skip_connection, dtype)

    def forward(self, x: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
        h = F.silu(self.norm_in(x)).to(self.dtype)
        h = self.conv_in(self.resample(h))
        h = self.conv_out(F.silu(self.norm_out(h, *affine)).to(self.dtype))
        return self.skip(self.resample(x)) + h


class Attention(nn.Module):
    """The attention block with its projections as 1x1 convolutions and explicit products.

    Explicit because opset 23's Attention is refused by TensorRT for RTX, and attention is a few per cent of the work.
    """

    def __init__(self, block: AttentionBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.heads, self.split_heads = dtype, block.heads, block.split_heads
        self.norm = FixedNorm(block.norm, form)
        self.qkv, self.proj = (self._convolution(layer, dtype) for layer in (block.qkv, block.proj_out))

    @staticmethod
    def _convolution(layer: nn.Conv1d, dtype: torch.dtype) -> nn.Conv2d:
        convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 1)
        convolution.weight.data = layer.weight.detach()[..., None].clone()
        convolution.bias.data = layer.bias.detach().clone()
        return convolution.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        rows = self.qkv(self.norm(x).to(self.dtype)).reshape(B, 3 * C, H * W)
        q, k, v = self.split_heads(rows)
        logits = (q * (C // self.heads) ** -0.5) @ k.transpose(-1, -2)
        h = logits.float().softmax(-1).to(self.dtype) @ v
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))
