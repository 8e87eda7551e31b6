"""A small CNN that learns from the features of a frozen diffusion model, and what may be read from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checkpoints
from ..config import UNetConfig
from ..errors import UserError
from ..student_config import GROUPS, StudentConfig
from .layers import HalfBlock, group_norm, zero_
from .pdae import _Pretrained

_NORMS = UNetConfig(norm_groups=GROUPS)  # the blocks read no more of it than its norms


class StudentTrunk(nn.Module):
    """images [B, C, S, S] in [-1, 1] -> the maps of all levels, the finest first.

    No BatchNorm: the trainer averages parameters, and running statistics would not follow them.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        widths = config.widths
        self.stem = nn.Conv2d(config.input_channel, widths[0], 3, stride=2, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            first = HalfBlock(_NORMS, widths[i - 1], width, "down") if i else HalfBlock(_NORMS, width, width)
            rest = (HalfBlock(_NORMS, width, width) for _ in range(2 * config.depth - 1))
            self.levels.append(nn.Sequential(first, *rest))

    def forward(self, images: Tensor) -> list[Tensor]:
        h, found = self.stem(images.to(self.stem.weight.dtype)), []
        for level in self.levels:
            h = level(h)
            found.append(h)
        return found


class Pyramid(nn.Module):
    """Maps of all levels -> as many, the deepest first, in which every finer one knows of the deeper ones.

    p_i = lateral_i(e_i) + up_i(nearest(p_(i+1))), two 1x1 convolutions, and a 3x3 block after each sum (after Lin et
    al., arXiv 1612.03144). The deepest map is passed on as it is.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        finer, below = config.widths[:-1], config.widths[1:]
        self.lateral = nn.ModuleList(nn.Conv2d(w, w, 1) for w in finer)
        self.up = nn.ModuleList(nn.Conv2d(d, w, 1) for w, d in zip(finer, below, strict=True))
        self.mix = nn.ModuleList(HalfBlock(_NORMS, w, w) for w in finer)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found = [maps[-1]]
        for i in reversed(range(len(self.lateral))):
            up = F.interpolate(self.up[i](found[-1]), scale_factor=2, mode="nearest")
            found.append(self.mix[i](self.lateral[i](maps[i]) + up))
        return found


class Head(nn.Module):
    """What is read from the maps of a student: ``classes`` from the mean of the deepest, ``points`` from the whole of
    it, ``parts`` pixel by pixel from all of the pyramid."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.kind, self.size, count = config.head, config.image_size, len(config.labels)
        width, side = config.widths[-1], config.sizes[-1]
        if self.kind == "parts":
            width, deeper = config.widths[0], config.widths[:0:-1]
            self.read: nn.Module = nn.Conv2d(width, count, 1)
            self.deeper = nn.ModuleList(
                nn.Sequential(group_norm(w, _NORMS), nn.SiLU(), zero_(nn.Conv2d(w, count, 1))) for w in deeper
            )
        elif self.kind == "points":
            self.read = zero_(nn.Linear(width * side * side, 2 * count))
        else:
            self.read = nn.Linear(width, count)
        self.norm = group_norm(width, _NORMS)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        h = F.silu(self.norm(maps[-1]))
        if self.kind == "parts":
            read = [self.read(h), *(read(m) for read, m in zip(self.deeper, maps[:-1], strict=True))]
            return sum(F.interpolate(r, size=(self.size, self.size), mode="bilinear") for r in read)
        if self.kind == "classes":
            return self.read(h.mean((2, 3)))
        # As shares of the image's side from its centre, where the weights know nothing yet.
        return (0.5 + self.read(h.flatten(1)).unflatten(1, (-1, 2))) * self.size


class Student(_Pretrained):
    """A small network to run in place of a diffusion model's features, or what was read from it with few labels."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = StudentTrunk(config)
        self.pyramid = Pyramid(config)
        self.head = Head(config) if config.head else None

    def maps(self, images: Tensor, levels: int | None = None) -> tuple[Tensor, ...]:
        """The first ``levels`` maps (None: all), the deepest first; only what they need is computed."""
        found = self.trunk(images)
        return (found[-1],) if levels == 1 else tuple(self.pyramid(found)[:levels])

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, S, S] in [-1, 1] -> what the head reads: logits [B, n] of classes, logits [B, n, S, S] of
        parts, or n points [B, n, 2] as (x, y) in pixels from the outer corner of the first one."""
        if self.head is None:
            raise UserError("this student has no head; give it one with `python -m pdae_fast.train recognise`")
        return self.head(self.maps(images, None if self.config.head == "parts" else 1))

    @torch.inference_mode()
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, C, S, S] in [-1, 1] -> float32 maps [B, C', s, s], the deepest first (that which stands for the
        teacher's middle block), each of twice the side of the one before."""
        return self.maps(self._checked(images))

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """images [B, C, S, S] in [-1, 1] -> probabilities [B, n] of the classes, the part int64 [B, S, S] of every
        pixel, or points [B, n, 2] as (x, y) in pixels; ``config.labels`` names them. UserError without a head, and for
        images of another shape."""
        out = self(self._checked(images))
        if self.config.head == "classes":
            return out.softmax(1)
        return out.argmax(1) if self.config.head == "parts" else out

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UserError(f"images have shape {list(images.shape)}; this student expects [B, {expected}]")
        weights = self.trunk.stem.weight
        return images.to(weights.device, weights.dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.input_channel, self.config.image_size, self.config.image_size

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> Any:
        if not isinstance(loaded.config, StudentConfig):
            raise UserError(
                f"{loaded.origin} is no student; expected what `python -m pdae_fast.train student` or recognise saved"
            )
        return loaded.config
