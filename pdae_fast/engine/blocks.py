"""The network's blocks as the fused plan runs them: prepared weights, affines given from outside, no module calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS
from ..models.encoder import Encoder
from ..models.layers import AttentionBlock, Downsample, HalfBlock, ResBlock, Stage, Upsample
from ..models.unet import HalfUNet
from . import float8, rewrites
from .attention import Attend
from .convolution import HeadConvolution, PointwiseConvolution, StemConvolution, convolution, native_fits
from .norms import SMALL_GROUP, Join, Skip, add, bare, fixed_normaliser, materialise, normaliser, statistics_of
from .options import Rewrites
from .rewrites import Affine, AffineTable


class UpsampledConvolution:
    """conv3x3(nearest2x(x)): natively, by phases, or as it stands."""

    def __init__(self, conv: nn.Conv2d, options: Rewrites, bias: bool = True) -> None:
        build = functools.partial(convolution, packed=options.packed_weights, bias=bias)
        self.phases, self.interpolate = None, False
        if options.native_convolutions and native_fits(conv):
            self.conv = build(conv, native=options.tile, upsample=True)
        elif options.phase_upsample:
            weights = rewrites.phase_weights(conv.weight.detach().float()).to(conv.weight.dtype)
            self.phases = [
                [build(conv, weight=weights[py, px].contiguous(), padding=1) for px in (0, 1)] for py in (0, 1)
            ]
        else:
            self.conv, self.interpolate = build(conv, native=options.tile), True

    def __call__(self, x: Tensor) -> Tensor:
        if self.phases is not None:
            return rewrites.upsample_conv(x, self.phases)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.interpolate else x)


class FusedResBlock:
    """One ResBlock; ``affine`` is that of its second norm, from an :class:`AffineTable`. With a ``part`` it leaves the
    statistics of what it makes, of so many channels together."""

    def __init__(self, block: ResBlock, options: Rewrites, part: int = 0) -> None:
        self.resample, self.options, self.divisor = block.resample, options, block.divisor
        norm, _, conv = block.in_layers
        self.norm_in, self.norm_out = fixed_normaliser(options, norm), normaliser(options, block.out_layers[0])
        folded = options.folded_biases
        build = functools.partial(convolution, packed=options.packed_weights, native=options.tile, bias=not folded)
        conv_in = UpsampledConvolution(conv, options, not folded) if block.resample == "up" else build(conv)
        self.conv_in = float8.reading(conv, conv_in)
        last, skip = block.out_layers[3], block.skip_connection
        self.conv_out = float8.reading(last, build(last))
        if options.float8:
            self.norm_out, self.conv_out = float8.by_codes(self.norm_out, last, self.conv_out)
        if options.float8 and block.resample != "down":  # which pools in between
            upsample = block.resample == "up"
            self.norm_in, self.conv_in = float8.by_codes(self.norm_in, conv, self.conv_in, upsample)
        # The offset of an affine contains it already.
        self.bias_in = conv.bias.detach().float() if folded and block.scale_shift else None
        self.bias_out = last.bias.detach().float() if folded else None
        self.part = part if folded and self.divisor == 1 else 0
        self.skip = None
        if not isinstance(skip, nn.Identity):
            self.skip = SplitSkip(skip) if options.split_skips else JoinedSkip(skip, options)
        if options.shared_products and self.skip is not None:
            # Added with the other one, so that the products have none.
            self.bias_out, self.skip.bias = self.bias_out + self.skip.bias.float(), None

    def __call__(self, x: Tensor | Skip | Join, affine: Affine) -> Tensor | Skip:
        h = self.norm_in(x)
        x = x if isinstance(x, Join) else bare(x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h, bias = self.conv_in(h), self.bias_in
        if affine.offset is not None:
            if len(affine.offset) == 1:
                bias = affine.offset[0]
            elif self.bias_out is not None and self.bias_out.dim() == 2:  # of stacked blocks, a row for each
                bias = affine.offset
            else:
                h = h.add_(affine.offset[:, :, None, None])
        h = self.norm_out(h, affine, x_bias=bias, overwrite=True)
        y = self._end(h, x)
        return y if self.divisor == 1 else y / self.divisor

    def _end(self, h: Tensor, x: Tensor | Join) -> Tensor | Skip:
        """The last convolution, of h, and what it is added to."""
        residual = materialise(x) if self.skip is None else self.skip(x)
        if self.options.folded_biases:
            return add(self.conv_out(h), residual, self.bias_out, self.part)
        if self.resample == "up":
            residual = F.interpolate(residual, scale_factor=2, mode="nearest")
        return self.conv_out(h, residual)


class FusedDownsample:
    """A Downsample: a convolution of stride 2, or pooling."""

    def __init__(self, layer: Downsample, options: Rewrites) -> None:
        self.pad = layer.kind == "conv_asymmetric"
        self.op = layer.op if layer.kind == "pool" else convolution(layer.op, options.packed_weights)

    def __call__(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class SplitSkip:
    """The 1x1 convolution of a joined input as a sum of two matrix products, the second added inside it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.weight, self.bias = layer.weight.detach()[:, :, 0, 0], layer.bias.detach()

    def __call__(self, x: Tensor | Join) -> Tensor:
        h, skip = (x.h, x.skip.x) if isinstance(x, Join) else (x, None)
        B, C, H, W = h.shape
        rows = h.permute(0, 2, 3, 1).reshape(-1, C)
        if isinstance(x, Join) and x.skip.product is not None:
            return x.skip.product.addmm_(rows, self.weight[:, :C].T).view(B, H, W, -1).permute(0, 3, 1, 2)
        y = F.linear(rows, self.weight[:, :C], self.bias)
        if skip is not None:
            y.addmm_(skip.permute(0, 2, 3, 1).reshape(-1, skip.shape[1]), self.weight[:, C:].T)
        return y.view(B, H, W, -1).permute(0, 3, 1, 2)


