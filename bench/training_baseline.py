"""The opponent of the trainer: the published training loop of mean-shift training, eager float32 NCHW.

Written from SPEC section 2 and the published settings: Adam over the trained weights in a loop, EMA in a loop over all
of them, the published attention, and the loss read after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from pdae_fast import PDAE
from pdae_fast.models.layers import AttentionBlock
from pdae_fast.schedule import build_schedule
from pdae_fast.training.feed import step_generator

from .baseline import EinsumAttention

LR, DECAY = 1e-4, 0.9999


class PublishedTraining:
    """``step(batches)``: one step of Algorithm 1 on the next batch of images [B, C, H, W] in [-1, 1], on the CPU.

    Noise, t and flips are the trainer's own for the same seed, so that losses can be compared; everything else is
    computed as published. On CUDA the framework's defaults hold.
    """

    def __init__(self, model: PDAE, device: torch.device, seed: int) -> None:
        self.model = copy.deepcopy(model).to(device)
        for module in self.model.modules():
            if isinstance(module, AttentionBlock):
                module.__class__ = EinsumAttention
        self.device, self.seed, self.n = device, seed, 0
        self.model.eval().requires_grad_(False)  # the bench's networks have no dropout
        self.trained = [*self.model.encoder.parameters(), *self.model.decoder.trained_parameters()]
        for parameter in self.trained:
            parameter.requires_grad_(True)
        self.average = [p.detach().clone() for p in self.trained]
        self.optimizer = torch.optim.Adam(self.trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, foreach=False)
        schedule = build_schedule(model.config.schedule)
        a = torch.from_numpy(schedule.alpha_bar.copy())
        before, alpha = torch.from_numpy(schedule.alpha_bar_prev.copy()), torch.from_numpy(schedule.alpha.copy())
        snr = a / (1 - a)
        tables = a.sqrt(), (1 - a).sqrt(), -alpha.sqrt() * (1 - before) / (1 - a).sqrt(), snr**0.1 / (1 + snr)
        self.tables = tuple(table.to(device) for table in tables)

    def step(self, batches: Iterator[Tensor]) -> float:
        images = next(batches)
        generator = step_generator(self.seed, self.n)
        t = torch.randint(0, len(self.tables[0]), (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        x0, t, noise = (v.to(self.device) for v in (images, t, noise))
        signal, spread, shift, weight = (table[t].float()[:, None, None, None] for table in self.tables)
        eps, gradient = self.model(signal * x0 + spread * noise, t, self.model.encode(x0))
        loss = (weight * (noise - (eps + shift * gradient)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = min(DECAY, (1 + self.n) / (10 + self.n))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.trained, strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
        self.n += 1
        return loss.item()
