"""A run's checkpoint: one file, written whole or not at all, read without executing anything from it."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME, save_torch
from ..errors import UserError

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = "pdae_fast-run-1"


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write the checkpoint, whole or not at all; UserError when the system refuses."""
    save_torch(path, {"format": FORMAT, **contents})


def discard_unfinished(out: Path) -> None:
    """Remove what a process that was killed while writing left in ``out``: nothing else removes it, and a checkpoint
    can be gigabytes. Of the names that atomic_write gives, only those of a run's own files."""
    for name in (CHECKPOINT_NAME, WEIGHTS_NAME, CONFIG_NAME, "train.json", "log.jsonl"):
        for path in out.glob(f".{name}.*.tmp"):
            with suppress(OSError):
                path.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; UserError when there is none, or when it is something else."""
    if not path.is_file():
        raise UserError(
            f"{path}: nothing to resume; expected the checkpoint of an earlier run (drop --resume to start)"
        )
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path}: not the checkpoint of a training run of pdae_fast")
    return contents