class JoinedSkip:
    """The same as one convolution, natively of both parts where they are."""

    def __init__(self, layer: nn.Conv2d, options: Rewrites) -> None:
        self.conv = convolution(layer, options.packed_weights, native=options.tile)
        self.reads_parts = isinstance(self.conv, PointwiseConvolution)

    def __call__(self, x: Tensor | Join) -> Tensor:
        return self.conv(x.h, x2=x.skip.x) if isinstance(x, Join) and self.reads_parts else self.conv(materialise(x))


class FusedAttention:
    def __init__(self, block: AttentionBlock, options: Rewrites, attend: Attend) -> None:
        norm = fixed_normaliser(options, block.norm, silu=False)
        self.block, self.norm, self.attend, self.projections = block, norm, attend, None
        # The framework's matrix products are never faster than oneDNN's convolutions.
        if options.packed_weights:
            self.projections = tuple(
                convolution(layer, True, native=options.tile, weight=layer.weight.detach()[..., None])
                for layer in (block.qkv, block.proj_out)
            )

        self.bias: Tensor | None = None

    def follow(self, block: FusedResBlock) -> None:
        """Read what ``block`` just made: it adds the last product's bias in advance, which the norm takes away as it
        reads, and the product is added to the map itself."""
        bias = self.block.proj_out.bias.detach().float()
        block.bias_out, self.bias = block.bias_out + bias, -bias
        block.part = 0

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm if self.bias is None else functools.partial(self.norm, x_bias=self.bias)
        return rewrites.attention_tokens(self.block, x, norm, self.attend, self.projections, self.bias is not None)


class FusedHalfBlock:
    """One HalfBlock."""

    def __init__(self, block: HalfBlock, options: Rewrites) -> None:
        norm, _, conv = block.in_layers
        self.norm, self.pool, self.divisor = fixed_normaliser(options, norm), block.pool, block.divisor
        self.conv = convolution(conv, options.packed_weights, native=options.tile)
        skip = block.skip_connection
        self.skip = None if isinstance(skip, nn.Identity) else JoinedSkip(skip, options)

    def __call__(self, x: Tensor) -> Tensor:
        h, x = self.pool(self.norm(x)), self.pool(x)
        y = self.conv(h, x if self.skip is None else self.skip(x))
        return y if self.divisor == 1 else y / self.divisor


