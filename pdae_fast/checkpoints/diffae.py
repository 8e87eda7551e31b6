"""Diff-AE's autoencoder, in one file or in parts: which tensor belongs to which network, under which name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The networks of its model besides the U-Net, by the prefix of their tensors.
_PARTS = {"encoder.": "encoder", "latent_net.": "latent_denoise_fn"}
_NETWORKS = ("encoder", "latent_denoise_fn", "classifier")
# Of the two copies of the model in a file of its trainer, and of its classifier.
_COPIES = {"model": "", "ema_model": "ema_"}


def entries(contents: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The networks in a file of its trainer, or in a state dict of the model, its own or this project's: network ->
    (name in the file, tensors).

    The U-Net is called "unet"; an entry that begins with "ema_" holds averaged weights.
    """
    state = contents.get("state_dict")
    if not isinstance(state, Mapping):
        return _split(contents, "", "")
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for prefix, which in _COPIES.items():
        found |= _split(_under(state, f"{prefix}."), prefix, which)
    for name in ("classifier", "ema_classifier"):
        if part := _under(state, f"{name}."):
            found[name] = name, part
    return found


def _split(state: Mapping[str, Any], label: str, which: str) -> dict[str, tuple[str, dict[str, Any]]]:
    parts = {name: _under(state, prefix) for prefix, name in _PARTS.items()}
    # A flat state dict comes with what looks like PDAE's networks taken together.
    parts |= {name: dict(state[name]) for name in _NETWORKS if isinstance(state.get(name), Mapping)}
    parts["unet"] = _under(state, "unet.") or {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and not name.startswith(tuple(_PARTS)) and isinstance(value, Tensor)
    }
    label = f"{label}." if label else ""
    names = {"unet": label.removesuffix("."), "latent_denoise_fn": f"{label}latent_net"}
    return {f"{which}{name}": (names.get(name, f"{label}{name}"), part) for name, part in parts.items() if part}


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if isinstance(k, str) and k.startswith(prefix)}


def unet_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors under the names of this project's."""

    def renamed(name: str) -> str:
        return name.replace("time_embed.time_embed.", "time_embed.").replace(".cond_emb_layers.", ".emb_z_layers.")

    return {renamed(name): tensor for name, tensor in state.items()}
