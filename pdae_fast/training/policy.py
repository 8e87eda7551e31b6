"""Which time of the teacher to learn from: RepFusion's policy (arXiv 2308.10916), a contextual bandit over K times.

A policy pi(t | x) sees the image; a decoder g reads the task from the teacher's feature at the chosen time, and its
negative loss is the reward. Published is REINFORCE: a time is drawn, and log pi of it weighed by its reward. But the
teacher is frozen and sees the clean image, so the rewards of all K times are known, and the gradient of the expected
reward sum_k pi_k R_k is exact without a draw: ``exact``, whose noisy estimate REINFORCE is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers import zero_

ESTIMATORS = ("exact", "reinforce")
SIDE = 4  # maps are averaged to it before a decoder reads points from them


class Policy(nn.Module):
    """images [B, C, S, S] -> logits [B, K] of a categorical distribution over times.

    Published for 32 px: 5x5 convolutions to 6 and 16 channels, each with ReLU and 2x2 max-pooling, then 120, 84 and K.
    Other sizes are averaged to the same 5x5 before the linear layers. The last layer starts at zero: all times alike.
    """

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(5),
        )  # fmt: skip
        self.decide = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), zero_(nn.Linear(84, times))
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.decide(self.see(images.to(self.see[0].weight.dtype)))


class Decoder(nn.Module):
    """g: a teacher's levels, each [N, C, h, w], the deepest first -> what a task asks of them.

    classes: logits [N, n] by an MLP of three layers on spatial means (published). points: [N, n, 2] in shares of the
    image's side, linear in the deepest level averaged to 4x4. parts: logits [N, n, h, w] at the side of the finest
    level, linear in the pixels of all levels.
    """

    def __init__(self, task: str, shapes: Sequence[Sequence[int]], outputs: int) -> None:
        super().__init__()
        self.task, widths = task, [shape[0] for shape in shapes]
        if task == "classes":
            d = sum(widths)
            self.read: nn.Module = nn.Sequential(
                nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, outputs)
            )
        elif task == "points":
            self.read = zero_(nn.Linear(widths[0] * SIDE * SIDE, 2 * outputs))
        else:
            self.read = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in widths)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        if self.task == "classes":
            return self.read(torch.cat([level.mean((2, 3)) for level in levels], 1))
        if self.task == "points":
            flat = F.adaptive_avg_pool2d(levels[0], SIDE).flatten(1)
            # Adam moves every weight alike: of so many inputs a first step would overshoot by far.
            return 0.5 + self.read(flat / flat.shape[1] ** 0.5).unflatten(1, (-1, 2))
        size = levels[-1].shape[2:]
        found = (read(level) for read, level in zip(self.read, levels, strict=True))
        return sum(F.interpolate(v, size=size, mode="bilinear") for v in found)


def pick(logits: Tensor, u: Tensor) -> Tensor:
    """The times int64 [B] that u [B], uniform on [0, 1), draws from the distributions of logits [B, K]."""
    below = logits.softmax(1).cumsum(1) <= u[:, None]
    return below.sum(1).clamp(max=logits.shape[1] - 1)


def exact(logits: Tensor, rewards: Tensor) -> Tensor:
    """-mean_i sum_k pi_k(x_i) R_ik, of logits and rewards [B, K]; a scalar."""
    return -(logits.softmax(1) * rewards).sum(1).mean()


def reinforce(logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """-mean_i log pi(a_i | x_i) R_i of actions int64 [B] and their rewards [B]; a scalar. Without a baseline, as
    published; its mean gradient over the actions is that of `exact`."""
    return -(logits.log_softmax(1).gather(1, actions[:, None])[:, 0] * rewards).mean()


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of pi in nats; a scalar."""
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


def bonus(start: float, passes: Tensor, total: int) -> Tensor:
    """The weight of the entropy: from ``start`` linearly to 0 over the first half of ``total`` passes (published: 100
    of 200 epochs)."""
    return start * (1 - 2 * passes / max(total, 1)).clamp(min=0)
