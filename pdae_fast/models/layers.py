"""Building blocks of the ADM U-Net; parameter names are those of guided-diffusion, Diff-AE and PDAE files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS, UNetConfig


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, shift: float = 0, sine_first: bool = False
) -> Tensor:
    """Sinusoid [cos(t f), sin(t f)], f_i = max_period^(-i / (dim/2 - shift)); t [B] -> float32 [B, dim].

    The cosine comes first unless ``sine_first``.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) / (half - shift) * index)
    waves = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
    return F.pad(torch.cat(waves, dim=-1), (0, dim - 2 * half))


def time_features(config: UNetConfig, t: Tensor) -> Tensor:
    """The sinusoid that a U-Net's time_embed reads: t int64 [B] -> float32 [B, base_channel]."""
    t = t if config.time_scale == 1 else t.float() * config.time_scale
    return timestep_embedding(t, config.base_channel, shift=config.freq_shift, sine_first=not config.flip_sin_to_cos)


def group_norm(channels: int, config: UNetConfig | None = None) -> nn.GroupNorm:
    """The norm of a U-Net of ``config``; None: of E_phi."""
    groups, eps = (NORM_GROUPS, 1e-5) if config is None else (config.norm_groups, config.norm_eps)
    return nn.GroupNorm(min(groups, channels), channels, eps=eps)


def zero_(module: nn.Module) -> nn.Module:
    """Fill ``module``'s parameters with zeros: the block then starts as the identity (or G as 0)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """BigGAN-style residual block with adaptive group norm.

    h = Conv3(SiLU(GN(x))); h = GN(h) (1 + s_t) + b_t, or GN(h + b_t) without ``use_scale_shift_norm``; with ``z_width``
    also h = (1 + s_z) h + b_z (time first, then z; no b_z without ``z_shift``, as in Diff-AE);
    out = (skip(x) + Conv3(Dropout(SiLU(h)))) / ``divisor``. ``resample`` is "down" (2x average pooling) or "up" (2x
    nearest) and acts after the first SiLU on the branch and on the residual alike.
    """

    def __init__(
        self,
        config: UNetConfig,
        channels: int,
        out_channels: int,
        resample: str | None = None,
        z_width: int | None = None,
        z_shift: bool = True,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample, self.divisor, self.scale_shift = resample, divisor, config.use_scale_shift_norm
        rows = 2 * out_channels if self.scale_shift else out_channels
        rows_z = 2 * out_channels if z_shift else out_channels
        self.in_layers = nn.Sequential(
            group_norm(channels, config), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.time_width, rows))
        self.emb_z_layers = None if z_width is None else nn.Sequential(nn.SiLU(), nn.Linear(z_width, rows_z))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, config),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor, emb_z: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, time_width] and emb_z [B, z_width] -> [B, out_channels, H', W']."""
        h = self.in_layers[2](self._resample(self._norm_in(x)))
        h = self._norm_out(h, emb, emb_z)
        out = self.skip_connection(self._resample(x)) + self.out_layers[2:](h)
        return out if self.divisor == 1 else out / self.divisor

    def _norm_in(self, x: Tensor) -> Tensor:
        """SiLU(GN(x))."""
        norm, act, _ = self.in_layers
        return act(norm(x))

    def _norm_out(self, h: Tensor, emb: Tensor, emb_z: Tensor | None) -> Tensor:
        """SiLU of the adaptive norm of h."""
        norm, act = self.out_layers[:2]
        rows = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = rows.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + rows)
        if self.emb_z_layers is not None:
            scale_z, *shift_z = self.emb_z_layers(emb_z)[:, :, None, None].split(h.shape[1], dim=1)
            h = (1 + scale_z) * h
            h = h + shift_z[0] if shift_z else h
        return act(h)


class HalfBlock(nn.Module):
    """The first half of a ResBlock, which neither time nor z reaches: (skip(x) + Conv3(SiLU(GN(x)))) / ``divisor``.

    ``resample`` "down" acts as in ResBlock.
    """

    def __init__(
        self, config: UNetConfig, channels: int, out_channels: int, resample: str | None = None, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if resample == "down" else nn.Identity()
        self.divisor = divisor
        self.in_layers = nn.Sequential(
            group_norm(channels, config), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        out = self.skip_connection(self.pool(x)) + conv(self.pool(act(norm(x))))
        return out if self.divisor == 1 else out / self.divisor


class AttentionBlock(nn.Module):
    """(x + proj(attention(qkv(GN(x))))) / divisor over H*W tokens.

    The 3C rows of qkv are read as [heads, (q, k, v), head_dim] (legacy, ``new_order`` False) or as
    [(q, k, v), heads, head_dim]. ``norm`` is a GroupNorm, or an Identity.
    """

    def __init__(
        self, channels: int, heads: int, norm: nn.Module, new_order: bool = False, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.new_order, self.divisor = heads, new_order, divisor
        self.norm = norm
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_(nn.Conv1d(channels, channels, 1))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3C, N] -> q, k, v, each [B, heads, N, head_dim]."""
        B, width, N = qkv.shape
        shape = (B, 3, self.heads, -1, N) if self.new_order else (B, self.heads, 3, width // (3 * self.heads), N)
        q, k, v = qkv.reshape(shape).unbind(1 if self.new_order else 2)
        return q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.split_heads(self.qkv(self.norm(x).reshape(B, C, H * W)))
        # Scaling q and k by head_dim^-1/4 each equals scaling the logits by head_dim^-1/2.
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj_out(h.transpose(-1, -2).reshape(B, C, H * W))
        out = x + h.reshape(B, C, H, W)
        return out if self.divisor == 1 else out / self.divisor


class Downsample(nn.Module):
    """Half the resolution by ``kind``, one of config.DOWNSAMPLES but "residual"."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "pool":
            self.op = nn.AvgPool2d(2)
        else:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if kind == "conv" else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.kind == "conv_asymmetric" else x)


class Upsample(nn.Module):
    """Twice the resolution: nearest, then a 3x3 convolution where ``kind`` is "conv"."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if kind == "conv" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """A sequence whose ResBlocks also receive the embeddings."""

    def forward(self, x: Tensor, emb: Tensor | None = None, emb_z: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, emb, emb_z) if isinstance(layer, ResBlock) else layer(x)
        return x


def attention(config: UNetConfig, channels: int, output: bool = False) -> AttentionBlock:
    """The attention block of a level of the input half, or of the output half."""
    heads = config.heads(channels, output)
    return AttentionBlock(channels, heads, group_norm(channels, config), config.use_new_attention_order)
