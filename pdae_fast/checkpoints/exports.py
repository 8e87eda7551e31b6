"""Writing a prior for other projects: a diffusers pipeline's directory, or one file for improved- or guided-diffusion.

What a format cannot express is an error before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import AnyConfig, DiffAEConfig, PriorConfig, UNetConfig
from ..errors import UserError
from ..files import atomic_write, make_folder
from . import names
from .diffusers import CONFIG, INDEX, SCHEDULER, WEIGHTS
from .directory import save_torch

State = Mapping[str, Tensor]
# The library's version whose configurations these are; later ones read them.
_DIFFUSERS_VERSION = "0.30.0"


def diffusers_paths(directory: Path) -> list[Path]:
    """Every file that :func:`save_diffusers` writes, the weights first."""
    parts = (f"unet/{WEIGHTS}.safetensors", f"unet/{CONFIG}", f"scheduler/{SCHEDULER}", INDEX)
    return [directory / part for part in parts]


def save_diffusers(directory: Path, config: PriorConfig, state: State, dtype: torch.dtype = torch.float32) -> None:
    """Write a DDPMPipeline of a UNet2DModel and a DDPMScheduler, each file whole or not at all."""
    network, scheduler = diffusers_unet(config), diffusers_scheduler(config)
    tensors = names.from_adm(_network(state), names.DIFFUSERS, config.unet)
    weights, *others = diffusers_paths(directory)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for path in (weights, *others):
        make_folder(path.parent)
    with atomic_write(weights) as file:
        file.write(safetensors.torch.save(_as(tensors, dtype), metadata={"format": "pt"}))
    for path, values in zip(others, (network, scheduler, index), strict=True):
        with atomic_write(path, "w") as file:
            file.write(json.dumps(values, indent=2) + "\n")


def save_guided(path: Path, config: PriorConfig, state: State, dtype: torch.dtype = torch.float32) -> None:
    """Write the bare state dict that improved- and guided-diffusion load; .safetensors where ``path`` says so."""
    guided_flags(config)
    tensors = {"label_emb.weight" if k == "class_emb.weight" else k: v for k, v in _network(state).items()}
    tensors = _as(tensors, dtype)
    if path.suffix != ".safetensors":
        save_torch(path, tensors)
        return
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def diffusers_unet(config: AnyConfig) -> dict[str, Any]:
    """config.json of ``config``'s network; UserError with the reason when a UNet2DModel cannot be it."""
    u, what = _prior(config).unet, "a UNet2DModel"
    _refuse(
        what,
        {
            f"its first level is as wide as its time sinusoid ({u.base_channel}), not {u.widths[0]}": u.widths[0]
            != u.base_channel,
            f"its stem is as wide as its first level ({u.widths[0]}), not {u.stem_width}": u.stem_width != u.widths[0],
            "it has no down-sampling by pooling alone": u.downsample == "pool" and u.levels > 1,
            "it has no up-sampling without a convolution": u.upsample == "nearest" and u.levels > 1,
            "it is given t as it is, never scaled": u.time_scale != 1,
            f"its norms have {u.norm_groups} groups at any width, also {min(u.widths)} channels": min(u.widths)
            < u.norm_groups,
            "its middle attention has a norm where time is added": u.middle == "attention"
            and not u.middle_attention_norm
            and not u.use_scale_shift_norm,
        },
    )
    residual_down, residual_up = u.downsample == "residual", u.upsample == "residual"

    def blocks(plain: str, residual: str, attention: str, resample: bool) -> list[str]:
        attends = [2**level in u.attention_resolutions for level in range(u.levels)]
        return [attention if there else residual if resample else plain for there in attends]

    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "sample_size": config.image_size,
        "in_channels": u.input_channel,
        "out_channels": u.out_channels,
        "center_input_sample": u.center_input_sample,
        "time_embedding_type": "positional",
        "time_embedding_dim": u.time_channel,
        "freq_shift": int(u.freq_shift) if u.freq_shift == int(u.freq_shift) else u.freq_shift,
        "flip_sin_to_cos": u.flip_sin_to_cos,
        "down_block_types": blocks("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", residual_down),
        "mid_block_type": None if u.middle == "none" else "UNetMidBlock2D",
        "up_block_types": blocks("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", residual_up)[::-1],
        "block_out_channels": list(u.widths),
        "layers_per_block": u.num_residual_blocks_of_a_block,
        "mid_block_scale_factor": u.middle_scale_factor,
        "downsample_padding": 0 if u.downsample == "conv_asymmetric" else 1,
        "downsample_type": "resnet" if residual_down else "conv",
        "upsample_type": "resnet" if residual_up else "conv",
        "dropout": u.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_width(u, what),
        "norm_num_groups": u.norm_groups,
        # Without it the library leaves the middle attention without a norm where time scales and shifts.
        "attn_norm_num_groups": u.norm_groups if u.use_scale_shift_norm and u.middle_attention_norm else None,
        "norm_eps": u.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if u.use_scale_shift_norm else "default",
        "add_attention": u.middle == "attention",
        "class_embed_type": None,
        "num_class_embeds": u.num_classes,
        "num_train_timesteps": None,
    }


