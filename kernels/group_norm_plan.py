"""Which kernels of group_norm_triton.py a call launches, and with what blocks. Imports Triton.

Two ways through the forward pass (`group_norm_launches` chooses):
* fused: one program a group reads it, then normalises it, from registers where it fits there, else from
  cache. One launch.
* split: channel statistics with several programs a channel, then one small merge per group that also folds
  the weight, the AdaGN scale and the statistics into one centred affine a channel, then an elementwise pass.
  For batches too small to fill the chip with groups, and for channels-last groups narrower than a sector.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from triton import cdiv

from ._layout import is_channels_last
from ._triton import Launch, power_of_two, processors
from .group_norm_triton import (
    apply_kernel,
    fold_kernel,
    fused_kernel,
    gradient_input_kernel,
    gradient_sums_kernel,
    merge_splits_kernel,
    stats_kernel,
)

# Elements a fused program holds at once, 16 a thread. Twice the threads made the assembler spill odd shapes.
GROUP_TILE = 4096
SMALL_GROUP = 32768  # elements one program may go through alone: a second pass over them comes from the nearest cache
ELEMENTWISE_TILE = 4096
SECTOR_BYTES = 32  # smallest unit of a memory read: a narrower channels-last group wastes bandwidth
MAX_MERGE_TILE = 4096  # channels x splits one merging program holds


def _pair(x: torch.Tensor, x2: torch.Tensor | None) -> dict:
    """Kernel arguments of the one or two inputs. An absent x2 is x1 with no channels, never read."""
    return {
        "x1": x, "x2": x if x2 is None else x2, "c1": x.shape[1], "c2": 0 if x2 is None else x2.shape[1],
        "pixels": x.shape[2] * x.shape[3],
    }  # fmt: skip


def _outer(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> dict:
    """Kernel arguments of the AdaGN affine; rows may be strided, as the halves of one projection are."""
    if scale is None or shift is None:
        return {"scale": x, "shift": x, "scale_stride": 0, "shift_stride": 0}
    return {"scale": scale, "shift": shift, "scale_stride": scale.stride(0), "shift_stride": shift.stride(0)}


def _warps(tile: int) -> int:
    """Eight elements a thread (one 16-byte access in half precision), more from tiles of 2048 on."""
    return max(1, min(8, tile // 256))


def _blocks(channels: int, pixels: int, channels_last: bool, tile: int, widest: int) -> dict:
    """BLOCK_C and BLOCK_S of an elementwise or statistics pass: long along the contiguous axis."""
    if channels_last:
        exact = [width for width in (128, 64, 32) if width <= widest and channels % width == 0]
        block_c = exact[0] if exact else min(widest, power_of_two(channels))
        return {"BLOCK_C": block_c, "BLOCK_S": min(power_of_two(pixels), max(1, tile // block_c))}
    block_s = min(power_of_two(pixels), tile)
    return {"BLOCK_C": min(power_of_two(channels), max(1, tile // block_s)), "BLOCK_S": block_s}


def _elementwise(x: torch.Tensor, channels: int) -> tuple[tuple[int, int, int], dict, int]:
    """(grid, blocks, warps) of a pass over [B, channels, H, W]; small tensors take small tiles, to fill the
    chip."""
    batch, pixels = x.shape[0], x.shape[2] * x.shape[3]
    few = batch * channels * pixels < 2 * processors(x.device) * ELEMENTWISE_TILE
    blocks = _blocks(channels, pixels, is_channels_last(x), 1024 if few else ELEMENTWISE_TILE, 128)
    grid = (cdiv(pixels, blocks["BLOCK_S"]), cdiv(channels, blocks["BLOCK_C"]), batch)
    return grid, blocks, _warps(blocks["BLOCK_C"] * blocks["BLOCK_S"])


def _reduction(x: torch.Tensor, channels: int, most_splits: int) -> tuple[tuple[int, int, int], dict, int]:
    """(grid, constants, splits) of a per-channel reduction; pixels are split until programs fill the chip
    twice."""
    batch, pixels = x.shape[0], x.shape[2] * x.shape[3]
    blocks = _blocks(channels, pixels, is_channels_last(x), 2048, 32)
    tiles = cdiv(pixels, blocks["BLOCK_S"])
    programs = batch * cdiv(channels, blocks["BLOCK_C"])
    wanted = min(tiles, most_splits, cdiv(2 * processors(x.device), programs))
    steps = cdiv(tiles, wanted)
    splits = cdiv(tiles, steps)
    grid = (splits, cdiv(channels, blocks["BLOCK_C"]), batch)
    return grid, {**blocks, "STEPS": steps, "CHANNELS_LAST": is_channels_last(x)}, splits


def _partial_stats(x: torch.Tensor, most_splits: int) -> tuple[Launch, torch.Tensor, int, int]:
    """(launch, partial [B, C, splits, 2], splits, pixels a split)."""
    batch, channels = x.shape[:2]
    grid, constants, splits = _reduction(x, channels, most_splits)
    partial = torch.empty((batch, channels, splits, 2), dtype=torch.float32, device=x.device)
    pixels = x.shape[2] * x.shape[3]
    arguments = {"x": x, "partial": partial, "channels": channels, "pixels": pixels, "splits": splits}
    warps = _warps(constants["BLOCK_C"] * constants["BLOCK_S"])
    launch = Launch(stats_kernel, grid, arguments, constants, warps)
    return launch, partial, splits, constants["STEPS"] * constants["BLOCK_S"]


def channel_stats_launches(x: torch.Tensor, stats: torch.Tensor) -> list[Launch]:
    """Write stats [B, C, 2] (mean, M2) of x [B, C, H, W]."""
    launch, partial, splits, chunk = _partial_stats(x, 64)
    if splits == 1:  # then [B, C, 1, 2] is already the answer
        return [replace(launch, arguments={**launch.arguments, "partial": stats})]
    rows = x.shape[0] * x.shape[1]
    block_p = power_of_two(splits)
    block_c = min(power_of_two(rows), 1024 // block_p)
    arguments = {
        "partial": partial, "stats": stats, "rows": rows, "pixels": x.shape[2] * x.shape[3],
        "splits": splits, "chunk": chunk,
    }  # fmt: skip
    constants = {"BLOCK_C": block_c, "BLOCK_P": block_p}
    return [launch, Launch(merge_splits_kernel, (cdiv(rows, block_c),), arguments, constants, 4)]


def apply_launches(x, stats, weight, bias, groups, eps, scale, shift, silu, x2, stats2, y, mean, rstd) -> list[Launch]:
    """Write y, mean and rstd from given statistics, each (tensor [B, C, splits, 2], splits, pixels a
    split)."""
    batch, channels = y.shape[:2]
    per_group = channels // groups
    partial1, splits1, chunk1 = stats
    partial2, splits2, chunk2 = stats if x2 is None else stats2
    table = torch.empty((3, batch, channels), dtype=torch.float32, device=x.device)
    pair = _pair(x, x2)
    block_c, block_p = power_of_two(per_group), power_of_two(max(splits1, splits2))
    fold = Launch(
        fold_kernel,
        (groups, batch),
        {
            "stats1": partial1, "splits1": splits1, "chunk1": chunk1,
            "stats2": partial2, "splits2": splits2, "chunk2": chunk2,
            "c1": pair["c1"], "c2": pair["c2"], "pixels": pair["pixels"], "weight": weight, "bias": bias,
            **_outer(x, scale, shift), "table": table, "mean_out": mean, "rstd_out": rstd, "eps": eps,
        },
        {
            "GROUP_CHANNELS": per_group, "HAS_AFFINE": scale is not None, "HAS_X2": x2 is not None,
            "BLOCK_C": block_c, "BLOCK_P": block_p,
        },
        _warps(block_c * block_p),
    )  # fmt: skip
    grid, blocks, warps = _elementwise(x, channels)
    constants = {"SILU": silu, "HAS_X2": x2 is not None, "CHANNELS_LAST": is_channels_last(x), **blocks}
    return [fold, Launch(apply_kernel, grid, {**pair, "table": table, "y": y}, constants, warps)]


def _choose_path(x: torch.Tensor, groups: int, per_group: int) -> str:
    """Which of "fused" and "split". The thresholds come from counting launches and bytes, not from timing."""
    programs = x.shape[0] * groups
    chip = processors(x.device)
    wide = not is_channels_last(x) or per_group * x.element_size() >= SECTOR_BYTES
    small = per_group * x.shape[2] * x.shape[3] <= SMALL_GROUP
    # A narrow channels-last group re-reads its neighbours' sectors: worth it only while launches, not bytes,
    # set the time.
    fused = (small and (wide or programs <= 2 * chip)) or (wide and programs >= chip)
    return "fused" if fused else "split"


def group_norm_launches(
    x, weight, bias, groups, eps, scale, shift, silu, x2, y, mean, rstd, path: str | None = None
) -> list[Launch]:
    """Write y [B, C1 + C2, H, W] and mean, rstd [B, groups]; `path`, "fused" or "split", overrides the
    choice."""
    batch, channels = y.shape[:2]
    per_group = channels // groups
    block_c = power_of_two(per_group)
    if (path or _choose_path(x, groups, per_group)) == "split":
        most = max(1, MAX_MERGE_TILE // block_c)
        first, *stats = _partial_stats(x, most)
        launches, stats2 = [first], None
        if x2 is not None:
            second, *stats2 = _partial_stats(x2, most)
            launches.append(second)
        return launches + apply_launches(
            x, stats, weight, bias, groups, eps, scale, shift, silu, x2, stats2, y, mean, rstd
        )
    pair = _pair(x, x2)
    block_s = min(power_of_two(pair["pixels"]), GROUP_TILE // block_c)
    arguments = {
        **pair, "weight": weight, "bias": bias, **_outer(x, scale, shift),
        "y": y, "mean_out": mean, "rstd_out": rstd, "eps": eps,
    }  # fmt: skip
    constants = {
        "GROUP_CHANNELS": per_group, "SILU": silu, "HAS_AFFINE": scale is not None, "HAS_X2": x2 is not None,
        "CHANNELS_LAST": is_channels_last(x), "BLOCK_C": block_c, "BLOCK_S": block_s,
        "STEPS": cdiv(pair["pixels"], block_s),
    }  # fmt: skip
    return [Launch(fused_kernel, (groups, batch), arguments, constants, _warps(block_c * block_s))]


def gradient_sums_launches(grad, x, x2, table, silu) -> tuple[list[Launch], torch.Tensor]:
    """([launch], partial [B, C, splits, 2]) of sum(g) and sum(g * (x - mean)); table as `fold_kernel` writes
    it."""
    batch, channels = grad.shape[:2]
    grid, constants, splits = _reduction(x, channels, 64)
    partial = torch.empty((batch, channels, splits, 2), dtype=torch.float32, device=x.device)
    arguments = {"grad": grad, **_pair(x, x2), "table": table, "partial": partial, "splits": splits}
    constants = {**constants, "SILU": silu, "HAS_X2": x2 is not None}
    warps = _warps(constants["BLOCK_C"] * constants["BLOCK_S"])
    return [Launch(gradient_sums_kernel, grid, arguments, constants, warps)], partial


def gradient_input_launches(grad, x, x2, table, silu, dx, dx2) -> list[Launch]:
    """Write dx and (with x2) dx2; table [5, B, C] = mean, a, b, slope, level."""
    grid, blocks, warps = _elementwise(x, grad.shape[1])
    arguments = {"grad": grad, **_pair(x, x2), "table": table, "dx1": dx, "dx2": dx if x2 is None else dx2}
    constants = {"SILU": silu, "HAS_X2": x2 is not None, "CHANNELS_LAST": is_channels_last(x), **blocks}
    return [Launch(gradient_input_kernel, grid, arguments, constants, warps)]