def reader(layer: nn.Module, options: Rewrites, attend: Attend) -> Callable[[Tensor], Tensor]:
    """What stands for a layer that reads its input alone."""
    if isinstance(layer, HalfBlock):
        return FusedHalfBlock(layer, options)
    if isinstance(layer, AttentionBlock):
        return FusedAttention(layer, options, attend)
    if isinstance(layer, Downsample):
        return FusedDownsample(layer, options)
    if isinstance(layer, Upsample):
        return layer if isinstance(layer.conv, nn.Identity) else UpsampledConvolution(layer.conv, options)
    return convolution(layer, options.packed_weights, native=options.tile)


class FusedEncoder:
    """E_phi: x0 [B, C, H, W], channels-last, in the dtype of its weights -> z [B, latent_dim]."""

    def __init__(self, encoder: Encoder | HalfUNet, options: Rewrites, attend: Attend) -> None:
        self.layers: list[Callable[[Tensor], Tensor]] = []
        for layer in encoder.sequence():
            if isinstance(layer, nn.GroupNorm):
                self.layers.append(fixed_normaliser(options, layer))
            elif isinstance(layer, (nn.Conv2d, HalfBlock, AttentionBlock, Downsample)):
                self.layers.append(reader(layer, options, attend))
            elif not isinstance(layer, nn.SiLU):  # which follows a norm, and is part of it
                self.layers.append(layer)

    def __call__(self, x0: Tensor) -> Tensor:
        for layer in self.layers:
            x0 = layer(x0)
        return x0


def low(layer: nn.Conv2d) -> bool:
    """Whether it is in a lower precision: then a network's first and last layers are of a kind of their own."""
    return layer.weight.dtype is not torch.float32


class FusedStages:
    """A run of stages and the affine table of their ResBlocks."""

    def __init__(self, stages: Iterable[Stage], options: Rewrites, attend: Attend, part: int = 0) -> None:
        stages, self.part = list(stages), part
        blocks = [b for stage in stages for b in rewrites.resblocks(stage)]
        self.table = AffineTable(blocks, fold=options.folded_biases)
        columns = iter(self.table.columns)
        self.stages: list[list[tuple[Callable, slice | None]]] = []
        for stage in stages:
            layers: list[tuple[Callable, slice | None]] = []
            for layer in stage:
                if isinstance(layer, ResBlock):
                    layers.append((FusedResBlock(layer, options, part), next(columns)))
                elif isinstance(layer, nn.Conv2d) and (options.folded_biases or low(layer)):
                    layers.append((StemConvolution(layer, options.packed_weights), None))
                else:
                    plain = reader(layer, options, attend)
                    before = layers[-1][0] if layers else None
                    own = isinstance(before, FusedResBlock) and before.divisor == 1 and options.folded_biases
                    if own and isinstance(layer, AttentionBlock) and layer.divisor == 1:
                        plain.follow(before)
                    layers.append((plain, None))
            self.stages.append(layers)

    def run(self, index: int, x: Tensor | Skip | Join, affine: Affine) -> Tensor | Skip:
        for layer, columns in self.stages[index]:
            x = layer(bare(x)) if columns is None else layer(x, affine.columns(columns))
        return x


