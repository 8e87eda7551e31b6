"""The networks that are timed, their inputs, and how much arithmetic one published step is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdae_fast import PDAE, PDAEConfig, Prior, UNetConfig, available, presets

# Small enough to check every path in seconds; both resamplings, attention with several heads, a skip convolution.
TINY = PDAEConfig(
    image_size=32,
    latent_dim=16,
    encoder_channel=32,
    unet=UNetConfig(
        input_channel=1,
        base_channel=32,
        channel_multiplier=(1, 2),
        num_residual_blocks_of_a_block=1,
        attention_resolutions=(2,),
        num_heads=2,
        dropout=0.1,
    ),
)
CONFIGS = {"tiny": TINY, "tiny3": dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, input_channel=3))}


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Weights by the golden rule: normal noise seeded by each parameter's name and scaled by its fan-in, so that
    every machine builds the same network and activations stay near unit size; G is not zero."""
    for key, parameter in module.named_parameters():
        r = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if parameter.ndim >= 2:
            r = r / math.sqrt(parameter[0].numel())
        elif key.endswith("weight"):  # of a norm
            r = 1 + 0.05 * r
        else:
            r = 0.05 * r
        parameter.copy_(r)
    return module


@functools.lru_cache(maxsize=1)  # the largest is 0.7 GB, and cases come sorted by network
def build(name: str) -> PDAE:
    """The bundled model of that name, else the preset (or tiny test network) with weights by the golden rule."""
    if name in available():
        return PDAE.from_pretrained(name).eval()
    config = CONFIGS.get(name) or presets[name]
    model = PDAE(config)
    fill(model.decoder)
    fill(model.encoder)
    return model.eval()


def inputs(model: PDAE | Prior, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """x [batch, C, H, W] and z [batch, latent_dim] (None of a prior), float32 standard normal, the same on every
    device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *model.image_shape, generator=generator)
    if isinstance(model, Prior):
        return x.to(device), None
    z = torch.randn(batch, model.config.latent_dim, generator=generator)
    return x.to(device), z.to(device)


def flops(model: PDAE, batch: int) -> int:
    """Floating-point operations of the published step (trunk and both decoders), counted without computing it."""
    decoder = copy.deepcopy(model.decoder).to("meta")
    x = torch.empty(batch, *model.image_shape, device="meta")
    t = torch.zeros(batch, dtype=torch.int64, device="meta")
    z = torch.empty(batch, model.config.latent_dim, device="meta")
    # Imports Triton, which tests/kernels must be the first to import.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(x, t, z)
    return counter.get_total_flops()


@dataclass(frozen=True)
class NetworkCase:
    """One network at one batch size on one device, with everything contenders share."""

    network: str
    batch: int
    device: torch.device
    model: PDAE
    x: Tensor
    z: Tensor
    flops: int


def case(network: str, batch: int, device: torch.device) -> NetworkCase:
    model = build(network)
    return NetworkCase(network, batch, device, model, *inputs(model, batch, device), flops(model, batch))
