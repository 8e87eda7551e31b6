"""Diff-AE's golden networks as its trainer would have saved them, and as this project's model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreign_golden import numbers, weights
from pdae_fast import DiffAE

NAMES = ("diffae-autoenc", "diffae-latent")


def trained(name: str, **extra: Any) -> dict[str, Any]:
    """A checkpoint of its trainer: both copies of the model, the buffers, and ``extra``."""
    state, g = weights(name), numbers(name)
    for key in state:
        if ".cond_layers.1." in key:  # a second name of one tensor
            state[key] = state[key.replace(".cond_layers.1.", ".linear_emb.")]
        elif key.startswith("conds_"):
            state[key] = g[f"file.{key}"]
    return {"state_dict": state, "global_step": 9, "epoch": 1, **extra}


def averaged(name: str) -> dict[str, Tensor]:
    """The model's own state dict, as people share it."""
    state = trained(name)["state_dict"]
    return {k.removeprefix("ema_model."): v for k, v in state.items() if k.startswith("ema_model.")}


@functools.lru_cache(maxsize=2)
def model(name: str) -> DiffAE:
    """As the reader reads it; not to be changed."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trained(name), Path(folder) / "last.ckpt")
        return DiffAE.from_pretrained(Path(folder) / "last.ckpt")
