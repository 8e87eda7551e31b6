"""The project's own format: a directory with config.json and model.safetensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .. import config as configs
from ..config import AnyConfig
from ..errors import UserError
from ..files import atomic_write

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DIGEST = "sha256"  # of all tensors, in the metadata of their file: a safetensors file has no check sum of its own
BUNDLED = Path(__file__).resolve().parent.parent / "pretrained"


@dataclass
class Loaded:
    """A model as read: its configuration, its tensors under this project's names, and where they came from.

    ``kind`` says in words what the source is, ``weights`` which of its weights these are, and ``notes`` what neither
    the file nor the user said and was assumed.
    """

    config: AnyConfig
    state: dict[str, Tensor]
    origin: str
    kind: str = "a saved directory"
    weights: str = "as stored"
    notes: list[str] = field(default_factory=list)


def available() -> list[str]:
    """Names of the bundled models, for ``from_pretrained``."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG_NAME}"))


def save_torch(path: Path, contents: Any) -> None:
    """``torch.save``, whole or not at all; UserError when the system refuses (disk full, read-only)."""
    with atomic_write(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # PyTorch's archive writer hides what went wrong behind an error of its own when it closes.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file; UserError when it is missing, truncated or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected model weights")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        # Of extremes, which a NaN is one of: no map of booleans is made.
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{where}: {name} holds {bad} NaN or infinite values; expected finite weights")


def load_directory(directory: Path) -> Loaded:
    """Read a directory written by :func:`save_directory`."""
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(
            f"{directory}: no {CONFIG_NAME} in it; expected what save_pretrained wrote, or a diffusers model"
        )
    config, path = configs.load(directory / CONFIG_NAME), directory / WEIGHTS_NAME
    state = read_safetensors(path)
    odd = next((name for name, tensor in state.items() if not tensor.is_floating_point()), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} is {state[odd].dtype}; expected floating-point weights")
    with safetensors.safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get(DIGEST)
    # Models saved before there were digests have none.
    if written not in (None, digest(state)):
        raise UserError(f"{path}: damaged or changed: its tensors are not those that were written (see its {DIGEST})")
    check_finite(state, str(path))
    return Loaded(config, state, str(directory))


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, whatever their order."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_directory(
    directory: str | Path,
    config: AnyConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and model.safetensors, each beside its place and then renamed."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be created ({error.strerror})") from None
    tensors = {
        k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()
    }
    # The weights go first: a reader that finds the new config finds its weights too.
    with atomic_write(directory / WEIGHTS_NAME) as file:
        # One entry alone: several would be written in any order, and equal models would be other files.
        file.write(safetensors.torch.save(tensors, metadata={DIGEST: digest(tensors)}))
    with atomic_write(directory / CONFIG_NAME, "w") as file:
        file.write(configs.dumps(config))