def diffusers_scheduler(config: PriorConfig) -> dict[str, Any]:
    """scheduler_config.json of a DDPMScheduler with ``config``'s process."""
    s = config.schedule
    start, end = s.beta_start, s.beta_end
    if start is None:
        scale = 1 if s.kind == "sigmoid" else 1000 / s.timesteps
        start, end = scale * 1e-4, min(scale * 0.02, 0.999)
    stored = [0.008] * s.timesteps if s.kind == "constant" else None if s.betas is None else list(s.betas)
    kinds = {"cosine": "squaredcos_cap_v2", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid"}
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "num_train_timesteps": s.timesteps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": kinds.get(s.kind, "linear"),
        "trained_betas": stored,
        "variance_type": "learned_range" if config.unet.learn_sigma else "fixed_small",
        "clip_sample": True,
        "prediction_type": config.prediction,
        "rescale_betas_zero_snr": s.zero_terminal_snr,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }


def guided_flags(config: AnyConfig) -> dict[str, Any]:
    """The flags with which improved- or guided-diffusion builds ``config``'s network and process.

    UserError with the reason when neither can.
    """
    u, s = _prior(config).unet, config.schedule
    scaled = u.time_scale != 1
    ways = {("residual", "residual"), ("conv", "conv"), ("pool", "nearest")}
    _refuse(
        "guided-diffusion's U-Net",
        {
            f"its norms have 32 groups and eps 1e-5, not {u.norm_groups} and {u.norm_eps}": (u.norm_groups, u.norm_eps)
            != (32, 1e-5),
            "its time sinusoid starts with the cosine and divides by half its width": not u.flip_sin_to_cos
            or u.freq_shift != 0,
            "its middle block has attention with a norm, and no scale": u.middle != "attention"
            or not u.middle_attention_norm
            or u.middle_scale_factor != 1,
            "it does not centre its input": u.center_input_sample,
            f"its time embedding is {4 * u.base_channel} wide, not {u.time_width}": u.time_width != 4 * u.base_channel,
            f"its stem is {u.widths[0]} or {u.base_channel} wide, not {u.stem_width}": u.stem_width
            not in (u.widths[0], u.base_channel),
            f"it does not resample by {u.downsample} down and {u.upsample} up": (u.downsample, u.upsample) not in ways
            and u.levels > 1,
            "it predicts eps or x_0": config.prediction == "v_prediction",
            "its schedules are linear from 0.1 / T to 20 / T, and cosine": s.kind not in ("linear", "cosine")
            or s.beta_start is not None
            or s.zero_terminal_snr,
            f"it is given t, or t * 1000 / T, not t * {u.time_scale:g}": scaled and u.time_scale != 1000 / s.timesteps,
        },
    )
    return {
        "image_size": config.image_size,
        "num_channels": u.base_channel,
        "channel_mult": ",".join(map(str, u.channel_multiplier)),
        "num_res_blocks": u.num_residual_blocks_of_a_block,
        "attention_resolutions": ",".join(str(config.image_size // rate) for rate in u.attention_resolutions),
        "num_heads": u.num_heads,
        "num_head_channels": u.head_channel,
        "num_heads_upsample": u.num_heads_upsample,
        "use_new_attention_order": u.use_new_attention_order,
        "use_scale_shift_norm": u.use_scale_shift_norm,
        "resblock_updown": u.downsample == "residual",
        "conv_resample": u.downsample != "pool",
        "class_cond": u.num_classes is not None,
        "learn_sigma": u.learn_sigma,
        "dropout": u.dropout,
        "diffusion_steps": s.timesteps,
        "noise_schedule": s.kind,
        "rescale_timesteps": scaled,
        "predict_xstart": config.prediction == "sample",
    }


def _head_width(u: UNetConfig, what: str) -> int | None:
    """attention_head_dim: every attention layer has heads of one width; None is one head."""
    if u.head_channel != -1:
        return u.head_channel
    layers = {width for i, width in enumerate(u.widths) if 2**i in u.attention_resolutions}
    layers |= {u.widths[-1]} if u.middle == "attention" else set()
    upper = u.num_heads if u.num_heads_upsample == -1 else u.num_heads_upsample
    reasons = {
        f"it has as many heads on the way up as down, not {upper} and {u.num_heads}": upper != u.num_heads and layers,
        f"its heads are equally wide in all attention layers, not {u.num_heads} heads at {sorted(layers)} "
        "channels": u.num_heads > 1 and len(layers) > 1,
    }
    _refuse(what, reasons)
    return None if u.num_heads == 1 or not layers else layers.pop() // u.num_heads


def _prior(config: AnyConfig) -> PriorConfig:
    if isinstance(config, PriorConfig):
        return config
    if isinstance(config, DiffAEConfig):
        raise UserError("a Diff-AE autoencoder, which no other project's format here holds; expected a prior")
    raise UserError(
        "a PDAE autoencoder, which no other project's format holds; expected a prior (a PDAE's own is "
        "Prior.from_pretrained(MODEL).save_pretrained(DIR))"
    )


def _refuse(what: str, reasons: Mapping[str, Any]) -> None:
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(f"{what} cannot express this network: {'; '.join(found)}")


def _network(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("unet."): tensor for name, tensor in state.items()}


def _as(state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
