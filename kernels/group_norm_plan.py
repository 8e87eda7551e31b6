"""Which kernels of group_norm_triton.py and group_norm_gradient_triton.py a call launches, and with what
blocks. Imports Triton.

Two ways through the forward pass (`group_norm_launches` chooses):
* fused: one program a group reads it, then normalises it from registers (from cache where it is a little too
  large for them). One launch.
* split: statistics with several programs a group, then an elementwise pass in which every program first merges
  the statistics of its channels' groups. Two launches. For groups that do not fit into registers, and for
  channels-last groups so narrow that reading one by one wastes bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from triton import cdiv

from ._launch import Launch, power_of_two, processors, row_share
from ._layout import is_channels_last
from .group_norm_gradient_triton import gradient_input_kernel, gradient_sums_kernel
from .group_norm_triton import apply_kernel, fused_kernel, merge_splits_kernel, stats_kernel

# Elements a fused program holds at once, 16 a thread. Twice the threads made the assembler spill odd shapes.
GROUP_TILE = 4096
ELEMENTWISE_TILE = 4096
SECTOR_BYTES = 32  # smallest unit of a memory read: a narrower channels-last group wastes bandwidth,
# and a processor looks up one cache line a cycle: so many rows, read and written, cost about as much (4 us) as the
# second launch and the third pass of the split path.
NARROW_LINES = 8192
REDUCTION_TILE = 2048  # 8 elements a thread: 16 bytes in half precision
RESIDENT = 4  # reducing programs a processor holds at once, by their registers: one wave, no second
MAX_COLUMNS = 32  # (part, split) pairs a group's statistics come in
MERGE_TILE = 1024  # channels x pairs a program of the second pass merges, 4 a thread


def _pair(x: torch.Tensor, x2: torch.Tensor | None) -> dict:
    """Kernel arguments of the one or two inputs. An absent x2 is x1 with no channels, never read."""
    return {
        "x1": x, "x2": x if x2 is None else x2, "c1": x.shape[1], "c2": 0 if x2 is None else x2.shape[1],
        "pixels": x.shape[2] * x.shape[3],
    }  # fmt: skip


def _biased_pair(x: torch.Tensor, x2: torch.Tensor | None, x_bias: torch.Tensor | None) -> dict:
    """The same for kernels that add x_bias, and that read x2's images again where x has more."""
    share, stride = row_share(x_bias, x)
    return {
        **_pair(x, x2), "images2": len(x if x2 is None else x2),
        "x_bias": x if x_bias is None else x_bias, "bias_share": share, "bias_stride": stride,
    }  # fmt: skip


