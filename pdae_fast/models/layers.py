"""Building blocks of the ADM U-Net; parameter names are those of guided-diffusion, Diff-AE and PDAE files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS, UNetConfig


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoid [cos(t f), sin(t f)], f_i = max_period^(-i / (dim/2)); t [B] -> float32 [B, dim], cosine first."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-5)


def zero_(module: nn.Module) -> nn.Module:
    """Fill ``module``'s parameters with zeros: the block then starts as the identity (or G as 0)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """BigGAN-style residual block with adaptive group norm.

    h = Conv3(SiLU(GN(x))); h = GN(h) (1 + s_t) + b_t; for G also h = (1 + s_z) h + b_z (time first, then z);
    out = skip(x) + Conv3(Dropout(SiLU(h))). ``resample`` is "down" (2x average pooling) or "up" (2x nearest) and acts
    after the first SiLU on the branch and on the residual alike.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_channel: int,
        dropout: float = 0.0,
        resample: str | None = None,
        with_z: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channel, 2 * out_channels))
        self.emb_z_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channel, 2 * out_channels)) if with_z else None
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
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
        """x [B, C, H, W], emb and emb_z [B, time_channel] -> [B, out_channels, H', W']."""
        h = self.in_layers[2](self._resample(self._norm_in(x)))
        h = self._norm_out(h, emb, emb_z)
        return self.skip_connection(self._resample(x)) + self.out_layers[2:](h)

    def _norm_in(self, x: Tensor) -> Tensor:
        """SiLU(GN(x))."""
        norm, act, _ = self.in_layers
        return act(norm(x))

    def _norm_out(self, h: Tensor, emb: Tensor, emb_z: Tensor | None) -> Tensor:
        """SiLU of the adaptive norm of h."""
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        if self.emb_z_layers is not None:
            scale_z, shift_z = self.emb_z_layers(emb_z)[:, :, None, None].chunk(2, dim=1)
            h = (1 + scale_z) * h + shift_z
        return self.out_layers[1](h)


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(GN(x)))) over H*W tokens.

    The 3C rows of qkv are read as [heads, (q, k, v), head_dim] (legacy, ``new_order`` False) or as
    [(q, k, v), heads, head_dim].
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = group_norm(channels)
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
        return x + h.reshape(B, C, H, W)


class Stage(nn.Sequential):
    """A sequence whose ResBlocks also receive the embeddings."""

    def forward(self, x: Tensor, emb: Tensor | None = None, emb_z: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, emb, emb_z) if isinstance(layer, ResBlock) else layer(x)
        return x


def attention(config: UNetConfig, channels: int) -> AttentionBlock:
    return AttentionBlock(channels, config.heads(channels), config.use_new_attention_order)
