"""What a network says of images on its way to eps: the maps of its middle block and of its first output blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import as_indices, as_int
from ..errors import UserError
from ..models.unet import UNet

COUNTER = "eps_until_"  # the name of a decoder that stopped, less the output blocks that ran


@dataclass(frozen=True, eq=False)
class Maps:
    """Features of B images: ``middle`` [B, C, h, w] and ``outputs``, the maps of the output blocks that were asked for,
    in their order; float32."""

    middle: Tensor
    outputs: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.middle)

    @property
    def levels(self) -> tuple[Tensor, ...]:
        """All maps, the middle block's first."""
        return (self.middle, *self.outputs)

    def pooled(self, size: int = 1) -> Tensor:
        """[B, sum of C, size, size]: every level averaged over areas (adaptive average pooling), side by side."""
        size = as_int("size", size, 1)
        return torch.cat([F.adaptive_avg_pool2d(level, size) for level in self.levels], dim=1)

    @classmethod
    def of(cls, levels: Iterable[Tensor]) -> Maps:
        """From `levels`."""
        middle, *outputs = levels
        return cls(middle, tuple(outputs))

    @classmethod
    def cat(cls, parts: Sequence[Maps]) -> Maps:
        """Those of one batch after the other, on the CPU."""
        return cls.of(torch.cat([v.cpu() for v in same]) for same in zip(*(p.levels for p in parts), strict=True))


def separate(level: Tensor) -> Tensor:
    """``level`` in float32 and in memory of its own, which nothing that runs later writes to."""
    return level.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def no_maps(unet: UNet, image_size: int, outputs: int) -> Maps:
    """The features of no images."""
    shapes = level_shapes(unet, image_size)[: outputs + 1]
    return Maps.of(torch.empty(0, *shape, dtype=torch.float32) for shape in shapes)


def level_shapes(unet: UNet, image_size: int) -> list[tuple[int, int, int]]:
    """(C, h, w) of the middle block and of every output block, outermost last."""
    config = unet.config
    side = image_size >> (config.levels - 1)
    shapes = [(config.widths[-1], side, side)]
    for level, width in reversed(list(enumerate(config.widths))):
        for i in range(config.num_residual_blocks_of_a_block + 1):
            if level > 0 and i == config.num_residual_blocks_of_a_block:
                side *= 2
            shapes.append((width, side, side))
    return shapes


def as_outputs(outputs: Any, unet: UNet) -> int:
    """How many output blocks are wanted; UserError for more than there are."""
    return as_int("outputs", outputs, 0, len(unet.output_blocks))


def as_times(t: Any, T: int, count: int) -> list[int]:
    """One time for all images, or one for each of ``count``: whole numbers from 0 to T - 1; UserError for others."""
    if isinstance(t, (list, tuple, range)) or getattr(t, "ndim", 0):
        times = [as_int("t", value, 0, T - 1) for value in as_indices("t", t)]
        if len(times) != count:
            raise UserError(f"t has {len(times)} values; expected one, or one for each of {count} images")
        return times[:1] if len(set(times)) == 1 else times
    return [as_int("t", t, 0, T - 1)]


def partial_cost(counts: Mapping[str, int], eps: Sequence[int]) -> int:
    """Multiplications of the eps-decoders in ``counts`` that stopped; ``eps``: those of its stages and its head."""
    stopped = {name: images for name, images in counts.items() if name.startswith(COUNTER)}
    return sum(images * sum(eps[: int(name.removeprefix(COUNTER)) + 1]) for name, images in stopped.items())
