"""Golden vectors of the published code (tests/golden/README.md) and the rule that rebuilds their weights."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pdae_fast import PDAE, LatentConfig, PDAEConfig, UNetConfig
from pdae_fast.models import LatentMLP

FOLDER = Path(__file__).parent / "golden"
NETWORKS = ("tiny32", "heads64", "celeba64")


def fill(module: nn.Module) -> nn.Module:
    """Weights by the golden rule; names are those inside ``module``."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            r = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            if parameter.ndim >= 2:
                parameter.copy_(r / math.sqrt(parameter[0].numel()))
            elif key.endswith("weight"):  # the only one-dimensional weights are those of norms
                parameter.copy_(1 + 0.05 * r)
            else:
                parameter.copy_(0.05 * r)
    return module.eval()


@functools.lru_cache(maxsize=4)
def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def pdae(name: str) -> PDAE:
    _, metadata = vectors(name)
    config = PDAEConfig(
        image_size=int(metadata["size"]),
        latent_dim=int(metadata["latent_dim"]),
        unet=UNetConfig(**json.loads(metadata["unet"])),
    )
    model = PDAE(config)
    fill(model.decoder)
    fill(model.encoder)
    return model.eval()


def latent_mlp() -> LatentMLP:
    _, metadata = vectors("latent_small")
    return fill(LatentMLP(LatentConfig(int(metadata["latent_dim"]), int(metadata["hidden"]), int(metadata["layers"]))))


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64; NaN never passes a comparison."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
