"""Golden numbers of other projects' code (golden/foreign/README.md) and the rule that rebuilds their weights."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "foreign"


def weights(name: str) -> dict[str, Tensor]:
    """The checkpoint of fixture ``name``, under its own tensor names."""
    shapes = json.loads((FOLDER / f"{name}.keys.json").read_text())
    return {key: _tensor(key, tuple(shape)) for key, shape in shapes.items()}


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) >= 2:
        return r / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.05 * r if key.endswith(".weight") else 0.05 * r


def about(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.lru_cache(maxsize=2)
def numbers(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def listed() -> dict[str, Any]:
    """What golden/foreign/shapes tells of whole released checkpoints, by name."""
    return json.loads((FOLDER / "shapes" / "index.json").read_text())


def shapes(name: str) -> dict[str, Tensor]:
    """Tensors of a released checkpoint without memory: every one is a single zero, expanded."""
    found = json.loads((FOLDER / "shapes" / f"{name}.json").read_text())
    return {key: torch.zeros(()).expand(shape) for key, shape in found.items()}
