"""The network's blocks as the fused plan runs them: prepared weights, affines given from outside, no module calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..models.layers import AttentionBlock, ResBlock, Stage
from . import rewrites
from .attention import Attend
from .convolution import convolution, native_fits
from .norms import Affine, Join, Skip, materialise, normaliser
from .options import Rewrites
from .rewrites import AffineTable


def _affine(norm: nn.GroupNorm) -> Affine:
    return norm.weight.detach().float()[None], norm.bias.detach().float()[None]


class FusedResBlock:
    """One ResBlock; ``affine`` is that of its second norm, from an :class:`AffineTable`."""

    def __init__(self, block: ResBlock, options: Rewrites) -> None:
        self.resample, self.options, self.norm = block.resample, options, normaliser(options)
        norm, _, conv = block.in_layers
        self.affine_in = _affine(norm)
        folded = options.folded_biases
        native = options.native_convolutions
        build = functools.partial(convolution, packed=options.packed_weights, native=native, bias=not folded)
        self.phases, self.interpolate = None, block.resample == "up"
        if block.resample == "up" and native and native_fits(conv):
            self.conv_in, self.interpolate = build(conv, upsample=True), False
        elif block.resample == "up" and options.phase_upsample:
            weights = rewrites.phase_weights(conv.weight.detach().float()).to(conv.weight.dtype)
            self.phases = [
                [build(conv, weight=weights[py, px].contiguous(), padding=1) for px in (0, 1)] for py in (0, 1)
            ]
        else:
            self.conv_in = build(conv)
        last, skip = block.out_layers[3], block.skip_connection
        self.conv_out = build(last)
        self.bias_in = conv.bias.detach().float() if folded else None
        self.bias_out = last.bias.detach().float() if folded else None
        self.skip = None
        if not isinstance(skip, nn.Identity):
            self.skip = SplitSkip(skip) if options.split_skips else convolution(skip, options.packed_weights)

    def __call__(self, x: Tensor | Join, affine: Affine) -> Tensor:
        h = self.norm(x, self.affine_in)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.interpolate and self.phases is None:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        h = self.conv_in(h) if self.phases is None else rewrites.upsample_conv(h, self.phases)
        h = self.norm(h, affine, x_bias=self.bias_in, overwrite=True)
        residual = materialise(x) if self.skip is None else self.skip(x)
        if not self.options.folded_biases:
            if self.resample == "up":
                residual = F.interpolate(residual, scale_factor=2, mode="nearest")
            return self.conv_out(h, residual)
        add = kernels.upsample_add if self.resample == "up" else kernels.residual_add
        return add(self.conv_out(h), residual, self.bias_out)


class SplitSkip:
    """The 1x1 convolution of a joined input as a sum of two matrix products, the second added inside it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.weight, self.bias = layer.weight.detach()[:, :, 0, 0], layer.bias.detach()

    def __call__(self, x: Tensor | Join) -> Tensor:
        h, skip = (x.h, x.skip.x) if isinstance(x, Join) else (x, None)
        B, C, H, W = h.shape
        y = F.linear(h.permute(0, 2, 3, 1).reshape(-1, C), self.weight[:, :C], self.bias)
        if skip is not None:
            y.addmm_(skip.permute(0, 2, 3, 1).reshape(-1, skip.shape[1]), self.weight[:, C:].T)
        return y.view(B, H, W, -1).permute(0, 3, 1, 2)


class FusedAttention:
    def __init__(self, block: AttentionBlock, options: Rewrites, attend: Attend) -> None:
        norm = functools.partial(normaliser(options), affine=_affine(block.norm), silu=False)
        self.block, self.norm, self.attend, self.projections = block, norm, attend, None
        # In float32 the framework's matrix products are as fast as oneDNN's convolutions.
        if options.packed_weights and block.qkv.weight.dtype is torch.bfloat16:
            self.projections = tuple(
                convolution(layer, True, weight=layer.weight.detach()[..., None])
                for layer in (block.qkv, block.proj_out)
            )

    def __call__(self, x: Tensor, affine: None) -> Tensor:
        return rewrites.attention_tokens(self.block, x, self.norm, self.attend, self.projections)


class FusedStages:
    """A run of stages and the affine table of their ResBlocks."""

    def __init__(self, stages: Iterable[Stage], options: Rewrites, attend: Attend) -> None:
        stages = list(stages)
        self.table = AffineTable([b for stage in stages for b in rewrites.resblocks(stage)])
        columns = iter(self.table.columns)
        self.stages: list[list[tuple[Callable, slice | None]]] = []
        for stage in stages:
            layers: list[tuple[Callable, slice | None]] = []
            for layer in stage:
                if isinstance(layer, ResBlock):
                    layers.append((FusedResBlock(layer, options), next(columns)))
                elif isinstance(layer, AttentionBlock):
                    layers.append((FusedAttention(layer, options, attend), None))
                else:
                    conv = convolution(layer, options.packed_weights, native=options.native_convolutions)
                    layers.append((lambda x, affine, conv=conv: conv(x), None))
            self.stages.append(layers)

    def run(self, index: int, x: Tensor | Join, affine: Affine) -> Tensor:
        multiplier, addend = affine
        for layer, columns in self.stages[index]:
            x = layer(x, None if columns is None else (multiplier[:, columns], addend[:, columns]))
        return x


class FusedDecoder(FusedStages):
    """Middle block, output blocks and head of one decoder."""

    def __init__(
        self, middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, options: Rewrites, attend: Attend
    ) -> None:
        super().__init__([middle, *blocks], options, attend)
        self.split = options.split_skips
        self.norm = functools.partial(normaliser(options), affine=_affine(head[0]))
        self.head = convolution(head[2], options.packed_weights, native=options.native_convolutions)

    def __call__(self, skips: list[Skip], affine: Affine) -> Tensor:
        """Map [B, C, H, W] from what the trunk left, first to last."""
        return self.outer(self.deep(skips, affine, len(skips)), skips, affine)

    def deep(self, skips: list[Skip], affine: Affine, outer: int) -> Tensor:
        """The map that the stages which read the first ``outer`` of ``skips`` start from."""
        return self._join(1, self.run(0, skips[-1].x, affine), skips[outer:], affine)

    def outer(self, h: Tensor, skips: list[Skip], affine: Affine) -> Tensor:
        """Map [B, C, H, W] from the deep map ``h`` by the last stages, which read ``skips``, and the head."""
        return self.head(self.norm(self._join(len(self.stages) - len(skips), h, skips, affine)))

    def _join(self, first: int, h: Tensor, skips: list[Skip], affine: Affine) -> Tensor:
        """``h`` after the stages from ``first`` on, which read ``skips``, the last one first."""
        for i, skip in enumerate(reversed(skips), start=first):
            x = Join(h, skip)
            h = self.run(i, x if self.split else materialise(x), affine)
        return h


def make_skip(x: Tensor, share: bool, last_level_cache: int) -> Skip:
    """``x`` as a skip, with its channel statistics where computing them apart saves a read of device memory.

    A map that stays in the last-level cache is read again for little, and then one launch less counts for more.
    """
    if share and x.numel() * x.element_size() > last_level_cache:
        return Skip(x, kernels.channel_stats(x))
    return Skip(x)


def repeat(skips: list[Skip], count: int) -> list[Skip]:
    """Every skip ``count`` times along the batch, for several G's on one trunk pass."""
    if count == 1:
        return skips
    return [
        Skip(
            skip.x.repeat(count, 1, 1, 1).contiguous(memory_format=torch.channels_last),
            None if skip.statistics is None else skip.statistics.repeat(count, 1, 1),
        )
        for skip in skips
    ]
