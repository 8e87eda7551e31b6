"""Networks that live on z: the latent DPM's MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LatentConfig
from .layers import timestep_embedding

TIME_WIDTH = 64


class _Layer(nn.Module):
    def __init__(self, width: int, out: int, cond: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.linear_emb = nn.Linear(cond, out)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.linear(x) * (1 + self.linear_emb(nn.functional.silu(cond)))
        return nn.functional.silu(self.norm(h))


class _Last(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.linear(x)


class LatentMLP(nn.Module):
    """eps on latents: z_t [B, D], t int64 [B] -> eps [B, D]; every layer after the first reads cat(h, z_t)."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        D, H, N = config.latent_dim, config.hidden, config.layers
        self.time_embed = nn.Sequential(nn.Linear(TIME_WIDTH, D), nn.SiLU(), nn.Linear(D, D))
        self.layers = nn.ModuleList([_Layer(D if i == 0 else H + D, H, D) for i in range(N - 1)] + [_Last(H + D, D)])

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        dtype = self.time_embed[0].weight.dtype
        z_t = z_t.to(dtype)
        cond = self.time_embed(timestep_embedding(t, TIME_WIDTH).to(dtype))
        h = z_t
        for i, layer in enumerate(self.layers):
            h = layer(h if i == 0 else torch.cat([h, z_t], dim=1), cond)
        return h
