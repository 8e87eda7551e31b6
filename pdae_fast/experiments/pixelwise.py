"""What a linear classifier of every pixel reads from maps: parts of images from a few labelled ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKAGE = 0.01  # of the covariance, towards that of independent features
MOST_ROWS = 64  # of an image's pixels in learning, both ways: neighbours say the same


def enlarged(maps: Tensor, size: int) -> Tensor:
    """``maps`` [B, C, h, w] bilinearly enlarged (or reduced) to [B, C, size, size]."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def patches(images: Tensor, side: int = 7) -> Tensor:
    """The pixels around every pixel, side x side of them, and its place: [B, C side^2 + 2, H, W] of [B, C, H, W]."""
    B, _, H, W = images.shape
    padded = F.pad(images, (side // 2,) * 4, mode="replicate")
    around = F.unfold(padded, side).view(B, -1, H, W)
    place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij"))
    return torch.cat([around, place.expand(B, -1, -1, -1)], dim=1)


class Discriminant:
    """Linear discriminant analysis of pixels (Fisher 1936; one covariance for all classes, class frequencies as
    priors): in closed form and from sums alone, so that maps may come in any number of batches.

    One pass serves every subset of the maps that it was shown side by side. ``classes``: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.shift: Tensor | None = None  # about which sums are taken, against cancellation

    def learn(self, levels: Sequence[Tensor], masks: Tensor) -> None:
        """Add labelled images: levels of [B, C, h, w], masks int64 [B, H, H]."""
        side = masks.shape[-1]
        step = -(-side // MOST_ROWS)
        labels = masks[:, step // 2 :: step, step // 2 :: step].flatten()
        pixels = [enlarged(level, side)[:, :, step // 2 :: step, step // 2 :: step] for level in levels]
        rows = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in pixels], dim=1)
        if self.shift is None:
            self.shift = rows.mean(0)
            width, ends = rows.shape[1], np.cumsum([level.shape[1] for level in levels])
            self.columns = [range(end - level.shape[1], end) for end, level in zip(ends, levels, strict=True)]
            self.sums = torch.zeros(len(self.counts), width, dtype=torch.float64)
            self.products = torch.zeros(width, width, dtype=torch.float64)
        rows = rows - self.shift
        kinds = F.one_hot(labels, len(self.counts)).to(rows.dtype)
        self.counts += kinds.sum(0, dtype=torch.float64)
        self.sums += (kinds.T @ rows).double()
        self.products += (rows.T @ rows).double()

    def solve(self, which: Sequence[int]) -> Linear:
        """The classifier that reads the levels ``which``."""
        places = torch.tensor([c for level in which for c in self.columns[level]])
        seen = self.counts > 0
        counts, sums = self.counts[seen], self.sums[seen][:, places]
        means, total = sums / counts[:, None], counts.sum()
        within = self.products[places][:, places] - sums.T @ means
        mean = sums.sum(0) / total
        spread = ((self.products.diagonal()[places] / total - mean**2).clamp_min(0)).sqrt()
        spread[spread < 1e-6 * spread.max()] = float("inf")  # a constant tells nothing
        within = within / total / spread[:, None] / spread
        width = len(places)
        level = float(within.diagonal().mean())
        within = (1 - SHRINKAGE) * within + SHRINKAGE * max(level, 1e-12) * torch.eye(width, dtype=torch.float64)
        scaled = means / spread
        weights = torch.linalg.solve(within, scaled.T).T
        bias = (counts / total).log() - 0.5 * (weights * scaled).sum(1)
        weights = weights / spread
        bias = bias - weights @ self.shift[places].double()
        parts = weights.float().split([len(self.columns[level]) for level in which], dim=1)
        return Linear(tuple(which), parts, bias.float(), seen.nonzero()[:, 0])


class Linear:
    """A linear classifier of pixels; ``parts``: its weights [K, C] of each level, ``kinds`` [K] its classes."""

    def __init__(self, which: tuple[int, ...], parts: Sequence[Tensor], bias: Tensor, kinds: Tensor) -> None:
        self.which, self.parts, self.bias, self.kinds = which, parts, bias, kinds

    def __call__(self, levels: Sequence[Tensor], size: int) -> Tensor:
        """The class int64 [B, size, size] of every pixel. A linear map of enlarged maps is the enlarged linear map."""
        scores = self.bias[:, None, None]
        for level, weights in zip(self.which, self.parts, strict=True):
            scores = scores + enlarged(torch.einsum("kc,bchw->bkhw", weights, levels[level]), size)
        return self.kinds[scores.argmax(1)]


def confusion(found: Tensor, masks: Tensor, classes: int) -> np.ndarray:
    """int64 [B, classes, classes]: pixels of each image by their class and by the one that was found."""
    pairs = (masks * classes + found).flatten(1)
    return torch.stack([torch.bincount(row, minlength=classes**2) for row in pairs]).view(-1, classes, classes).numpy()
