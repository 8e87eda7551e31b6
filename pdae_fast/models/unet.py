"""The ADM U-Net: alone (the prior eps_theta), with the second decoder that estimates G (the PDAE decoder), and its half
that encodes (Diff-AE's encoder)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import UNetConfig
from ..errors import UserError
from .layers import (
    AttentionBlock,
    Downsample,
    HalfBlock,
    ResBlock,
    Stage,
    Upsample,
    attention,
    group_norm,
    time_features,
    zero_,
)


class Features(NamedTuple):
    """What one trunk pass leaves for the decoders: the deepest map, the skips (first to last), the time embedding, the
    x_t and t it was made of, from which eps follows where the network's output is something else, and the z of a
    network whose every block reads it."""

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    x: Tensor | None = None
    t: Tensor | None = None
    z: Tensor | None = None


def _build_trunk(config: UNetConfig, block: Callable[..., nn.Module]) -> nn.ModuleList:
    """Encoder half; its stages leave maps of config.skip_widths() channels. ``block`` makes residual blocks."""
    width = config.stem_width
    blocks = nn.ModuleList([Stage(nn.Conv2d(config.input_channel, width, 3, padding=1))])
    for level, out in enumerate(config.widths):
        for _ in range(config.num_residual_blocks_of_a_block):
            layers: list[nn.Module] = [block(width, out)]
            width = out
            if 2**level in config.attention_resolutions:
                layers.append(attention(config, width))
            blocks.append(Stage(*layers))
        if level < config.levels - 1:
            residual = config.downsample == "residual"
            blocks.append(
                Stage(block(width, width, resample="down") if residual else Downsample(width, config.downsample))
            )
    return blocks


def _build_middle(config: UNetConfig, block: Callable[..., nn.Module]) -> Stage:
    if config.middle == "none":
        return Stage()
    width, divisor = config.widths[-1], config.middle_scale_factor
    layers: list[nn.Module] = [block(width, width, divisor=divisor) for _ in (0, 1)]
    if config.middle == "attention":
        norm = group_norm(width, config) if config.middle_attention_norm else nn.Identity()
        heads, new_order = config.heads(width), config.use_new_attention_order
        layers.insert(1, AttentionBlock(width, heads, norm, new_order, divisor))
    return Stage(*layers)


def _build_output(config: UNetConfig, block: Callable[..., nn.Module]) -> nn.ModuleList:
    skips = config.skip_widths()
    width = skips[-1]
    blocks = nn.ModuleList()
    for level, out in reversed(list(enumerate(config.widths))):
        for i in range(config.num_residual_blocks_of_a_block + 1):
            layers: list[nn.Module] = [block(width + skips.pop(), out)]
            width = out
            if 2**level in config.attention_resolutions:
                layers.append(attention(config, width, output=True))
            if level > 0 and i == config.num_residual_blocks_of_a_block:
                residual = config.upsample == "residual"
                layers.append(block(width, width, resample="up") if residual else Upsample(width, config.upsample))
            blocks.append(Stage(*layers))
    return blocks


def _build_head(config: UNetConfig, out_channels: int) -> nn.Sequential:
    width = config.widths[0]
    return nn.Sequential(group_norm(width, config), nn.SiLU(), zero_(nn.Conv2d(width, out_channels, 3, padding=1)))


def _levels(middle: Stage, blocks: nn.ModuleList, features: Features, emb_z: Tensor | None = None) -> Iterator[Tensor]:
    h = middle(features.h, features.emb, emb_z)
    yield h
    for block, skip in zip(blocks, reversed(features.skips), strict=True):
        h = block(torch.cat([h, skip], dim=1), features.emb, emb_z)
        yield h


def _decode(
    middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, features: Features, emb_z: Tensor | None = None
) -> Tensor:
    *_, h = _levels(middle, blocks, features, emb_z)
    return head(h)


class UNet(nn.Module):
    """eps_theta(x_t, t): the prior, with the parameter names of guided-diffusion, Diff-AE and PDAE files.

    ``to_eps`` [T, 2] are the factors of x_t and of the network's output that make eps of them (Schedule.to_eps); None
    where the output is eps. With ``z_width`` every block reads z [B, z_width] as a scale, as in Diff-AE.
    """

    def __init__(self, config: UNetConfig, to_eps: np.ndarray | None = None, z_width: int | None = None) -> None:
        super().__init__()
        self.config, self.to_eps, self.z_width = config, to_eps, z_width
        self.time_embed = nn.Sequential(
            nn.Linear(config.base_channel, config.time_width),
            nn.SiLU(),
            nn.Linear(config.time_width, config.time_width),
        )
        self.class_emb = nn.Embedding(config.num_classes, config.time_width) if config.num_classes else None
        block = functools.partial(ResBlock, config, z_width=z_width, z_shift=False)
        self.input_blocks = _build_trunk(config, block)
        self.middle_block = _build_middle(config, block)
        self.output_blocks = _build_output(config, block)
        self.out = _build_head(config, config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """t int64 [B], and of a class-conditional network labels y int64 [B] -> [B, time_width]."""
        self.check_labels(y)
        emb = self.time_embed(time_features(self.config, t).to(self.dtype))
        return emb if y is None else emb + self.class_emb(y)

    def check_labels(self, y: Tensor | None) -> None:
        """UserError unless there are labels exactly where this network is class-conditional."""
        if (self.class_emb is None) != (y is None):
            raise UserError(
                "y: this network is not class-conditional; expected no labels"
                if self.class_emb is None
                else f"y is missing: this network is class-conditional; expected labels from 0 to "
                f"{self.config.num_classes - 1}"
            )

    def trunk(self, x: Tensor, t: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Features:
        """The shared encoder half; x [B, C, H, W], t and y int64 [B] (values may differ within the batch), and z
        [B, z_width] where blocks read it."""
        emb = self.embed(t, y)
        h, skips = x.to(self.dtype), []
        if self.config.center_input_sample:
            h = 2 * h - 1
        z = None if z is None else z.to(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb, z)
            skips.append(h)
        return Features(h, tuple(skips), emb, x, t, z)

    def levels(self, features: Features) -> Iterator[Tensor]:
        """The map of the middle block, then of every output block, each computed when it is asked for."""
        return _levels(self.middle_block, self.output_blocks, features, features.z)

    def decode(self, features: Features) -> Tensor:
        """The network's output [B, C, H, W]; a learned variance, if the prior has one, is dropped."""
        out = _decode(self.middle_block, self.output_blocks, self.out, features, features.z)
        return out[:, : self.config.input_channel]

    def decode_eps(self, features: Features) -> Tensor:
        """eps_hat [B, C, H, W], whatever the network's output means: float32 at least where it is not eps, because near
        t = 0 it is the small difference of two large terms."""
        out = self.decode(features)
        if self.to_eps is None:
            return out
        wide = torch.promote_types(out.dtype, torch.float32)
        factors = torch.from_numpy(self.to_eps).to(out.device)[features.t].to(wide)
        of_x, of_out = factors[:, :, None, None, None].unbind(1)
        return of_x * features.x.to(wide) + of_out * out.to(wide)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W], t int64 [B] -> eps_hat [B, C, H, W]; y and z as in `trunk`."""
        return self.decode_eps(self.trunk(x, t, y, z))


class PDAEDecoder(UNet):
    """eps_theta and G_psi in one module: one trunk pass feeds two decoders (PDAE, section 3.3).

    Everything inherited from :class:`UNet` is the frozen prior; ``label_emb`` and ``shift_*`` are trained.
    """

    TRAINED = ("label_emb", "shift_middle_block", "shift_output_blocks", "shift_out")

    def __init__(self, config: UNetConfig, latent_dim: int, to_eps: np.ndarray | None = None) -> None:
        super().__init__(config, to_eps)
        self.label_emb = nn.Linear(latent_dim, config.time_width)
        # G is new weights, so it is the paper's whatever the prior's flavour; it has the prior's widths.
        own = dataclasses.replace(
            config,
            use_scale_shift_norm=True,
            upsample="residual",
            middle="attention",
            middle_attention_norm=True,
            middle_scale_factor=1.0,
        )
        block = functools.partial(ResBlock, own, z_width=own.time_width)
        self.shift_middle_block = _build_middle(own, block)
        self.shift_output_blocks = _build_output(own, block)
        self.shift_out = _build_head(own, own.input_channel)

    def decode_gradient(self, features: Features, z: Tensor) -> Tensor:
        """G [B, C, H, W] for z [B, latent_dim]."""
        emb_z = self.label_emb(z.to(self.dtype))
        return _decode(self.shift_middle_block, self.shift_output_blocks, self.shift_out, features, emb_z)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_t [B, C, H, W], t int64 [B], z [B, latent_dim] -> (eps_hat, G), each [B, C, H, W]; y as in UNet."""
        features = self.trunk(x, t, y)
        return self.decode_eps(features), self.decode_gradient(features, z)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for name in self.TRAINED for p in getattr(self, name).parameters()]

    def freeze_prior(self) -> PDAEDecoder:
        """Switch off gradients of everything inherited from the prior."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in self.TRAINED)
        return self


class HalfUNet(nn.Module):
    """Diff-AE's encoder: input half and middle of a U-Net of half blocks, then global average pooling.

    x0 [B, C, H, W] in [-1, 1] -> z [B, latent_dim]; H and W can be halved as often as ``config`` has levels above one.
    """

    def __init__(self, config: UNetConfig, latent_dim: int) -> None:
        super().__init__()
        block = functools.partial(HalfBlock, config)
        self.input_blocks = _build_trunk(config, block)
        self.middle_block = _build_middle(config, block)
        width = config.widths[-1]
        self.out = nn.Sequential(
            group_norm(width, config), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, latent_dim, 1)
        )

    def forward(self, x0: Tensor) -> Tensor:
        h = x0.to(self.out[3].weight.dtype)
        for layer in self.sequence():
            h = layer(h)
        return h

    def sequence(self) -> list[nn.Module]:
        """As `Encoder.sequence`."""
        return [*itertools.chain(*self.input_blocks, self.middle_block, self.out), nn.Flatten()]
