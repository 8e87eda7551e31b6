"""What sits on top of z, from files of its own: latent DPM, attribute classifier, latent statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LatentConfig, PriorConfig
from ..errors import UserError
from . import infer
from .attributes import attribute_names
from .directory import Loaded, check_finite
from .foreign import ForeignFile, same
from .kinds import Kind
from .settings import Settings


def attach_latent(loaded: Loaded, file: ForeignFile, settings: Settings) -> None:
    """Make the latent DPM of ``file`` part of ``loaded``."""
    config, state = _latent(file)
    _check_dimensions(loaded, file, config.latent_dim, "latent DPM")
    _note_other_encoder(loaded, file)
    for name in ("hidden", "layers"):
        settings.check(name, getattr(config, name), file.where, "the latent DPM's weights")
    _replace(loaded, "latent_denoiser.", state)
    loaded.config = dataclasses.replace(loaded.config, latent=config)


def attach_classifier(
    loaded: Loaded, file: ForeignFile, settings: Settings, attributes: str | Path | Sequence[str] | None
) -> None:
    """Make the linear attribute classifier of ``file`` part of ``loaded``."""
    if not file.has("classifier"):
        raise UserError(f"{file.where}: {file.kind.value}; expected an attribute classifier")
    state = file.network("classifier")
    weight = infer.need(state, "weight", 2, file.where)
    _check_dimensions(loaded, file, weight.shape[1], "classifier")
    _note_other_encoder(loaded, file)
    given = attributes if attributes is not None else settings.get("attributes")
    names, source = attribute_names(given, weight.shape[0], file.where)
    if given is None:
        loaded.notes.append(f"attribute names: {source}")
    _replace(loaded, "classifier.", state)
    loaded.config = dataclasses.replace(loaded.config, attributes=names)


def attach_statistics(loaded: Loaded, file: ForeignFile) -> None:
    """Make the latents' mean and standard deviation part of ``loaded``, unless a file before this one said them."""
    found: dict[str, Tensor] = {}
    for name, value in _statistics(file).items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"{file.where}: {file.kind.value}, no tensor {name} in it; expected latent statistics")
        found[f"latent_{name}"] = value.float().squeeze()
        _check_dimensions(loaded, file, value.numel(), name)
    check_finite(found, file.where)
    if not bool((found["latent_std"] > 0).all()):
        raise UserError(f"{file.where}: std has values that are not positive; expected a standard deviation")
    found = {name: value.reshape(-1) for name, value in found.items()}
    if loaded.config.latent_statistics and file.kind is not Kind.STATISTICS:
        if any(not torch.allclose(loaded.state[name].float(), value, rtol=1e-3) for name, value in found.items()):
            loaded.notes.append(f"{file.where} was trained on z normalised by another mean and std than these")
        return
    loaded.state |= found
    loaded.config = dataclasses.replace(loaded.config, latent_statistics=True)


def has_statistics(file: ForeignFile | None) -> bool:
    return file is not None and None not in _statistics(file).values()


def _statistics(file: ForeignFile) -> dict[str, Any]:
    """What a file of statistics, this project's state dict, or Diff-AE's trainer in its buffers has as mean and std."""
    inner = file.contents.get("state_dict")
    places = (file.contents, inner if isinstance(inner, Mapping) else {})

    def find(name: str) -> Any:
        keys = (name, f"latent_{name}", f"conds_{name}")
        return next((place[key] for place in places for key in keys if key in place), None)

    return {name: find(name) for name in ("mean", "std")}


def _latent(file: ForeignFile) -> tuple[LatentConfig, dict[str, Tensor]]:
    if not file.has("latent_denoise_fn"):
        raise UserError(f"{file.where}: {file.kind.value}; expected a latent DPM")
    state = file.network("latent_denoise_fn")
    for name in [name for name in state if ".cond_layers.1." in name]:
        # Two names of one tensor; a writer may have kept either.
        tensor, other = state.pop(name), name.replace(".cond_layers.1.", ".linear_emb.")
        if other in state and not same(state[other], tensor):
            raise UserError(f"{file.where}: {name} and {other} differ; expected one tensor under two names")
        state[other] = tensor
    return infer.latent_config(state, file.where), state


def _check_dimensions(loaded: Loaded, file: ForeignFile, found: int, what: str) -> None:
    if isinstance(loaded.config, PriorConfig):
        raise UserError(f"{loaded.origin}: a prior has no z; the {what} of {file.where} goes with an autoencoder")
    if found != loaded.config.latent_dim:
        raise UserError(
            f"{file.where}: its {what} is for z of {found} dimensions; "
            f"{loaded.origin} has z of {loaded.config.latent_dim} dimensions"
        )


def _note_other_encoder(loaded: Loaded, file: ForeignFile) -> None:
    """These files carry a copy of the autoencoder they were trained on; say so when it is another one."""
    if file.where == loaded.origin or not file.has("encoder"):
        return
    encoder = file.entries["ema_encoder" if "ema_encoder" in file.entries else "encoder"][1]
    own = {k.removeprefix("encoder."): v for k, v in loaded.state.items() if k.startswith("encoder.")}
    last = max((k for k, v in own.items() if v.ndim == 2), default="out.3.weight")  # the layer that z comes from
    theirs = encoder.get(last) if isinstance(encoder, dict) else None
    if isinstance(theirs, Tensor) and not same(theirs.to(torch.float32), own[last].float()):
        loaded.notes.append(f"{file.where} was trained on z of another encoder than this one")


def _replace(loaded: Loaded, prefix: str, state: dict[str, Tensor]) -> None:
    kept = {name: tensor for name, tensor in loaded.state.items() if not name.startswith(prefix)}
    loaded.state = kept | {f"{prefix}{name}": tensor for name, tensor in state.items()}
