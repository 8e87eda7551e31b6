"""The ADM U-Net: alone (the prior eps_theta), and with the second decoder that estimates G (the PDAE decoder)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import UNetConfig
from .layers import ResBlock, Stage, attention, group_norm, timestep_embedding, zero_


class Features(NamedTuple):
    """What one trunk pass leaves for the decoders: the deepest map, the skips (first to last), the time embedding."""

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor


def _build_trunk(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Encoder half and the channel count of every skip it leaves."""
    width = config.channel_multiplier[0] * config.base_channel
    blocks = nn.ModuleList([Stage(nn.Conv2d(config.input_channel, width, 3, padding=1))])
    skips = [width]
    for level, multiplier in enumerate(config.channel_multiplier):
        out = multiplier * config.base_channel
        for _ in range(config.num_residual_blocks_of_a_block):
            layers: list[nn.Module] = [ResBlock(width, out, config.time_width, config.dropout)]
            width = out
            if 2**level in config.attention_resolutions:
                layers.append(attention(config, width))
            blocks.append(Stage(*layers))
            skips.append(width)
        if level < config.levels - 1:
            blocks.append(Stage(ResBlock(width, width, config.time_width, config.dropout, resample="down")))
            skips.append(width)
    return blocks, skips


def _build_middle(config: UNetConfig, with_z: bool) -> Stage:
    width = config.channel_multiplier[-1] * config.base_channel
    return Stage(
        ResBlock(width, width, config.time_width, config.dropout, with_z=with_z),
        attention(config, width),
        ResBlock(width, width, config.time_width, config.dropout, with_z=with_z),
    )


def _build_output(config: UNetConfig, skips: list[int], with_z: bool) -> nn.ModuleList:
    skips = list(skips)
    width = skips[-1]
    blocks = nn.ModuleList()
    for level, multiplier in reversed(list(enumerate(config.channel_multiplier))):
        out = multiplier * config.base_channel
        for i in range(config.num_residual_blocks_of_a_block + 1):
            layers: list[nn.Module] = [
                ResBlock(width + skips.pop(), out, config.time_width, config.dropout, with_z=with_z)
            ]
            width = out
            if 2**level in config.attention_resolutions:
                layers.append(attention(config, width))
            if level > 0 and i == config.num_residual_blocks_of_a_block:
                layers.append(ResBlock(width, width, config.time_width, config.dropout, resample="up", with_z=with_z))
            blocks.append(Stage(*layers))
    return blocks


def _build_head(config: UNetConfig, out_channels: int) -> nn.Sequential:
    width = config.channel_multiplier[0] * config.base_channel
    return nn.Sequential(group_norm(width), nn.SiLU(), zero_(nn.Conv2d(width, out_channels, 3, padding=1)))


def _decode(
    middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, features: Features, emb_z: Tensor | None = None
) -> Tensor:
    h = middle(features.h, features.emb, emb_z)
    for block, skip in zip(blocks, reversed(features.skips), strict=True):
        h = block(torch.cat([h, skip], dim=1), features.emb, emb_z)
    return head(h)


class UNet(nn.Module):
    """eps_theta(x_t, t): the prior, with the parameter names of guided-diffusion, Diff-AE and PDAE files."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embed = nn.Sequential(
            nn.Linear(config.base_channel, config.time_width),
            nn.SiLU(),
            nn.Linear(config.time_width, config.time_width),
        )
        self.input_blocks, self.skip_channels = _build_trunk(config)
        self.middle_block = _build_middle(config, with_z=False)
        self.output_blocks = _build_output(config, self.skip_channels, with_z=False)
        self.out = _build_head(config, config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype

    def trunk(self, x: Tensor, t: Tensor) -> Features:
        """The shared encoder half; x [B, C, H, W], t int64 [B] (values may differ within the batch)."""
        emb = self.time_embed(timestep_embedding(t, self.config.base_channel).to(self.dtype))
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return Features(h, tuple(skips), emb)

    def decode_eps(self, features: Features) -> Tensor:
        """eps_hat [B, C, H, W]; a learned variance, if the prior has one, is dropped."""
        out = _decode(self.middle_block, self.output_blocks, self.out, features)
        return out[:, : self.config.input_channel]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t [B, C, H, W], t int64 [B] -> eps_hat [B, C, H, W]."""
        return self.decode_eps(self.trunk(x, t))


class PDAEDecoder(UNet):
    """eps_theta and G_psi in one module: one trunk pass feeds two decoders (PDAE, section 3.3).

    Everything inherited from :class:`UNet` is the frozen prior; ``label_emb`` and ``shift_*`` are trained.
    """

    TRAINED = ("label_emb", "shift_middle_block", "shift_output_blocks", "shift_out")

    def __init__(self, config: UNetConfig, latent_dim: int) -> None:
        super().__init__(config)
        self.label_emb = nn.Linear(latent_dim, config.time_width)
        self.shift_middle_block = _build_middle(config, with_z=True)
        self.shift_output_blocks = _build_output(config, self.skip_channels, with_z=True)
        self.shift_out = _build_head(config, config.input_channel)

    def decode_gradient(self, features: Features, z: Tensor) -> Tensor:
        """G [B, C, H, W] for z [B, latent_dim]."""
        emb_z = self.label_emb(z.to(self.dtype))
        return _decode(self.shift_middle_block, self.shift_output_blocks, self.shift_out, features, emb_z)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t [B, C, H, W], t int64 [B], z [B, latent_dim] -> (eps_hat, G), each [B, C, H, W]."""
        features = self.trunk(x, t)
        return self.decode_eps(features), self.decode_gradient(features, z)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for name in self.TRAINED for p in getattr(self, name).parameters()]

    def freeze_prior(self) -> PDAEDecoder:
        """Switch off gradients of everything inherited from the prior."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in self.TRAINED)
        return self