class FusedDecoder(FusedStages):
    """Middle block, output blocks and head of one decoder."""

    def __init__(
        self, middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, options: Rewrites, attend: Attend, part: int
    ) -> None:
        super().__init__([middle, *blocks], options, attend, part)
        skips = [stage[0][0].skip for stage in self.stages[1:]]
        parts = options.native_norms and all(isinstance(s, JoinedSkip) and s.reads_parts for s in skips)
        self.split = options.split_skips or parts
        self.norm = fixed_normaliser(options, head[0])
        if low(head[2]):
            self.head = HeadConvolution(head[2], options.packed_weights)
        else:
            self.head = convolution(head[2], options.packed_weights, native=options.tile)

    def __call__(self, skips: list[Skip], affine: Affine) -> Tensor:
        """Map [B, C, H, W] from what the trunk left, first to last."""
        return self.outer(self.deep(skips, affine, len(skips)), skips, affine)

    def deep(self, skips: list[Skip], affine: Affine, outer: int) -> Tensor | Skip:
        """The map that the stages which read the first ``outer`` of ``skips`` start from."""
        return self._join(1, self._middle(skips[-1], affine), skips[outer:], affine)

    def outer(self, h: Tensor | Skip, skips: list[Skip], affine: Affine) -> Tensor:
        """Map [B, C, H, W] from the deep map ``h`` by the last stages, which read ``skips``, and the head."""
        return self.head(self.norm(self._join(len(self.stages) - len(skips), h, skips, affine)))

    def levels(self, skips: list[Skip], affine: Affine) -> Iterator[Tensor]:
        """The map of the middle block, then of every output block, each computed when it is asked for."""
        h = self._middle(skips[-1], affine)
        yield bare(h)
        for i, skip in enumerate(reversed(skips), start=1):
            h = self._join(i, h, [skip], affine)
            yield bare(h)

    def _middle(self, skip: Skip, affine: Affine) -> Tensor | Skip:
        return self.run(0, skip.x if skip.statistics is None else skip, affine)

    def _join(self, first: int, h: Tensor | Skip, skips: list[Skip], affine: Affine) -> Tensor | Skip:
        """``h`` after the stages from ``first`` on, which read ``skips``, the last one first."""
        for i, skip in enumerate(reversed(skips), start=first):
            x = Join(bare(h), skip, getattr(h, "statistics", None))
            h = self.run(i, x if self.split else materialise(x), affine)
        return h


def make_skip(x: Tensor | Skip, part: int) -> Skip:
    """``x`` as a skip; with a ``part`` every large one has statistics, so that no reader computes them."""
    if isinstance(x, Skip):
        return x
    large = x.shape[1] // NORM_GROUPS * x.shape[2] * x.shape[3] > SMALL_GROUP
    return Skip(x, statistics_of(x, part) if part and large else None)


class SharedProducts:
    """The parts of the 1x1 skip convolutions that read what the trunk leaves: of two decoders in one matrix product, so
    that a map is read once."""

    def __init__(self, decoders: tuple[FusedDecoder, FusedDecoder]) -> None:
        self.decoders, self.weights = decoders, {}

    def __call__(self, skips: list[Skip]) -> tuple[list[Skip], list[Skip]]:
        """The skips, all or the outer ones, for one decoder and for the other."""
        both = [self._products(i, skip) for i, skip in enumerate(skips)]
        first, second = ([skip._replace(product=p[k]) for skip, p in zip(skips, both, strict=True)] for k in (0, 1))
        return first, second

    def _products(self, i: int, skip: Skip) -> Tensor:
        """[2, B * H * W, O]"""
        C = skip.x.shape[1]
        if i not in self.weights:
            # The last stage of a decoder reads the first skip.
            blocks = [decoder.stages[len(decoder.stages) - 1 - i][0][0] for decoder in self.decoders]
            self.weights[i] = torch.stack([block.skip.weight[:, -C:].T for block in blocks])
        rows = skip.x.permute(0, 2, 3, 1).reshape(-1, C)
        return torch.bmm(rows.expand(2, -1, -1), self.weights[i])


def repeat(skips: list[Skip], count: int) -> list[Skip]:
    """Every skip ``count`` times along the batch, for several G's on one trunk pass."""
    if count == 1:
        return skips
    return [
        Skip(
            skip.x.repeat(count, 1, 1, 1).contiguous(memory_format=torch.channels_last),
            None if skip.statistics is None else skip.statistics.repeat(count, 1, 1, 1),
        )
        for skip in skips
    ]
