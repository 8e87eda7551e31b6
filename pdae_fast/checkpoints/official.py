"""Writing the published code's own files, so that a model can go back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import AnyConfig, DiffAEConfig, PDAEConfig, PriorConfig, UNetConfig
from ..errors import UserError
from ..files import atomic_write
from .directory import save_torch

State = Mapping[str, Tensor]
# The fields of UNetConfig that its YAML has, or that follow from the weights.
_PUBLISHED = (
    "input_channel",
    "base_channel",
    "channel_multiplier",
    "num_residual_blocks_of_a_block",
    "attention_resolutions",
    "num_heads",
    "head_channel",
    "use_new_attention_order",
    "dropout",
    "learn_sigma",
    "time_channel",
)
# What the published code calls its encoders and decoders, by image size.
_CLASSES = {64: "CELEBA64", 128: "FFHQ"}


def official_paths(path: Path, config: PDAEConfig | PriorConfig) -> dict[str, Path]:
    """Every file that :func:`save_official` writes for ``path`` (``model.pt``): itself and those beside it."""
    names = {"model": path, "config": path.with_suffix(".yml")}
    if isinstance(config, PDAEConfig):
        present = {"latent": config.latent, "classifier": config.attributes, "statistics": config.latent_statistics}
        names |= {name: path.with_suffix(f".{name}.pt") for name, there in present.items() if there}
    return names


def save_official(
    path: Path, config: PDAEConfig | PriorConfig, state: State, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """Write ``state`` (names of this project) in the published layout; returns the files by what they are.

    A PDAE becomes an autoencoder checkpoint, with its latent DPM, classifier and statistics as files beside it; a
    Prior becomes a prior checkpoint. The raw and the EMA entries hold the same tensors, and ``optimizer`` and
    ``scaler`` are empty: enough for everything but resuming a training run. The YAML beside it holds what the weights
    do not say. Each file is written whole or not at all.
    """
    paths = official_paths(path, config)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): _as(v, dtype) for k, v in state.items() if k.startswith(prefix)}

    if isinstance(config, PriorConfig):
        _save(paths["model"], _entries({}, {"denoise_fn": part("unet.")}))
    else:
        autoencoder = {"encoder": part("encoder."), "decoder": part("decoder.")}
        _save(paths["model"], _entries({}, autoencoder))
        if "latent" in paths:
            mlp = part("latent_denoiser.")
            mlp |= {k.replace(".linear_emb.", ".cond_layers.1."): v for k, v in mlp.items() if ".linear_emb." in k}
            _save(paths["latent"], _entries(autoencoder, {"latent_denoise_fn": mlp}))
        if "classifier" in paths:
            _save(paths["classifier"], _entries(autoencoder, {"classifier": part("classifier.")}))
        if "statistics" in paths:
            _save(paths["statistics"], {k: _as(state[f"latent_{k}"], torch.float32) for k in ("mean", "std")})
    with atomic_write(paths["config"], "w") as file:
        file.write(official_yaml(config))
    return paths


def official_yaml(config: PDAEConfig | PriorConfig) -> str:
    """The published YAML layout of ``config``, with the prior's section and the autoencoder's in one file."""
    unet, pdae = config.unet, isinstance(config, PDAEConfig)
    sections: dict[str, dict[str, Any]] = {
        "dataset_config": {"image_size": config.image_size, "image_channel": unet.input_channel},
        "diffusion_config": {"timesteps": config.schedule.timesteps, "betas_type": config.schedule.kind},
        "denoise_fn_config": {
            "dims": 2,
            "input_channel": unet.input_channel,
            "base_channel": unet.base_channel,
            "channel_multiplier": list(unet.channel_multiplier),
            "num_residual_blocks_of_a_block": unet.num_residual_blocks_of_a_block,
            "attention_resolutions": list(unet.attention_resolutions),
            "num_heads": unet.num_heads,
            "head_channel": unet.head_channel,
            "use_new_attention_order": unet.use_new_attention_order,
            "dropout": unet.dropout,
            "learn_sigma": unet.learn_sigma,
        },
    }
    if config.noise != "normal":
        sections["diffusion_config"]["noise"] = config.noise
    if config.schedule.kind == "linear":
        sections["diffusion_config"] |= {"linear_beta_start": 0.0001, "linear_beta_end": 0.02}
    if pdae:
        sections["dataset_config"]["latent_dim"] = config.latent_dim
        for part in ("encoder", "decoder"):
            sections[f"{part}_config"] = {"latent_dim": config.latent_dim}
            if config.image_size in _CLASSES:
                sections[f"{part}_config"]["model"] = _CLASSES[config.image_size] + part.capitalize()
        if config.latent:
            sections["latent_denoise_fn_config"] = {
                "input_channel": config.latent.latent_dim,
                "model_channel": config.latent.hidden,
                "num_layers": config.latent.layers,
                "time_emb_channel": 64,
                "use_norm": True,
                "dropout": 0.0,
            }
        if config.attributes:
            sections["classifier_config"] = {"attributes": list(config.attributes)}
    # Every JSON scalar and list is YAML, so no YAML writer is needed.
    return "\n".join(
        f"{name}:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in section.items())
        for name, section in sections.items()
    )


def refuse(config: AnyConfig) -> None:
    """UserError when the published layout has no words for ``config``: its network is ADM's, its output eps."""
    if isinstance(config, DiffAEConfig):
        raise UserError("a Diff-AE, which the published PDAE layout has no place for; expected a PDAE or a prior")
    unet, schedule = config.unet, config.schedule
    own = {f.name: f.default for f in dataclasses.fields(UNetConfig) if f.name not in _PUBLISHED}
    other = [name for name, default in own.items() if getattr(unet, name) != default]
    if any(not isinstance(m, int) for m in unet.channel_multiplier):
        other.append("channel_multiplier")
    if config.prediction != "epsilon":
        other.append("prediction")
    if schedule.kind not in ("linear", "cosine", "constant") or schedule.beta_start or schedule.zero_terminal_snr:
        other.append("schedule")
    if other:
        raise UserError(f"the published PDAE layout cannot express this model's {', '.join(other)}; expected ADM's")


def limits(config: PDAEConfig | PriorConfig) -> list[str]:
    """What the published code, as released, cannot build of ``config``."""
    unet, found = config.unet, []
    if unet.time_channel not in (None, 4 * unet.base_channel):
        found.append(f"its time embedding is always {4 * unet.base_channel} wide, not {unet.time_channel}")
    if isinstance(config, PDAEConfig):
        if config.image_size not in _CLASSES:
            found.append(f"it has no encoder class for {config.image_size}x{config.image_size} images")
        elif (unet.input_channel, config.encoder_channel) != (3, 64):
            found.append("its encoders are for 3 channels and 64 wide")
    return found


def _entries(fixed: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: state for name, state in trained.items() for key in (name, f"ema_{name}")}
    return {"step": 0, **fixed, **both, "optimizer": {}, "scaler": {}}


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _save(path: Path, contents: Mapping[str, Any]) -> None:
    save_torch(path, dict(contents))
