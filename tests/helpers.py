"""Small models and data that the tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from golden_rule import fill
from pdae_fast import PDAE, LatentConfig, PDAEConfig, Prior, UNetConfig

TINY_UNET = UNetConfig(
    input_channel=1,
    base_channel=32,
    channel_multiplier=(1, 1),
    num_residual_blocks_of_a_block=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.1,
)
TINY = PDAEConfig(image_size=32, latent_dim=16, encoder_channel=32, unet=TINY_UNET)
# The same with everything that can sit on top of z.
TINY_FULL = dataclasses.replace(
    TINY, latent=LatentConfig(16, 32, 3), attributes=("round", "dark"), latent_statistics=True
)


def tiny_pdae(config: PDAEConfig = TINY) -> PDAE:
    """Random weights by the golden rule (G is not zero)."""
    model = fill(PDAE(config))
    if config.latent_statistics:
        generator = torch.Generator().manual_seed(5)
        model.latent_mean.copy_(torch.randn(config.latent_dim, generator=generator))
        model.latent_std.copy_(torch.rand(config.latent_dim, generator=generator) + 0.5)
    return model


def tiny_prior(config: PDAEConfig = TINY) -> Prior:
    return fill(Prior(config.prior))


def images(count: int, config: PDAEConfig = TINY, seed: int = 0) -> torch.Tensor:
    shape = (count, config.unet.input_channel, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image_folder(path: Path, count: int, size: int = 32) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (size, size), dtype=np.uint8)).save(path / f"{i:02d}.png")
    return path
