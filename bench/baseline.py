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
    """``step(x, t, t_next, z)``: one DDIM step conditioned on z, as the published code computes it, on ``device``.

    On CUDA the framework's defaults hold, as in the published scripts: convolutions may round to TF32.
    """

    def __init__(self, model: PDAE, device: torch.device | str = "cpu") -> None:
        self.decoder = copy.deepcopy(model.decoder).eval().to(device)
        for module in self.decoder.modules():
            if isinstance(module, AttentionBlock):
                module.__class__ = EinsumAttention
        self.alpha_bar = torch.from_numpy(build_schedule(model.config.schedule).alpha_bar.copy())
        a = self.alpha_bar
        tables = a.sqrt(), (1 - a).sqrt(), a.rsqrt(), (1 / a - 1).sqrt()
        self.tables = tuple(table.to(device) for table in tables)

    def _gather(self, values: Tensor, t: Tensor) -> Tensor:
        return values[t].float()[:, None, None, None]

    @torch.no_grad()
    def step(self, x: Tensor, t: int, t_next: int, z: Tensor) -> Tensor:
        now = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        following = torch.full((len(x),), t_next, dtype=torch.int64, device=x.device)
        return self.advance(x, now, following, z)

    def advance(self, x: Tensor, now: Tensor, following: Tensor, z: Tensor) -> Tensor:
        """``step`` for int64 time points [B]."""
        signal, noise, reciprocal, ratio = self.tables
        eps, gradient = self.decoder(x, now, z)
        eps = eps - self._gather(noise, now) * gradient
        x0 = self._gather(reciprocal, now) * x - self._gather(ratio, now) * eps
        x0 = x0.clamp(-1, 1)
        eps = (self._gather(reciprocal, now) * x - x0) / self._gather(ratio, now)
        return self._gather(signal, following) * x0 + self._gather(noise, following) * eps
