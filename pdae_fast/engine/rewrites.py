"""Exact rewrites of the network, each a small function tested against the model it replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS
from ..kernels.group_norm_torch import scalar_in_half
from ..models.layers import AttentionBlock, ResBlock, time_features
from ..models.unet import UNet
from .attention import sdpa

Convolution = Callable[..., Tensor]


class Affine(NamedTuple):
    """The norm of h: GN(h + offset) * multiplier + addend, GN without weights; float32, [1, C] or one row an image."""

    multiplier: Tensor
    addend: Tensor
    offset: Tensor | None = None

    def columns(self, wanted: slice) -> Affine:
        return Affine(*(None if values is None else values[:, wanted] for values in self))


def resblocks(module: nn.Module) -> list[ResBlock]:
    return [block for block in module.modules() if isinstance(block, ResBlock)]


class AffineTable:
    """All adaptive norms of a list of ResBlocks of one flavour as one wide affine: column ranges of [*, sum C].

    AdaGN computes (1 + z_s) (GN(h) (1 + s_t) + b_t) + z_b with GN(h) = w h_norm + b: for fixed t and z that is one
    multiplication and one addition per (image, channel). Where time is added before the norm, GN(h + b_t), it is an
    offset to h instead. Everything is float32. With ``fold`` that offset contains the bias of the convolution before.
    """

    def __init__(self, blocks: list[ResBlock], fold: bool = False) -> None:
        widths = [block.out_layers[0].num_channels for block in blocks]
        ends = list(itertools.accumulate(widths))
        self.columns = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self.weight = torch.cat([b.out_layers[0].weight.detach().float() for b in blocks])
        self.bias = torch.cat([b.out_layers[0].bias.detach().float() for b in blocks])
        self.scale_shift = blocks[0].scale_shift
        weight, bias = self._stack([b.emb_layers[1] for b in blocks])
        if fold and not self.scale_shift:
            bias = bias + torch.cat([b.in_layers[2].bias.detach().float() for b in blocks])
        self.time = weight, bias
        self.width = sum(widths)
        with_z = blocks[0].emb_z_layers is not None
        self.z = self._stack([b.emb_z_layers[1] for b in blocks]) if with_z else None

    def _stack(self, linears: list[nn.Linear]) -> tuple[Tensor, Tensor]:
        """All scale rows, then all shift rows: weight [2 sum C, D], bias [2 sum C]; or those of one kind alone."""
        count = sum(layer.out_features for layer in linears) // len(self.weight)
        parts = [
            (layer.weight.detach().float().chunk(count), layer.bias.detach().float().chunk(count)) for layer in linears
        ]
        weight = torch.cat([w[i] for i in range(count) for w, _ in parts])
        bias = torch.cat([b[i] for i in range(count) for _, b in parts])
        return weight, bias

    def at_times(self, emb: Tensor) -> tuple[Tensor, ...]:
        """emb [S, D] -> multiplier and addend [S, sum C] on the normalised h, or the offset [S, sum C] to h: float32,
        computed in the dtype of ``emb``."""
        rows = F.linear(F.silu(emb), *(v.to(emb.dtype) for v in self.time))
        if not self.scale_shift:
            return (rows.float(),)
        scale, shift = rows.chunk(2, dim=1)
        return (self.weight * (1 + scale)).float(), (self.bias * (1 + scale) + shift).float()

    @property
    def row_widths(self) -> list[int]:
        """Columns of what `at_times` returns."""
        return [self.width] * (2 if self.scale_shift else 1)

    def of_codes(self, emb_z: Tensor) -> tuple[Tensor, Tensor]:
        """emb_z [B, D] -> (1 + z_s) and z_b [B, sum C]: once per image."""
        scale, *shift = F.linear(F.silu(emb_z), *self.z).split(self.width, dim=1)
        return 1 + scale, shift[0] if shift else torch.zeros_like(scale)

    def affine(self, values: Sequence[Tensor], codes: tuple[Tensor, Tensor] | None = None) -> Affine:
        """Multiplier, addend and offset, each [1, sum C] or [B, sum C], from rows of `at_times` and from `of_codes`."""
        multiplier, addend, offset = (
            (*values, None) if self.scale_shift else (self.weight[None], self.bias[None], *values)
        )
        if codes is not None:
            scale, shift = codes
            if 1 < len(multiplier) < len(scale):  # several codes for every image
                multiplier, addend = (v.repeat(len(scale) // len(v), 1) for v in (multiplier, addend))
            multiplier, addend = scale * multiplier, scale * addend + shift
        return Affine(multiplier, addend, offset)


def time_embeddings(
    unet: UNet, times: Tensor, labels: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``dtype`` [S, time_width] for int64 times [S], and labels [S]; or [B, time_width] for one time and labels [B]."""
    first, _, second = unet.time_embed
    h = F.linear(time_features(unet.config, times).to(dtype), first.weight.to(dtype), first.bias.to(dtype))
    emb = F.linear(F.silu(h), second.weight.to(dtype), second.bias.to(dtype))
    return emb if labels is None else emb + unet.class_emb.weight.to(dtype)[labels]


