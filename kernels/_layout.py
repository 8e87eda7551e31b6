"""Memory layout and argument checks shared by the ops. Every op works on dense NCHW or channels-last
images."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_image(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is a floating-point [B, C, H, W] tensor."""
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be [B, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_like(op: str, name: str, x: torch.Tensor, shape: tuple, device: torch.device) -> None:
    """Raise ValueError unless x is a floating-point tensor of this shape on this device."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {device}")


def is_channels_last(x: torch.Tensor) -> bool:
    """The layout an op answers in: channels-last when channels are the fastest axis and NCHW would need a
    copy.

    One channel counts as NCHW, so that a copy made by `to_layout` is classed as its original was.
    """
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def to_layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself when it is dense in this layout, else a copy."""
    return x.contiguous(memory_format=memory_format(channels_last))


def empty_image(x: torch.Tensor, shape: tuple, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised [B, C, H, W] tensor of `shape` in x's layout, device and (unless given) dtype."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x)))
