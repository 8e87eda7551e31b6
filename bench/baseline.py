"""The opponent: the published computation of one autoencoding step, eager float32 NCHW, same sequence of operators.

Written from the formulas: every network evaluation recomputes the time embedding and all projections, AdaGN is two
separate multiply-adds, attention is two einsums around a softmax with the fourth root of the scale on q and on k, and
the DDIM update is a chain of element-wise operators on gathered coefficients.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from pdae_fast import PDAE
from pdae_fast.models.layers import AttentionBlock
from pdae_fast.schedule import build_schedule


class EinsumAttention(AttentionBlock):
    """The attention of the published networks: explicit weights instead of a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        rows = self.qkv(self.norm(x.reshape(B, C, -1)))
        d = C // self.heads
        if self.new_order:
            q, k, v = (r.reshape(B * self.heads, d, -1) for r in rows.chunk(3, dim=1))
        else:
            q, k, v = rows.reshape(B * self.heads, 3 * d, -1).split(d, dim=1)
        scale = 1 / math.sqrt(math.sqrt(d))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1).type(rows.dtype)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(B, C, -1)
        return (x.reshape(B, C, -1) + self.proj_out(h)).reshape(B, C, H, W)


class Baseline:
    """``step(x, t, t_next, z)``: one DDIM step conditioned on z, as the published code computes it."""

    def __init__(self, model: PDAE) -> None:
        self.decoder = copy.deepcopy(model.decoder).eval()
        for module in self.decoder.modules():
            if isinstance(module, AttentionBlock):
                module.__class__ = EinsumAttention
        self.alpha_bar = torch.from_numpy(build_schedule(model.config.schedule).alpha_bar.copy())

    def _gather(self, values: Tensor, t: Tensor) -> Tensor:
        return values[t].float()[:, None, None, None]

    @torch.no_grad()
    def step(self, x: Tensor, t: int, t_next: int, z: Tensor) -> Tensor:
        now = torch.full((len(x),), t, dtype=torch.int64)
        following = torch.full((len(x),), t_next, dtype=torch.int64)
        eps, gradient = self.decoder(x, now, z)
        a = self.alpha_bar
        eps = eps - self._gather((1 - a).sqrt(), now) * gradient
        x0 = self._gather(a.rsqrt(), now) * x - self._gather((1 / a - 1).sqrt(), now) * eps
        x0 = x0.clamp(-1, 1)
        eps = (self._gather(a.rsqrt(), now) * x - x0) / self._gather((1 / a - 1).sqrt(), now)
        return self._gather(a.sqrt(), following) * x0 + self._gather((1 - a).sqrt(), following) * eps
