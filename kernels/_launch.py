"""How one Triton kernel launch is described and run. Imports no Triton itself: it costs a third of a second."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what a launcher runs, a test interprets and the ahead-of-time check compiles.

    `arguments` holds tensors, ints and floats by parameter name; `constants` the compile-time parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, torch.Tensor | int | float]
    constants: Mapping[str, int | bool]
    num_warps: int = 4

    @property
    def options(self) -> dict:
        """Compiler options; multiply-add fusion is named because Triton is about to change its default."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def run(launches: list[Launch]) -> None:
    """Queue the launches, in order, on the current stream of their tensors' device."""
    device = next(v.device for v in launches[0].arguments.values() if isinstance(v, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(launches)
    return _run(launches)


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.constants, **launch.options)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132 (an H100) for any other, where plans are only
    inspected."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_share(rows: torch.Tensor | None, x: torch.Tensor) -> tuple[int, int]:
    """(images a row, elements from row to row) of a vector [C] for all images of x, or of [S, C] for as many shares."""
    if rows is None or rows.dim() == 1 or len(rows) == 1:
        return 1, 0  # the only row
    return len(x) // len(rows), rows.stride(0)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
