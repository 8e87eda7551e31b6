"""Files in the formats of PDAE, Diff-AE and guided-diffusion, made from small random models of known configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdae_fast import PDAE, PDAEConfig, Prior, PriorConfig, UNetConfig
from pdae_fast.config import LatentConfig
from pdae_fast.models import LatentMLP


def unet(**changes: Any) -> UNetConfig:
    small: dict[str, Any] = {
        "base_channel": 32,
        "channel_multiplier": (1, 2),
        "num_residual_blocks_of_a_block": 1,
        "attention_resolutions": (2,),
    }
    return UNetConfig(**small | changes)


def config(image_size: int = 32, latent_dim: int = 12, **changes: Any) -> PDAEConfig:
    return PDAEConfig(image_size=image_size, latent_dim=latent_dim, encoder_channel=32, unet=unet(**changes))


# Across heads, layouts, head widths, depths, block counts, channels, image and latent sizes, attention positions.
PDAES = {
    "rgb32-heads4": config(32, 12, num_heads=4),
    "grey32-new-two-rates": config(
        32, 7, input_channel=1, num_heads=2, use_new_attention_order=True, attention_resolutions=(1, 2)
    ),
    "rgb64-head-channel": config(64, 64, channel_multiplier=(1, 1, 2), attention_resolutions=(4,), head_channel=16),
    "grey64-two-blocks": config(
        64, 5, input_channel=1, num_residual_blocks_of_a_block=2, attention_resolutions=(), num_heads=8
    ),
    "rgb32-three-blocks-sigma": config(
        32, 12, channel_multiplier=(2, 1), num_residual_blocks_of_a_block=3, learn_sigma=True, dropout=0.3
    ),
    "grey128-one-level": config(128, 3, input_channel=1, channel_multiplier=(1,), attention_resolutions=()),
    "rgb256": config(256, 12, channel_multiplier=(1, 1, 1, 1), attention_resolutions=(4, 8)),
}


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random weights everywhere, the zero-initialised convolutions included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.05 * noise + (1.0 if name.endswith("weight") else 0.0)
    return module.eval()


def pdae(configuration: PDAEConfig, seed: int = 0) -> PDAE:
    return fill(PDAE(configuration), seed)


def prior(configuration: PriorConfig, seed: int = 0) -> Prior:
    return fill(Prior(configuration), seed)


def raw(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimiser's copy would be: close to the EMA, not equal."""
    return {name: tensor + 0.01 for name, tensor in state.items()}


def pair(name: str, ema: dict[str, Tensor]) -> dict[str, Any]:
    return {name: raw(ema), f"ema_{name}": ema}


_RESUME = {"optimizer": {"state": {}, "param_groups": []}, "scaler": {"scale": 65536.0}}


def autoencoder(model: PDAE) -> dict[str, Any]:
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    return {"step": 7, **pair("encoder", encoder), **pair("decoder", decoder), **_RESUME}


def pdae_prior(model: Prior) -> dict[str, Any]:
    return {"step": 7, **pair("denoise_fn", model.unet.state_dict()), **_RESUME}


def fixed(model: PDAE) -> dict[str, Any]:
    return {"encoder": model.encoder.state_dict(), "decoder": model.decoder.state_dict()}


def twice_named(mlp: LatentMLP) -> dict[str, Tensor]:
    """The MLP's state with each conditioning Linear under its two names, as in the published files."""
    state = mlp.state_dict()
    aliases = {k.replace("linear_emb", "cond_layers.1"): v for k, v in state.items() if "linear_emb" in k}
    return {**state, **aliases}


def latent_dpm(model: PDAE, layers: int = 3, hidden: int = 16) -> tuple[LatentMLP, dict[str, Any]]:
    mlp = fill(LatentMLP(LatentConfig(model.config.latent_dim, hidden, layers)), 3)
    return mlp, {"step": 7, **fixed(model), **pair("latent_denoise_fn", twice_named(mlp)), **_RESUME}


def classifier(model: PDAE, attributes: int = 3) -> tuple[nn.Linear, dict[str, Any]]:
    linear = fill(nn.Linear(model.config.latent_dim, attributes), 4)
    return linear, {"step": 7, **fixed(model), **pair("classifier", linear.state_dict()), **_RESUME}


def statistics(model: PDAE) -> dict[str, Tensor]:
    D = model.config.latent_dim
    return {"mean": torch.linspace(-1, 1, D), "std": torch.linspace(0.5, 2, D)}


def diffae(model: Prior, **extra: Any) -> dict[str, Any]:
    ema = model.unet.state_dict()
    state = {f"model.{k}": v for k, v in raw(ema).items()} | {f"ema_model.{k}": v for k, v in ema.items()}
    return {"state_dict": state, "global_step": 9, "epoch": 1, **extra}


def yaml_tree(configuration: PDAEConfig | PriorConfig, **changes: Any) -> dict[str, Any]:
    """The sections of a published configuration that describe the networks, among others that do not."""
    u = configuration.unet
    section = {
        "model": "SomeDenoiseFn",
        "input_channel": u.input_channel,
        "base_channel": u.base_channel,
        "channel_multiplier": list(u.channel_multiplier),
        "num_residual_blocks_of_a_block": u.num_residual_blocks_of_a_block,
        "attention_resolutions": list(u.attention_resolutions),
        "num_heads": u.num_heads,
        "head_channel": u.head_channel,
        "use_new_attention_order": u.use_new_attention_order,
        "dropout": u.dropout,
    }
    return {
        "dataset_config": {"name": "some", "image_size": configuration.image_size},
        "diffusion_config": {"timesteps": 1000, "betas_type": "linear", "linear_beta_end": 0.02},
        "denoise_fn_config": section | changes,
        "latent_denoise_fn_config": {"input_channel": 512, "dropout": 0.0, "time_emb_channel": 64},
        "optimizer_config": {"lr": "1e-4", "adam_betas": "(0.9, 0.999)"},
    }


def save(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path
