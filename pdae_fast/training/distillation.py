"""What a student is told of its teacher: losses between their maps, and the projections that make them comparable.

The losses are those of RepFusion (arXiv 2308.10916): ``pooled`` is its L2 hint, ``attention`` is attention transfer
(Zagoruyko and Komodakis, 1612.03928) and ``relations`` relational distillation (Park et al., 1904.05068). ``dense``
compares the maps themselves, the teacher's standardised channel by channel, and ``dense+attention`` adds attention, as
in DreamTeacher (2307.07487). All take two lists of maps [B, C, h, w], the student's h and the teacher's z; a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import Student

ATTENTION_WEIGHT = 1000.0  # alone, as published; beside dense a tenth of it
DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
SPATIAL = 4  # a code is read from the student's map averaged to this side

Levels = Sequence[Tensor]


def dense(h: Levels, z: Levels) -> Tensor:
    """Mean squared difference of a map, mean over the levels; z: standardised."""
    return torch.stack([F.mse_loss(a, b) for a, b in zip(h, z, strict=True)]).mean()


def pooled(h: Levels, z: Levels) -> Tensor:
    """Mean squared difference of the maps' spatial means."""
    return torch.stack([F.mse_loss(a.mean((2, 3)), b.mean((2, 3))) for a, b in zip(h, z, strict=True)]).mean()


def attention(h: Levels, z: Levels) -> Tensor:
    """1000 times the mean squared difference of the two maps sum_c x_c^2, each divided by its norm over space."""

    def where(x: Tensor) -> Tensor:
        energy = x.square().sum(1).flatten(1)
        return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)

    return ATTENTION_WEIGHT * torch.stack([F.mse_loss(where(a), where(b)) for a, b in zip(h, z, strict=True)]).mean()


def dense_attention(h: Levels, z: Levels) -> Tensor:
    """`dense` plus a tenth of `attention`."""
    return dense(h, z) + 0.1 * attention(h, z)


def relations(h: Levels, z: Levels) -> Tensor:
    """25 times the smooth L1 difference of the images' distances, each set divided by the mean of its positive ones,
    plus 50 times that of the cosines of the angles in all triples of images; of spatial means, mean over the levels."""
    found = []
    for a, b in zip(h, z, strict=True):
        (d, angle), (d_z, angle_z) = (_relations(x.mean((2, 3))) for x in (a, b))
        found.append(DISTANCE_WEIGHT * F.smooth_l1_loss(d, d_z) + ANGLE_WEIGHT * F.smooth_l1_loss(angle, angle_z))
    return torch.stack(found).mean()


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [B, D]: scaled distances [B, B], and cosines [B, B, B] of the angles at the first image."""
    apart = x[None] - x[:, None]
    # The root's gradient at 0, of an image and itself, would be NaN.
    square = apart.square().sum(2)
    same = square == 0
    distance = square.masked_fill(same, 1).sqrt().masked_fill(same, 0)
    scaled = distance / distance.sum().div((~same).sum().clamp(min=1)).clamp(min=1e-12)
    unit = apart / distance.masked_fill(same, 1)[..., None]
    return scaled, torch.einsum("ijd,ikd->ijk", unit, unit)


class Loss(NamedTuple):
    """``projected``: the student's maps pass a 1x1 convolution to the teacher's width; ``standardised``: the teacher's
    channels have mean 0 and variance 1."""

    compare: Callable[[Levels, Levels], Tensor]
    projected: bool
    standardised: bool


LOSSES = {
    "dense": Loss(dense, True, True),
    "dense+attention": Loss(dense_attention, True, True),
    "pooled": Loss(pooled, True, False),
    "attention": Loss(attention, False, False),
    "relations": Loss(relations, False, False),
}


class Projection(nn.Module):
    """A student's map [B, C, h, w] -> the teacher's [B, D, h', w'], resized bilinearly where the sides differ.

    With ``times`` above 1 the result is scaled and shifted by what is learned for each of them: the student sees a
    clean image and says nothing of t. A target of one pixel, a code, is read from the map averaged to 4x4.
    """

    def __init__(self, channels: int, shape: Sequence[int], times: int = 1) -> None:
        super().__init__()
        D, *self.size = shape
        self.code = self.size == [1, 1]
        self.read = nn.Conv2d(channels, D, SPATIAL if self.code else 1)
        self.at = nn.Embedding(times, 2 * D) if times > 1 else None
        if self.at is not None:
            nn.init.zeros_(self.at.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.read(F.adaptive_avg_pool2d(h, SPATIAL)) if self.code else resized(self.read(h), self.size)

    def told(self, h: Tensor, k: int) -> Tensor:
        """The result of `forward` as it is at time number ``k``."""
        if self.at is None:
            return h
        scale, shift = self.at.weight[k].chunk(2)
        return h * (1 + scale[:, None, None]) + shift[:, None, None]


def resized(h: Tensor, size: Sequence[int]) -> Tensor:
    return h if list(h.shape[2:]) == list(size) else F.interpolate(h, size=tuple(size), mode="bilinear")


class Distiller(nn.Module):
    """A student and what is thrown away after distillation: projections, and of a policy what `policy` makes.

    shapes: [C, h, w] of the teacher's levels, the deepest first. statistics: mean and standard deviation [K, C] of each
    level at each of K times. told: heads are told the time (``--choose all``).
    """

    def __init__(
        self,
        student: Student,
        shapes: Sequence[Sequence[int]],
        statistics: Sequence[tuple[Tensor, Tensor]],
        loss: str = "dense",
        told: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.loss, self.sizes = student, LOSSES[loss], [list(shape[1:]) for shape in shapes]
        times, widths = len(statistics[0][0]), [*reversed(student.config.widths)]
        self.projections = nn.ModuleList(
            Projection(width, shape, times if told else 1) for width, shape in zip(widths, shapes, strict=False)
        )
        if not self.loss.projected:
            self.projections = nn.ModuleList()
        for i, (mean, std) in enumerate(statistics):
            self.register_buffer(f"mean{i}", mean[..., None, None])
            self.register_buffer(f"std{i}", std.clamp(min=1e-6)[..., None, None])
        # What no loss reaches is not trained: the optimiser has moments of all that is, or of nothing.
        student.pyramid.requires_grad_(len(shapes) > 1)
        if len(shapes) > 1:
            for part in (student.pyramid.lateral, student.pyramid.up, student.pyramid.mix):
                for i, module in enumerate(reversed(part)):
                    module.requires_grad_(i + 1 < len(shapes))

    def predict(self, images: Tensor) -> list[Tensor]:
        """The student's levels as they are compared, before they are told a time."""
        maps = self.student.maps(images, len(self.sizes))
        if not self.projections:
            return [resized(h, size) for h, size in zip(maps, self.sizes, strict=True)]
        return [read(h) for read, h in zip(self.projections, maps, strict=True)]

    def compare(self, h: Levels, z: Levels, k: int | Tensor) -> Tensor:
        """The loss against the teacher's levels z at time number ``k``, one for all images or int64 [B]."""
        if self.projections and isinstance(k, int):
            h = [read.told(a, k) for read, a in zip(self.projections, h, strict=True)]
        z = [v.to(a.dtype) for a, v in zip(h, z, strict=True)]
        if self.loss.standardised:
            z = [(v - getattr(self, f"mean{i}")[k]) / getattr(self, f"std{i}")[k] for i, v in enumerate(z)]
        return self.loss.compare(h, z)
