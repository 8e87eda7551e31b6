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


def check_rows(op: str, name: str, rows: torch.Tensor, channels: int, x: torch.Tensor) -> None:
    """Raise ValueError unless `rows` is a vector of so many channels, or has one for every equal share of x's images in
    their order: [S, channels], S a divisor of x's batch."""
    lead = () if rows.dim() != 2 or not len(rows) or len(x) % len(rows) else (len(rows),)
    check_like(op, name, rows, (*lead, channels), x.device)


def unit_rows(rows: torch.Tensor | None) -> torch.Tensor | None:
    """`rows` with unit stride along the channels."""
    return rows if rows is None or rows.stride(-1) == 1 else rows.contiguous()


def spread(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """[C] as it is, [S, C] as one row an image."""
    return rows if rows.dim() == 1 else rows.repeat_interleave(batch // len(rows), 0)


def gathered(rows: torch.Tensor, shape: tuple) -> torch.Tensor:
    """One row an image summed to the `shape` that `spread` was given: the transpose of that."""
    return rows.reshape(shape[0] if len(shape) == 2 else 1, -1, rows.shape[1]).sum(1).view(shape)


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


def count_splits(pixels: int, wanted: int) -> int:
    """The number of splits, none empty, when pixels are cut into at most `wanted` of equal length but the last."""
    chunk = -(-pixels // wanted)
    return -(-pixels // chunk)


def check_partial(op: str, x: torch.Tensor, part: int, splits: int) -> None:
    """Raise ValueError unless partial statistics of `part` channels, a power of two up to 32 that divides those of
    x, and of `splits` splits of its pixels exist."""
    if part < 1 or part & (part - 1) or part > 32 or x.shape[1] % part:
        raise ValueError(f"{op}: {x.shape[1]} channels do not fall into parts of {part}")
    pixels = x.shape[2] * x.shape[3]
    if splits < 1 or count_splits(pixels, splits) != splits:
        raise ValueError(f"{op}: {pixels} pixels do not fall into {splits} splits")


def empty_partial(x: torch.Tensor, part: int, splits: int) -> torch.Tensor:
    """Uninitialised float32 [B, C / part, splits, 2]: partial statistics of x."""
    return torch.empty((x.shape[0], x.shape[1] // part, splits, 2), dtype=torch.float32, device=x.device)
