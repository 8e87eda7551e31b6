"""The checks of `arguments` for tensors, and what tells weights apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import as_images, as_number, brief, check_range, own_array, wrong_shape
from .errors import UserError


def as_image_tensor(x: Any, shape: tuple[int, int, int], what: str, picture: bool = True) -> Tensor:
    """Images as float32 [B, C, H, W], from a floating point tensor or what `as_images` takes; ``shape`` is [C, H, W].

    ``picture``: whether their values have to be in [-1, 1], which those of noise need not. UserError for all others.
    """
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(as_images(x, shape, what))
    if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise UserError(wrong_shape(x, shape, what))
    if not x.is_floating_point():
        hint = "; for 0 to 255 pass x / 127.5 - 1" if x.dtype is torch.uint8 else ""
        raise UserError(f"{what} has dtype {x.dtype}; expected floating point values in [-1, 1]{hint}")
    x = as_values(x, what)
    if picture and len(x):
        check_range(*(float(v) for v in x.aminmax()), what)
    return x


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor as it is, an array of numbers as a float32 tensor; UserError for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(own_array(value))
    raise UserError(f"{what} must be a tensor or an array of numbers, not {type(value).__name__}")


def as_values(x: Tensor, what: str) -> Tensor:
    """x as float32 without its history; UserError unless its values are finite numbers."""
    if x.is_complex() or x.dtype is torch.bool:
        raise UserError(f"{what} has dtype {x.dtype}; expected floating point values")
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{what} holds NaN or infinite values")
    return x


def as_weights(weights: Any) -> Tensor:
    """float32 [n] on the CPU from n finite numbers, or from one."""
    if isinstance(weights, (Tensor, np.ndarray)):
        weights = weights.flatten().tolist()
    if isinstance(weights, (str, bytes, dict)):
        raise UserError(f"weights must be numbers, not {brief(weights)}")
    try:
        values = list(weights)
    except TypeError:
        values = [weights]
    return torch.tensor([as_number("a weight", value) for value in values], dtype=torch.float32)


def weights_fingerprint(module: nn.Module, about: Any = None) -> str:
    """40 hexadecimal digits of the weights of ``module`` and of ``about``, anything that JSON can hold."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:40]
