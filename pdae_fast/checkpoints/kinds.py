"""What a foreign file is, told from its top-level names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .unpickle import Inert, describe
from .wrappers import strip

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Kind(Enum):
    """Every file that is recognised; the value is how a message calls it."""

    AUTOENCODER = "a PDAE autoencoder"
    PRIOR = "a PDAE prior"
    LATENT = "a PDAE latent DPM"
    CLASSIFIER = "a PDAE attribute classifier"
    STATISTICS = "a file of latent statistics"
    DIFFAE = "a Diff-AE DDPM"
    DIFFAE_AUTOENCODER = "a Diff-AE autoencoder"
    DIFFAE_ENCODER = "a Diff-AE encoder alone"
    DIFFAE_CLASSIFIER = "a Diff-AE attribute classifier"
    UNET = "a guided-diffusion U-Net"
    DIFFUSERS = "a diffusers UNet2DModel"
    DDIM = "a U-Net under the names of ermongroup/ddim"
    DECODER = "a PDAE decoder without its encoder"
    ENCODER = "a PDAE encoder alone"
    # What follows is recognised only to be refused by name.
    OPTIMIZER = "an optimiser's state"
    UNET_CLASSIFIER = "a guided-diffusion noisy-image classifier"
    RUN = "the resume point of a pdae_fast training run"
    DIFFUSERS_OTHER = "a diffusers model that is no UNet2DModel"
    LUCIDRAINS = "a denoising-diffusion-pytorch (lucidrains) model"
    LATENT_DIFFUSION = "a latent diffusion (Stable Diffusion) model"
    UNKNOWN = "not a checkpoint known here"


MODELS = (
    "expected a PDAE autoencoder, prior, latent DPM or classifier file, a Diff-AE .ckpt, or a U-Net of "
    "guided-diffusion, improved-diffusion, diffusers or ddim"
)
REFUSED: dict[Kind, str] = {
    Kind.STATISTICS: "expected a model; add these to one with --latent FILE --statistics FILE (latent=, statistics=)",
    Kind.ENCODER: "expected a model; it goes with a decoder's file as --encoder FILE (encoder=)",
    Kind.OPTIMIZER: "expected model weights (guided-diffusion keeps them in model*.pt or ema_*.pt, not in opt*.pt)",
    Kind.DIFFAE_ENCODER: "expected a model; it goes with a U-Net's file as --encoder FILE (encoder=)",
    Kind.DIFFAE_CLASSIFIER: "expected a model; add it to one with --classifier FILE (classifier=)",
    Kind.UNET_CLASSIFIER: MODELS,
    Kind.RUN: "expected the model that the run saved in the same folder",
    Kind.DIFFUSERS: "expected its config.json beside it, or the directory that it comes from",
    Kind.DIFFUSERS_OTHER: MODELS,
    Kind.LUCIDRAINS: MODELS,
    Kind.LATENT_DIFFUSION: MODELS,
}

_Test = Callable[[Mapping[str, Any]], bool]


def _any(*names: str) -> _Test:
    return lambda c: any(name in c for name in names)


def _all(*names: str) -> _Test:
    return lambda c: all(name in c for name in names)


def _prefix(*prefixes: str) -> _Test:
    return lambda c: any(isinstance(name, str) and name.startswith(prefixes) for name in c)


def _and(*tests: _Test) -> _Test:
    return lambda c: all(test(c) for test in tests)


def _not(test: _Test) -> _Test:
    return lambda c: not test(c)


def _names(*parts: str) -> _Test:
    return lambda c: any(part in name for name in c for part in parts if isinstance(name, str))


def _in_state_dict(*tests: _Test) -> _Test:
    def inside(contents: Mapping[str, Any]) -> bool:
        state = contents.get("state_dict")
        return isinstance(state, Mapping) and _and(*tests)(state)

    return inside


def _in_entry(entry: str, name: str) -> _Test:
    return lambda c: isinstance(c.get(entry), Mapping) and name in c[entry]


_UNET = _and(_all("time_embed.0.weight"), _prefix("input_blocks.0."))
_DIFFAE_MODEL = _prefix("model.", "ema_model.")
_DIFFAE_AUTOENCODER = _names("time_embed.time_embed.", "cond_emb_layers.", "latent_net.", "model.encoder.")

# The first row that holds decides: a row may rely on the ones above it.
_TABLE: tuple[tuple[Kind, _Test], ...] = (
    (Kind.RUN, lambda c: str(c.get("format", "")).startswith("pdae_fast-run")),
    (Kind.OPTIMIZER, _all("state", "param_groups")),
    (Kind.DIFFAE_CLASSIFIER, _in_state_dict(_prefix("classifier.", "ema_classifier."))),
    (Kind.DIFFAE_AUTOENCODER, _in_state_dict(_DIFFAE_MODEL, _DIFFAE_AUTOENCODER)),
    (Kind.DIFFAE, _in_state_dict(_DIFFAE_MODEL, _names("model.time_embed.0."))),
    (Kind.DIFFAE_AUTOENCODER, _names("time_embed.time_embed.", "cond_emb_layers.")),
    (Kind.DIFFAE_AUTOENCODER, _prefix("latent_net.")),
    (Kind.DIFFAE_AUTOENCODER, _in_entry("encoder", "input_blocks.0.0.weight")),
    (Kind.LATENT, _any("latent_denoise_fn", "ema_latent_denoise_fn")),
    (Kind.CLASSIFIER, _any("classifier", "ema_classifier")),
    (Kind.AUTOENCODER, _and(_any("decoder", "ema_decoder"), _any("encoder", "ema_encoder"))),
    (Kind.DECODER, _any("decoder", "ema_decoder")),
    (Kind.ENCODER, _any("encoder", "ema_encoder")),
    (Kind.PRIOR, _any("denoise_fn", "ema_denoise_fn")),
    (Kind.STATISTICS, _all("mean", "std")),
    (Kind.STATISTICS, _all("conds_mean", "conds_std")),
    # Flat files: the names are those of one network.
    (Kind.DECODER, _and(_UNET, _prefix("shift_middle_block."))),
    (Kind.UNET, _and(_UNET, _prefix("output_blocks."))),
    (Kind.UNET_CLASSIFIER, _and(_UNET, _not(_prefix("output_blocks.")))),
    (Kind.ENCODER, _all("encoder.0.weight")),
    (Kind.DIFFAE_ENCODER, _all("input_blocks.0.0.weight", "out.3.weight")),
    (Kind.LATENT, _all("time_embed.0.weight", "layers.0.linear.weight")),
    (Kind.LATENT_DIFFUSION, _prefix("model.diffusion_model.", "diffusion_model.", "first_stage_model.")),
    (Kind.DIFFUSERS_OTHER, _names("transformer_blocks.", "encoder.down_blocks.", "encoder_hid", "add_embedding.")),
    (Kind.DIFFUSERS, _and(_prefix("down_blocks.0."), _prefix("conv_in."), _prefix("up_blocks."))),
    (Kind.DIFFUSERS_OTHER, _prefix("down_blocks.", "controlnet_")),
    (Kind.DDIM, _and(_all("temb.dense.0.weight"), _prefix("down.0."), _prefix("up.0."))),
    (Kind.LUCIDRAINS, _and(_all("init_conv.weight"), _prefix("downs.0."))),
)


def identify(contents: Mapping[str, Any]) -> Kind:
    """What the file with these (unwrapped) contents is; ``Kind.UNKNOWN`` when nothing fits."""
    return next((kind for kind, test in _TABLE if test(contents)), Kind.UNKNOWN)


def refusal(kind: Kind, contents: Mapping[str, Any], where: str) -> UserError:
    """The error for a file that is recognised and of no use here, or not recognised at all."""
    if kind is not Kind.UNKNOWN:
        return UserError(f"{where}: {kind.value}; {REFUSED.get(kind, MODELS)}")
    names = [str(name) for name in contents]
    if isinstance(contents.get("state_dict"), Mapping):
        names = [str(name) for name in contents["state_dict"]]
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    # A whole pickled module where its weights should be.
    objects = [f"; {name} is {describe(value)}" for name, value in contents.items() if isinstance(value, Inert)]
    return UserError(f"{where}: {kind.value} (it holds {listed or 'nothing'}{''.join(objects[:1])}); {MODELS}")


def as_state(value: Any, entry: str, where: str) -> dict[str, Tensor]:
    """``value`` as a state dict of floating-point tensors; UserError naming the entry or tensor that is not one.

    ``entry`` is its name in the file, empty when the file is nothing but this state dict.
    """
    if not isinstance(value, Mapping) or isinstance(value, Inert):
        raise UserError(f"{where}: {entry or 'it'} is {describe(value)}; expected a state_dict (names and tensors)")
    state, prefix = strip(value), f"{entry}." if entry else ""
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise UserError(f"{where}: {entry or 'it'} has the key {name!r}; expected names of tensors")
        if not isinstance(tensor, Tensor):
            raise UserError(f"{where}: {prefix}{name} is {describe(tensor)}; expected a tensor")
        if tensor.dtype not in FLOATS or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UserError(f"{where}: {prefix}{name} is {_type(tensor)}; expected floating-point weights")
    return state


def _type(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    return str(tensor.dtype) if tensor.layout is torch.strided else f"sparse ({tensor.layout})"