def group_norm(x: Tensor, multiplier: Tensor, addend: Tensor, groups: int = NORM_GROUPS, eps: float = 1e-5) -> Tensor:
    """GN(x) * multiplier + addend in x's dtype and layout by PyTorch's operator, which knows one affine for all images;
    the affine float32 [1, C], or [B, C] for one an image."""
    own = len(multiplier) > 1
    weight, bias = (None, None) if own else (multiplier[0], addend[0])
    if x.device.type != "cpu" and not own:  # CUDA's operator takes them in the map's dtype alone
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if scalar_in_half(x, groups):
        y = F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)
    else:
        y = F.group_norm(x, groups, weight, bias, eps)
    if own:
        y = torch.addcmul(addend.to(x.dtype)[:, :, None, None], y, multiplier.to(x.dtype)[:, :, None, None])
    return y


def phase_weights(weight: Tensor) -> Tensor:
    """3x3 weights [O, I, 3, 3] -> those of the four 2x2 convolutions that nearest-2x followed by it amounts to.

    Result [2, 2, O, I, 2, 2], the first two indices the row and column parity of the output pixel. An even output row
    reads input rows y-1 and y with taps w0 and w1 + w2; an odd one rows y and y+1 with w0 + w1 and w2. 16 products a
    pixel pair instead of 36.
    """
    w = weight.double()
    rows = [
        torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2),
        torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2),
    ]
    both = [
        [torch.stack([r[..., 0], r[..., 1] + r[..., 2]], 3), torch.stack([r[..., 0] + r[..., 1], r[..., 2]], 3)]
        for r in rows
    ]
    return torch.stack([torch.stack(pair) for pair in both]).to(weight.dtype)


def upsample_conv(x: Tensor, convolutions: list[list[Convolution]]) -> Tensor:
    """conv3x3(nearest2x(x)) by phases; ``convolutions[py][px]`` is a 2x2 convolution with padding 1 on all sides."""
    B, _, H, W = x.shape
    out = None
    for py in (0, 1):
        for px in (0, 1):
            y = convolutions[py][px](x)  # [B, O, H + 1, W + 1]: the first row and column belong to the even phase
            if out is None:
                shape = (B, y.shape[1], 2 * H, 2 * W)
                out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
            out[:, :, py::2, px::2] = y[:, :, py : H + py, px : W + px]
    return out


def attend_rows(block: AttentionBlock, rows: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """The core of the attention block: [B, N, heads, C / heads] of the first product's rows [B, N, 3 C]."""
    B, N, width = rows.shape
    d = width // 3 // block.heads
    if block.new_order:
        q, k, v = rows.view(B, N, 3, block.heads, d).unbind(2)
    else:
        q, k, v = rows.view(B, N, block.heads, 3, d).unbind(3)
    return attend(q, k, v)


def attention_tokens(
    block: AttentionBlock,
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    attend: Callable[..., Tensor] = sdpa,
    projections: tuple[Convolution, Convolution] | None = None,
    in_place: bool = False,
) -> Tensor:
    """The attention block on channels-last maps, whose [B, H*W, C] tokens need no transpose; ``norm`` is its GN.

    ``projections`` are its two matrix products as 1x1 convolutions of maps; the second one adds its residual. With
    ``in_place`` the residual is x itself, used up, which has the second one's bias already.
    """
    B, C, H, W = x.shape
    maps = norm(x)
    if projections is None:
        tokens = maps.permute(0, 2, 3, 1).reshape(B, H * W, C)
        rows = F.linear(tokens, block.qkv.weight[:, :, 0], block.qkv.bias)
    else:
        rows = projections[0](maps).permute(0, 2, 3, 1).reshape(B, H * W, 3 * C)
    h = attend_rows(block, rows, attend).reshape(B, H, W, C)
    if in_place:
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)  # x itself where it is channels-last
        rows.addmm_(h.view(-1, C), block.proj_out.weight[:, :, 0].T)
        return rows.view(B, H, W, C).permute(0, 3, 1, 2)
    if projections is None:
        y = x + F.linear(h, block.proj_out.weight[:, :, 0], block.proj_out.bias).permute(0, 3, 1, 2)
    else:
        y = projections[1](h.permute(0, 3, 1, 2), x)
    return y if block.divisor == 1 else y / block.divisor