def _inner(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict:
    """Kernel arguments of weight and bias, which have one row stride."""
    share, stride = row_share(weight, x)
    return {"weight": weight, "bias": bias, "share": share, "weight_stride": stride}


def _outer(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> dict:
    """Kernel arguments of the AdaGN affine; rows may be strided, as the halves of one projection are."""
    if scale is None or shift is None:
        return {"scale": x, "shift": x, "scale_stride": 0, "shift_stride": 0}
    return {"scale": scale, "shift": shift, "scale_stride": scale.stride(0), "shift_stride": shift.stride(0)}


def _codes(code_scale: torch.Tensor | float | None, y: torch.Tensor, unread: torch.Tensor) -> dict:
    """Kernel arguments of the scales of fp8 codes: a number, or float32 [S] for equal shares of the images in turn."""
    if code_scale is None:
        return {"code_scale": unread, "code_share": 1}
    scales = torch.as_tensor(code_scale, dtype=torch.float32, device=y.device).reshape(-1)
    return {"code_scale": scales, "code_share": len(y) // len(scales)}


def _warps(tile: int) -> int:
    """Eight elements a thread (one 16-byte access in half precision), more from tiles of 2048 on."""
    return max(1, min(8, tile // 256))


def _blocks(channels: int, pixels: int, channels_last: bool, tile: int, widest: int) -> dict:
    """BLOCK_C and BLOCK_S of an elementwise or statistics pass: long along the contiguous axis."""
    if channels_last:
        exact = [width for width in (128, 64, 32) if width <= widest and channels % width == 0]
        block_c = exact[0] if exact else min(widest, power_of_two(channels))
        return {"BLOCK_C": block_c, "BLOCK_S": min(power_of_two(pixels), max(1, tile // block_c))}
    # Two channels at least: an axis of one makes Triton 3.6 spread what varies along it over every register.
    block_s = min(power_of_two(pixels), tile // 2)
    return {"BLOCK_C": min(widest, power_of_two(channels), max(1, tile // block_s)), "BLOCK_S": block_s}


def _elementwise(
    x: torch.Tensor, channels: int, widest: int = 128, tile: int = ELEMENTWISE_TILE
) -> tuple[tuple[int, int, int], dict, int]:
    """(grid, blocks, warps) of a pass over [B, channels, H, W]; small tensors take small tiles, to fill the
    chip."""
    batch, pixels = x.shape[0], x.shape[2] * x.shape[3]
    few = batch * channels * pixels < 2 * processors(x.device) * ELEMENTWISE_TILE
    blocks = _blocks(channels, pixels, is_channels_last(x), 1024 if few else tile, min(widest, 128))
    grid = (cdiv(pixels, blocks["BLOCK_S"]), cdiv(channels, blocks["BLOCK_C"]), batch)
    return grid, blocks, _warps(blocks["BLOCK_C"] * blocks["BLOCK_S"])


def _reduction(x: torch.Tensor, channels: int, per_group: int = 1) -> tuple[tuple[int, int, int], dict, int]:
    """(grid, constants, splits) of a per-channel reduction; pixels are split until programs fill the chip, or
    a program has too few tiles left to overlap their loads, or a group has MAX_COLUMNS results to merge."""
    batch, pixels = x.shape[0], x.shape[2] * x.shape[3]
    blocks = _blocks(channels, pixels, is_channels_last(x), REDUCTION_TILE, 32)
    most_splits = max(1, MAX_COLUMNS // (per_group // _part(per_group, blocks["BLOCK_C"])))
    tiles = cdiv(pixels, blocks["BLOCK_S"])
    programs = batch * cdiv(channels, blocks["BLOCK_C"])
    wanted = min(cdiv(tiles, 2), most_splits, max(1, RESIDENT * processors(x.device) // programs))
    steps = cdiv(tiles, wanted)
    splits = cdiv(tiles, steps)
    grid = (splits, cdiv(channels, blocks["BLOCK_C"]), batch)
    return grid, {**blocks, "STEPS": steps, "CHANNELS_LAST": is_channels_last(x)}, splits


@dataclass(frozen=True)
class Statistics:
    """What `apply_kernel` merges: `table` [B, channels / part, splits, 2] of (mean, M2), `chunk` pixels a split;
    or, with `table2`, one of each input. A bias of x is in the means already."""

    table: torch.Tensor
    table2: torch.Tensor | None
    part: int
    splits: int
    chunk: int


def _part(per_group: int, block_c: int) -> int:
    """How many channels of a group one program can merge: a power of two that divides the group and the block,
    so that a group falls into whole parts and no part straddles two blocks."""
    return min(per_group & -per_group, block_c)


def _statistics(x, x_bias, x2, per_group: int) -> tuple[Launch, Statistics]:
    """The launch that computes the statistics of cat([x + x_bias, x2], 1), in parts of a group of channels."""
    pair = _biased_pair(x, x2, x_bias)
    channels = pair["c1"] + pair["c2"]
    grid, constants, splits = _reduction(x, channels, per_group)
    part, chunk = _part(per_group, constants["BLOCK_C"]), constants["STEPS"] * constants["BLOCK_S"]
    partial = torch.empty((x.shape[0], channels // part, splits, 2), dtype=torch.float32, device=x.device)
    launch = Launch(
        stats_kernel,
        grid,
        {**pair, "partial": partial, "splits": splits, "chunk": chunk},
        {"PART": part, "HAS_BIAS": x_bias is not None, "HAS_X2": x2 is not None, **constants},
        _warps(constants["BLOCK_C"] * constants["BLOCK_S"]),
    )
    return launch, Statistics(partial, None, part, splits, chunk)


def partial_blocks(x: torch.Tensor, part: int, chunk: int) -> tuple[dict, int]:
    """(constants, warps) of programs that read `chunk` pixels of some channels of x and merge every `part` of
    them."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    blocks = _blocks(channels, min(chunk, pixels), is_channels_last(x), REDUCTION_TILE, 32)
    if blocks["BLOCK_C"] < part:
        blocks = {"BLOCK_C": part, "BLOCK_S": max(1, blocks["BLOCK_S"] * blocks["BLOCK_C"] // part)}
    constants = {
        "PART": part, **blocks, "STEPS": cdiv(chunk, blocks["BLOCK_S"]), "CHANNELS_LAST": is_channels_last(x),
    }  # fmt: skip
    return constants, _warps(blocks["BLOCK_C"] * blocks["BLOCK_S"])


def partial_stats_launches(x: torch.Tensor, x_bias: torch.Tensor | None, partial: torch.Tensor) -> list[Launch]:
    """Write partial [B, C / part, splits, 2] (mean, M2) of x [B, C, H, W] + x_bias [C], for the part and the splits
    that its shape says."""
    batch, channels, splits = x.shape[0], x.shape[1], partial.shape[2]
    pair = _biased_pair(x, None, x_bias)
    chunk = cdiv(pair["pixels"], splits)
    constants, warps = partial_blocks(x, channels // partial.shape[1], chunk)
    arguments = {**pair, "partial": partial, "splits": splits, "chunk": chunk}
    grid = (splits, cdiv(channels, constants["BLOCK_C"]), batch)
    constants = {"HAS_BIAS": x_bias is not None, "HAS_X2": False, **constants}
    return [Launch(stats_kernel, grid, arguments, constants, warps)]


def channel_stats_launches(x: torch.Tensor, x_bias: torch.Tensor | None, stats: torch.Tensor) -> list[Launch]:
    """Write stats [B, C, 2] (mean, M2) of x [B, C, H, W] + x_bias [C]."""
    launch, partial = _statistics(x, x_bias, None, 1)
    if partial.splits == 1:  # then [B, C, 1, 2] is already the answer
        return [replace(launch, arguments={**launch.arguments, "partial": stats})]
    batch, channels = x.shape[:2]
    block_p = power_of_two(partial.splits)
    block_c = min(power_of_two(channels), MERGE_TILE // block_p)
    arguments = {
        "partial": partial.table, "x_bias": x if x_bias is None else x_bias, "stats": stats,
        "channels": channels, "pixels": x.shape[2] * x.shape[3], "splits": partial.splits, "chunk": partial.chunk,
    }  # fmt: skip
    constants = {"HAS_BIAS": x_bias is not None, "BLOCK_C": block_c, "BLOCK_P": block_p}
    launch = replace(launch, constants={**launch.constants, "HAS_BIAS": False})
    return [launch, Launch(merge_splits_kernel, (cdiv(channels, block_c), batch), arguments, constants, 4)]


def given_statistics(x: torch.Tensor, stats: torch.Tensor, stats2: torch.Tensor | None) -> Statistics:
    """Channel statistics [B, C, 2], or partial ones [B, C / part, splits, 2] of one part and one number of splits,
    contiguous float32, of each input, for `apply_launches`."""
    splits = stats.shape[2] if stats.dim() == 4 else 1
    return Statistics(stats, stats2, x.shape[1] // stats.shape[1], splits, cdiv(x.shape[2] * x.shape[3], splits))


def apply_launches(
    x, statistics: Statistics, weight, bias, groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd, code_scale=None
) -> list[Launch]:
    """Write y, mean and rstd from given statistics; y as codes of fp8, by `code_scale`, where that is its dtype."""
    channels = y.shape[1]
    per_group = channels // groups
    pair = _biased_pair(x, x2, x_bias)
    columns = per_group // statistics.part * statistics.splits
    block_m = min(power_of_two(columns), MAX_COLUMNS)
    # Of codes a thread would write 16 at once, and hold what so many channels need: 136 registers.
    tile = ELEMENTWISE_TILE if code_scale is None else ELEMENTWISE_TILE // 2
    grid, blocks, warps = _elementwise(x, channels, max(32, MERGE_TILE // block_m), tile)
    table2 = statistics.table if statistics.table2 is None else statistics.table2
    arguments = {
        **pair, "stats1": statistics.table, "stats2": table2, "splits": statistics.splits, "chunk": statistics.chunk,
        **_inner(x, weight, bias), **_outer(x, scale, shift), **_codes(code_scale, y, weight),
        "y": y, "mean_out": mean, "rstd_out": rstd, "eps": eps,
    }  # fmt: skip
    constants = {
        "GROUP_CHANNELS": per_group, "PART": statistics.part, "SILU": silu, "HAS_AFFINE": scale is not None,
        "HAS_BIAS": x_bias is not None, "HAS_X2": x2 is not None, "HAS_STATS2": statistics.table2 is not None,
        "CHANNELS_LAST": is_channels_last(x), **blocks, "BLOCK_M": block_m, "MERGES": cdiv(columns, block_m),
    }  # fmt: skip
    return [Launch(apply_kernel, grid, arguments, constants, warps)]


def _choose_path(x: torch.Tensor, groups: int, per_group: int) -> str:
    """Which of "fused" and "split". The thresholds come from counting launches, bytes and latencies, not from
    timing."""
    pixels = x.shape[2] * x.shape[3]
    waves = max(1.0, x.shape[0] * groups / processors(x.device))
    tiles = cdiv(power_of_two(per_group) * power_of_two(pixels), GROUP_TILE)
    if tiles > 2 or (tiles == 2 and waves > 2):
        return "split"  # one program a group would wait for memory tile after tile, twice
    wide = not is_channels_last(x) or per_group * x.element_size() >= SECTOR_BYTES
    lines = waves * pixels * (2 if tiles == 1 else 3)
    return "fused" if wide or lines <= NARROW_LINES else "split"


def group_norm_launches(
    x, weight, bias, groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd, path: str | None = None,
    code_scale: torch.Tensor | float | None = None,
) -> list[Launch]:  # fmt: skip
    """Write y [B, C1 + C2, H, W] and mean, rstd [B, groups]; `path`, "fused" or "split", overrides the
    choice. y is as of `apply_launches`."""
    batch, channels = y.shape[:2]
    per_group = channels // groups
    block_c = power_of_two(per_group)
    if (path or _choose_path(x, groups, per_group)) == "split":
        first, statistics = _statistics(x, x_bias, x2, per_group)
        return [
            first,
            *apply_launches(
                x, statistics, weight, bias, groups, eps, scale, shift, silu, x2, x_bias, y, mean, rstd, code_scale
            ),
        ]
    pair = _biased_pair(x, x2, x_bias)
    block_s = min(power_of_two(pair["pixels"]), GROUP_TILE // block_c)
    arguments = {
        **pair, **_inner(x, weight, bias), **_outer(x, scale, shift), **_codes(code_scale, y, weight),
        "y": y, "mean_out": mean, "rstd_out": rstd, "eps": eps,
    }  # fmt: skip
    constants = {
        "GROUP_CHANNELS": per_group, "SILU": silu, "HAS_AFFINE": scale is not None,
        "HAS_BIAS": x_bias is not None, "HAS_X2": x2 is not None,
        "CHANNELS_LAST": is_channels_last(x), "BLOCK_C": block_c, "BLOCK_S": block_s,
        "STEPS": cdiv(pair["pixels"], block_s),
    }  # fmt: skip
    return [Launch(fused_kernel, (groups, batch), arguments, constants, _warps(block_c * block_s))]


def gradient_sums_launches(grad, x, x2, table, silu) -> tuple[list[Launch], torch.Tensor]:
    """([launch], partial [B, C, splits, 2]) of sum(g) and sum(g * (x - mean)); table
    [3, B, C] = mean - x_bias, a, b."""
    batch, channels = grad.shape[:2]
    grid, constants, splits = _reduction(x, channels)
    partial = torch.empty((batch, channels, splits, 2), dtype=torch.float32, device=x.device)
    arguments = {"grad": grad, **_pair(x, x2), "table": table, "partial": partial, "splits": splits}
    constants = {**constants, "SILU": silu, "HAS_X2": x2 is not None}
    warps = _warps(constants["BLOCK_C"] * constants["BLOCK_S"])
    return [Launch(gradient_sums_kernel, grid, arguments, constants, warps)], partial


def gradient_input_launches(grad, x, x2, table, silu, dx, dx2) -> list[Launch]:
    """Write dx and (with x2) dx2; table [5, B, C] = mean - x_bias, a, b, slope,
    level."""
    grid, blocks, warps = _elementwise(x, grad.shape[1])
    arguments = {"grad": grad, **_pair(x, x2), "table": table, "dx1": dx, "dx2": dx if x2 is None else dx2}
    constants = {"SILU": silu, "HAS_X2": x2 is not None, "CHANNELS_LAST": is_channels_last(x), **blocks}
    return [Launch(gradient_input_kernel, grid, arguments, constants, warps)]
