"""The fast plan: the same function as the model, with everything taken out that does not change the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import PDAE, Prior
from ..models.layers import AttentionBlock, ResBlock, Stage
from ..models.unet import PDAEDecoder
from . import rewrites
from .convolution import can_pack, convolution
from .plan import Field, Plan
from .rewrites import AffineTable


@dataclass(frozen=True)
class Rewrites:
    """Switches for diagnosis; every one of them is exact up to rounding."""

    packed_weights: bool = True
    phase_upsample: bool = True


Affine = tuple[Tensor, Tensor]  # multiplier and addend on the normalised map, each [C] or [B, C]


def normalise(x: Tensor, affine: Affine) -> Tensor:
    """SiLU(GN(x) * multiplier + addend); in one pass over x when all images share the affine."""
    multiplier, addend = affine
    if multiplier.ndim == 1:
        return F.silu(rewrites.group_norm(x, multiplier, addend), inplace=True)
    normal = rewrites.group_norm(x)
    scaled = torch.addcmul(addend.to(x.dtype)[:, :, None, None], normal, multiplier.to(x.dtype)[:, :, None, None])
    return F.silu(scaled, inplace=True)


class _Residual:
    """One ResBlock, its convolutions prepared and its affine given from outside."""

    def __init__(self, block: ResBlock, options: Rewrites) -> None:
        self.resample = block.resample
        norm, _, conv = block.in_layers
        self.affine_in = (norm.weight.detach().float(), norm.bias.detach().float())
        self.phases = None
        if block.resample == "up" and options.phase_upsample:
            weights = rewrites.phase_weights(conv.weight.detach().float()).to(conv.weight.dtype)
            self.phases = [
                [convolution(conv, options.packed_weights, weights[py, px].contiguous(), padding=1) for px in (0, 1)]
                for py in (0, 1)
            ]
        else:
            self.conv_in = convolution(conv, options.packed_weights)
        self.conv_out = convolution(block.out_layers[3], options.packed_weights)
        skip = block.skip_connection
        self.skip = None if isinstance(skip, nn.Identity) else convolution(skip, options.packed_weights)

    def __call__(self, x: Tensor, affine: Affine) -> Tensor:
        h = normalise(x, self.affine_in)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            if self.phases is None:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
        h = self.conv_in(h) if self.phases is None else rewrites.upsample_conv(h, self.phases)
        return self.conv_out(normalise(h, affine), x if self.skip is None else self.skip(x))


class _Attention:
    def __init__(self, block: AttentionBlock) -> None:
        self.block = block
        weight, bias = block.norm.weight.detach().float(), block.norm.bias.detach().float()
        self.norm = lambda x: rewrites.group_norm(x, weight, bias)

    def __call__(self, x: Tensor, affine: None) -> Tensor:
        return rewrites.attention_tokens(self.block, x, self.norm)


class _Part:
    """A run of stages and the affine table of their ResBlocks."""

    def __init__(self, stages: Iterable[Stage], options: Rewrites) -> None:
        stages = list(stages)
        self.table = AffineTable([b for stage in stages for b in rewrites.resblocks(stage)])
        columns = iter(self.table.columns)
        self.stages: list[list[tuple[Callable, slice | None]]] = []
        for stage in stages:
            layers: list[tuple[Callable, slice | None]] = []
            for layer in stage:
                if isinstance(layer, ResBlock):
                    layers.append((_Residual(layer, options), next(columns)))
                elif isinstance(layer, AttentionBlock):
                    layers.append((_Attention(layer), None))
                else:
                    conv = convolution(layer, options.packed_weights)
                    layers.append((lambda x, affine, conv=conv: conv(x), None))
            self.stages.append(layers)

    def run(self, index: int, x: Tensor, affine: Affine) -> Tensor:
        multiplier, addend = affine
        for layer, columns in self.stages[index]:
            # A slice of a wide row is contiguous as it stands; one of a wide matrix is not, and need not be.
            x = layer(x, None if columns is None else (multiplier[..., columns], addend[..., columns]))
        return x


class _Decoder(_Part):
    """Middle block, output blocks and head of one decoder."""

    def __init__(self, middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, options: Rewrites) -> None:
        super().__init__([middle, *blocks], options)
        self.head_affine = (head[0].weight.detach().float(), head[0].bias.detach().float())
        self.head = convolution(head[2], options.packed_weights)

    def __call__(self, skips: list[Tensor], affine: Affine) -> Tensor:
        h = self.run(0, skips[-1], affine)
        for i, skip in enumerate(reversed(skips), start=1):
            h = self.run(i, torch.cat([h, skip], dim=1), affine)
        return self.head(normalise(h, self.head_affine)).float()


class FusedPlan(Plan):
    """Time tables, z projections once per image, one affine per adaptive norm, channels-last, pre-packed weights."""

    name = "fused"

    def __init__(
        self, model: PDAE | Prior, device: torch.device, dtype: torch.dtype, options: Rewrites | None = None
    ) -> None:
        super().__init__(model, device, dtype)
        options = options or Rewrites()
        if not can_pack(device, dtype):
            options = dataclasses.replace(options, packed_weights=False)
        self.options = options
        unet = self.unet
        with torch.inference_mode():
            self.trunk = _Part(unet.input_blocks, options)
            self.eps = _Decoder(unet.middle_block, unet.output_blocks, unet.out, options)
            self.gradient = (
                _Decoder(unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out, options)
                if isinstance(unet, PDAEDecoder)
                else None
            )
        self._parts = {"trunk": self.trunk, "eps": self.eps, **({"gradient": self.gradient} if self.gradient else {})}
        self._times: dict[int, dict[str, Affine]] = {}

    @torch.inference_mode()
    def prepare(self, times: Iterable[int]) -> None:
        """Compute the time tables of a schedule, one GEMM for each part; other times are added when they occur."""
        missing = sorted({int(t) for t in times} - self._times.keys())
        if not missing:
            return
        emb = rewrites.time_embeddings(self.unet, torch.tensor(missing, device=self.device))
        tables = {name: part.table.at_times(emb) for name, part in self._parts.items()}
        for i, t in enumerate(missing):
            self._times[t] = {name: (table[0][i], table[1][i]) for name, table in tables.items()}

    def field(self, z: Tensor | None = None, weights: Tensor | None = None) -> Field:
        """As :meth:`Plan.field`."""
        codes, K = None, 1
        if z is not None:
            z = z.to(self.device).float()
            K = z.shape[0] if z.ndim == 3 else 1
            label = self.unet.label_emb
            with torch.inference_mode():
                emb_z = F.linear(z.reshape(-1, z.shape[-1]), label.weight.float(), label.bias.float())
                codes = self.gradient.table.of_codes(emb_z)
            if z.ndim == 3:
                weights = weights.to(self.device)[:, :, None, None, None]
        C = self.unet.config.input_channel

        @torch.inference_mode()
        def evaluate(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
            B = len(x)
            if t not in self._times:
                self.prepare([t])
            affine = self._times[t]
            h, skips = x.to(self.dtype).contiguous(memory_format=torch.channels_last), []
            for i in range(len(self.trunk.stages)):
                h = self.trunk.run(i, h, affine["trunk"])
                skips.append(h)
            eps = self.eps(skips, affine["eps"])[:, :C]
            self.evaluations.update(trunk=B, eps=B)
            if codes is None or not use_gradient:
                return eps, None
            self.evaluations["gradient"] += K * B
            (multiplier, addend), (scale, shift) = affine["gradient"], codes
            both = (scale * multiplier, scale * addend + shift)
            if K * B == 1:
                both = (both[0][0], both[1][0])
            if K == 1 and z.ndim == 2:
                return eps, self.gradient(skips, both)
            repeated = [skip.repeat(K, 1, 1, 1).contiguous(memory_format=torch.channels_last) for skip in skips]
            gradients = self.gradient(repeated, both)
            return eps, (weights * gradients.unflatten(0, (K, B))).sum(0)

        return evaluate
