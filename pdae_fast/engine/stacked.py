"""Two decoders of one structure as one, on twice the images: those of the first decoder, then those of the other.

What is the same for both, norms, additions, resampling and attention, is one launch; matrix products are batched, and
3x3 convolutions are one for each half, into one map, on small maps side by side. A 1x1 skip convolution is part of the
addition after it. Skips are as the trunk left them: each is read for both halves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from . import float8
from .blocks import FusedAttention, FusedDecoder, FusedResBlock, UpsampledConvolution
from .convolution import HeadConvolution, PlainConvolution
from .norms import Join, Skip, splits_of
from .rewrites import Affine, attend_rows


class CannotStack(Exception):
    """The decoders differ in more than their weights."""


def alike(*values: object) -> None:
    if any(value != values[0] for value in values):
        raise CannotStack


# What a norm may have of its own, and how several make one with a row for each.
ROWS = {"affine": lambda of: Affine(*map(torch.cat, zip(*(a[:2] for a in of), strict=True))), "code_scale": torch.cat}


def stacked_norm(norms: Sequence[functools.partial]) -> functools.partial:
    """Norms with affines, and scales of codes, of their own as one, with a row of each for every norm."""
    for norm in norms:
        if not isinstance(norm, functools.partial):
            raise CannotStack
    alike(*({name: None if name in ROWS else v for name, v in norm.keywords.items()} for norm in norms))
    known = [(name, stack) for name, stack in ROWS.items() if name in norms[0].keywords]
    return functools.partial(norms[0], **{name: stack([n.keywords[name] for n in norms]) for name, stack in known})


class Branches:
    """Where the halves of small maps' convolutions run side by side: on a GPU's stream ``side``, or nowhere."""

    side: torch.cuda.Stream | None = None


def unwrapped(convs: Sequence[Callable], kind: type) -> tuple[Sequence[Callable], Sequence[Callable]]:
    """Convolutions of a ``kind``, or none, and those that they run: (``convs``, inner ones) or ([], ``convs``)."""
    alike(*map(type, convs))
    return (convs, [conv.conv for conv in convs]) if isinstance(convs[0], kind) else ([], convs)


class StackedConvolution:
    """Each half of the images by its own weights, into one map."""

    def __init__(self, convs: Sequence[Callable[[Tensor], Tensor]], branches: Branches) -> None:
        rounding, convs = unwrapped(convs, float8.RoundedConvolution)
        upsampling, convs = unwrapped(convs, UpsampledConvolution)
        if not all(isinstance(conv, PlainConvolution | float8.CodedConvolution) for conv in convs):
            raise CannotStack
        alike(*({name: getattr(value, "shape", value) for name, value in vars(conv).items()} for conv in convs))
        if getattr(convs[0], "bias", None) is not None:
            raise CannotStack
        self.convs, self.interpolate, self.branches, self.scales = convs, bool(upsampling), branches, None
        if rounding:
            scales = [conv.scale for conv in rounding]
            self.scales = torch.tensor(scales, dtype=torch.float32, device=convs[0].weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.scales is None else float8.rounded(x, kernels.image_scales(self.scales, x))
        x = F.interpolate(x, scale_factor=2, mode="nearest") if self.interpolate else x
        shape, dtype = self.convs[0].shape(x), self.convs[0].dtype
        y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        first, *others = zip(self.convs, *(t.chunk(len(self.convs)) for t in (x, y)), strict=True)
        # The side waits for what is read and is waited for: memory that either frees is not reused too early.
        side, main = self.branches.side, None
        if side is not None:
            main = torch.cuda.current_stream(x.device)
            side.wait_stream(main)
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            for conv, given, found in others:
                conv.into(given, found)
        conv, given, found = first
        conv.into(given, found)
        if side is not None:
            main.wait_stream(side)
        return y


class StackedAttention:
    def __init__(self, parts: Sequence[FusedAttention]) -> None:
        blocks = [part.block for part in parts]
        alike(*((b.heads, b.new_order, b.qkv.weight.shape, b.qkv.bias is None) for b in blocks))
        if any(part.bias is None for part in parts):  # otherwise each is added in advance, and its block's divisor is 1
            raise CannotStack
        norm = stacked_norm([part.norm for part in parts])
        self.norm = functools.partial(norm, x_bias=torch.stack([part.bias for part in parts]))
        self.block, self.attend = blocks[0], parts[0].attend
        self.qkv = [(block.qkv.bias, block.qkv.weight[:, :, 0].T) for block in blocks]
        self.out = torch.stack([block.proj_out.weight[:, :, 0].T for block in blocks])

    def __call__(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(len(self.qkv), -1, C)
        rows = tokens.new_empty(*tokens.shape[:2], 3 * C)
        for given, (bias, weight), found in zip(tokens, self.qkv, rows, strict=True):
            torch.addmm(bias, given, weight, out=found)
        h = attend_rows(self.block, rows.view(B, H * W, 3 * C), self.attend)
        # x itself where it is channels-last: it has the last product's bias already.
        found = x.permute(0, 2, 3, 1).reshape(len(self.out), -1, C)
        found.baddbmm_(h.reshape(found.shape), self.out)
        return found.view(B, H, W, C).permute(0, 3, 1, 2)


class StackedResBlock(FusedResBlock):
    """``skip`` are the weights of the 1x1 convolutions of a Join, [networks, channels of the Join, outputs]."""

    def __init__(self, blocks: Sequence[FusedResBlock], branches: Branches) -> None:
        first, skips = blocks[0], [b.skip for b in blocks]
        alike(*((b.resample, b.divisor, b.part, b.bias_out.shape) for b in blocks))
        alike(*(None if s is None else (type(s), s.weight.shape, s.bias is None) for s in skips))
        if first.divisor != 1:
            raise CannotStack
        self.__dict__.update(vars(first))
        self.norm_in, self.norm_out = (stacked_norm([getattr(b, n) for b in blocks]) for n in ("norm_in", "norm_out"))
        self.conv_in = StackedConvolution([b.conv_in for b in blocks], branches)
        self.conv_out = StackedConvolution([b.conv_out for b in blocks], branches)
        self.skip = None if first.skip is None else torch.stack([skip.weight.T for skip in skips])
        # What is added before the second norm is in its affine.
        self.bias_in, self.bias_out = None, torch.stack([b.bias_out for b in blocks])

    def _end(self, h: Tensor, x: Tensor | Join) -> Tensor | Skip:
        if self.skip is None:
            return super()._end(h, x)
        splits = splits_of(h, len(x.skip.x)) if self.part else 1
        y, statistics = kernels.add_projected(
            self.conv_out(h), x.h, x.skip.x, self.skip, self.bias_out, self.part, splits
        )
        return y if statistics is None else Skip(y, statistics)


def stacked_layer(layers: Sequence[Callable], branches: Branches) -> Callable:
    alike(*map(type, layers))
    if isinstance(layers[0], FusedResBlock):
        return StackedResBlock(layers, branches)
    if isinstance(layers[0], FusedAttention):
        return StackedAttention(layers)
    return StackedConvolution(layers, branches)


class StackedDecoders(FusedDecoder):
    """Raises CannotStack."""

    def __init__(self, decoders: Sequence[FusedDecoder]) -> None:
        alike(*(decoder.table.columns for decoder in decoders))
        alike(*(len(decoder.stages) for decoder in decoders))
        self.decoders, self.split, self.branches = decoders, True, Branches()
        self.stages = []
        for stages in zip(*(decoder.stages for decoder in decoders), strict=True):
            alike(*map(len, stages))
            layers = [list(zip(*layer, strict=True)) for layer in zip(*stages, strict=True)]
            self.stages.append([(stacked_layer(parts, self.branches), columns[0]) for parts, columns in layers])
        self.norm = stacked_norm([decoder.norm for decoder in decoders])
        self.head, heads = None, [decoder.head for decoder in decoders]
        if all(isinstance(head, HeadConvolution) and head.conv is None for head in heads):
            self.head = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        # What is added to h where time is not: the biases of the convolutions.
        self.biases = [
            torch.cat(
                [torch.zeros_like(layer.bias_out) if layer.bias_in is None else layer.bias_in for layer in blocks]
            )
            for blocks in ([layer for s in d.stages for layer, columns in s if columns is not None] for d in decoders)
        ]
        self.biases = torch.stack(self.biases)

    def affine(self, affines: Sequence[Affine], images: int) -> Affine:
        """The affines of the decoders for ``images`` of each, as one: rows of images, and offsets of halves."""
        multiplier, addend = (
            torch.cat([values.expand(images, -1) for values in both])
            for both in zip(*(affine[:2] for affine in affines), strict=True)
        )
        offsets = [affine.offset for affine in affines]
        if all(offset is None for offset in offsets):
            return Affine(multiplier, addend, self.biases)
        known = zip(offsets, self.biases.split(1), strict=True)
        return Affine(multiplier, addend, torch.cat([bias if offset is None else offset for offset, bias in known]))

    def __call__(self, skips: list[Skip], affine: Affine, side: torch.cuda.Stream | None = None) -> list[Tensor]:
        """What each decoder's head makes, [B, C, H, W]; with a ``side`` stream convolutions run side by side."""
        self.branches.side = side
        h = self.norm(self._join(1, self._middle(skips[-1], affine), skips, affine))
        if self.head is not None:
            return kernels.head_convolution(h, *self.head).chunk(len(self.decoders))
        parts = h.chunk(len(self.decoders))
        return [decoder.head(part) for decoder, part in zip(self.decoders, parts, strict=True)]

    def _middle(self, skip: Skip, affine: Affine) -> Tensor | Skip:
        return self.run(0, torch.cat([skip.x] * len(self.decoders)), affine)
