"""Configurations read off the shapes of a state dict; head count and attention layout do not follow from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import LatentConfig
from ..errors import UserError

State = Mapping[str, Tensor]
# E_phi ends at 4x4 and halves the image with every convolution.
_ENCODER_FINAL_SIZE = 4


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder's weights say."""

    image_size: int
    input_channel: int
    latent_dim: int
    encoder_channel: int


def need(state: State, name: str, ndim: int, where: str) -> Tensor:
    """``state[name]`` with ``ndim`` dimensions, or a UserError that names it."""
    if name not in state:
        raise UserError(f"{where}: tensor {name} is missing; expected it beside the {len(state)} that are there")
    if state[name].ndim != ndim:
        raise UserError(f"{where}: {name} has shape {list(state[name].shape)}; expected {ndim} dimensions")
    return state[name]


def rename_classes(state: State) -> dict[str, Tensor]:
    """A prior's tensors with the label embedding under this project's name, ``class_emb``.

    In a PDAE decoder ``label_emb`` is the Linear that takes z; its bias tells them apart.
    """
    if "label_emb.bias" in state:
        return dict(state)
    return {"class_emb.weight" if name == "label_emb.weight" else name: tensor for name, tensor in state.items()}


def unet_fields(state: State, where: str) -> dict[str, Any]:
    """The arguments of UNetConfig that follow from the weights of a U-Net under ADM's names (prior or PDAE decoder).

    Raises UserError that names the variant when these are the weights of a U-Net which UNetConfig cannot express.
    """
    time_width, base = need(state, "time_embed.0.weight", 2, where).shape
    stem = need(state, "input_blocks.0.0.weight", 4, where)
    out_channels, input_channel = need(state, "out.2.weight", 4, where).shape[0], stem.shape[1]
    if input_channel == 6 and out_channels in (3, 6):
        raise UserError(
            f"{where}: a super-resolution U-Net (6 input channels, {out_channels} output channels); expected as many "
            "input channels as the image has"
        )
    if out_channels not in (input_channel, 2 * input_channel):
        raise UserError(
            f"{where}: the U-Net maps {input_channel} channels to {out_channels}; "
            f"expected {input_channel}, or {2 * input_channel} with a learned sigma"
        )
    blocks, levels, downsample, upsample = _layout(state, where)
    widths = _widths(state, blocks, levels, where)
    middle = "none"
    if any(name.startswith("middle_block.") for name in state):
        middle = "attention" if "middle_block.1.qkv.weight" in state else "plain"
    if middle == "plain" and any(name.startswith("middle_block.2.") for name in state):
        need(state, "middle_block.1.qkv.weight", 3, where)
    emb, norm = (need(state, f"input_blocks.1.0.{n}.weight", d, where) for n, d in _TIME_AND_NORM)
    classes = state.get("class_emb.weight")
    return {
        "input_channel": input_channel,
        "base_channel": base,
        "channel_multiplier": tuple(_multiplier(width, base) for width in widths),
        "num_residual_blocks_of_a_block": blocks,
        "attention_resolutions": _attention_rates(state, blocks, levels, where),
        "learn_sigma": out_channels == 2 * input_channel,
        "time_channel": None if time_width == 4 * base else time_width,
        "stem_channel": None if stem.shape[0] == widths[0] else stem.shape[0],
        "use_scale_shift_norm": emb.shape[0] == 2 * norm.shape[0],
        "downsample": downsample,
        "upsample": upsample,
        "middle": middle,
        "middle_attention_norm": middle != "attention" or "middle_block.1.norm.weight" in state,
        "num_classes": None if classes is None or not classes.ndim else classes.shape[0],
    }


_TIME_AND_NORM = (("emb_layers.1", 2), ("out_layers.0", 1))


def encoder_shape(state: State, where: str) -> EncoderShape:
    """Image size, channels and latent size of an E_phi with these weights."""
    stem = need(state, "encoder.0.weight", 4, where)
    convolutions = sum(t.ndim == 4 and re.fullmatch(r"encoder\.\d+\.weight", k) is not None for k, t in state.items())
    heads = [t for k, t in state.items() if t.ndim == 2 and re.fullmatch(r"encoder\.\d+\.weight", k)]
    if len(heads) != 1:
        raise UserError(f"{where}: the encoder has {len(heads)} linear layers; expected 1, from 4x4 features to z")
    return EncoderShape(
        image_size=_ENCODER_FINAL_SIZE * 2**convolutions,
        input_channel=stem.shape[1],
        latent_dim=heads[0].shape[0],
        encoder_channel=stem.shape[0],
    )


def half_unet_fields(state: State, base: int, blocks: int, where: str) -> dict[str, Any]:
    """What the weights of Diff-AE's encoder say, whose U-Net has ``base`` channels and ``blocks`` blocks a level."""
    total = _count(state, "input_blocks", where)
    if total % (blocks + 1):
        raise UserError(
            f"{where}: the encoder has {total} input blocks; expected levels of {blocks} residual blocks, as its U-Net "
            "has"
        )
    levels = total // (blocks + 1)
    return {
        "input_channel": need(state, "input_blocks.0.0.weight", 4, where).shape[1],
        "latent_dim": need(state, "out.3.weight", 4, where).shape[0],
        "encoder_multiplier": tuple(_multiplier(width, base) for width in _widths(state, blocks, levels, where)),
        "attention_resolutions": _attention_rates(state, blocks, levels, where, output=False),
    }


def latent_config(state: State, where: str) -> LatentConfig:
    """The latent DPM's configuration from its MLP's weights."""
    hidden, latent_dim = need(state, "layers.0.linear.weight", 2, where).shape
    return LatentConfig(latent_dim=latent_dim, hidden=hidden, layers=_count(state, "layers", where))


def prior_image_size(rates: tuple[int, ...], levels: int) -> tuple[int, str]:
    """A sensible image size for a U-Net, whose weights do not say, and why."""
    if rates:
        # One or two rates start at 16x16 ("16" or "16,8"), three are 32x32, 16x16, 8x8.
        rate = sorted(rates)[(len(rates) - 1) // 2]
        size, reason = 16 * rate, f"attention at rate {rate} taken to be at 16x16"
    else:
        size, reason = 64, "no attention to go by"
    least = max(32, 2 ** (levels - 1))
    return (size, reason) if size >= least else (least, "the smallest that fits the levels")


def _layout(state: State, where: str) -> tuple[int, int, str, str]:
    """Residual blocks a level, levels, and how a level ends: the values of ``downsample`` and ``upsample``."""
    total = _count(state, "output_blocks", where)
    inputs = _numbers(state, "input_blocks")
    strided = [i for i in range(total) if f"input_blocks.{i}.0.op.weight" in state]
    # Pooling has no tensors, and leaves a gap.
    pooled = [i for i in range(total) if i not in inputs]
    convolved = [i for i in range(total) if any(f"output_blocks.{i}.{j}.conv.weight" in state for j in (1, 2))]
    # An up ResBlock is the only second ResBlock of a block of the output half.
    residual = [i for i in range(total) if _has_second_block(state, f"output_blocks.{i}")]
    ups, downs = sorted({*convolved, *residual}), sorted({*strided, *pooled})
    if pooled and (ups or strided):  # who pools has no tensors for the way up either
        raise UserError(f"{where}: input_blocks.{pooled[0]} has no weights; expected input_blocks without a gap")
    # The first resampler on either side tells how long a level is; without any there is one level.
    blocks = downs[0] - 1 if downs else ups[0] if ups else total - 1
    levels = total // (blocks + 1) if blocks > 0 else 0
    ends = [level * (blocks + 1) for level in range(1, levels)]
    if (
        blocks < 1
        or total % (blocks + 1)
        or max(inputs) != total - 1
        or downs not in ([], ends)
        or ups not in ([], [end - 1 for end in ends])
    ):
        raise UserError(
            f"{where}: {1 + max(inputs, default=-1)} input blocks with down-samplers at {downs or 'none known'} and "
            f"{total} output blocks with up-samplers at {ups or 'none known'} are not the layout of an ADM U-Net; "
            "expected the same number of residual blocks at every level"
        )
    if convolved and residual:
        raise UserError(
            f"{where}: output_blocks resample by convolution at {convolved} and by residual blocks at "
            f"{residual}; expected one of them"
        )
    down = "conv" if strided else "pool" if pooled else "residual"
    return blocks, levels, down, "conv" if convolved else "residual" if residual or levels == 1 else "nearest"


def _numbers(state: State, group: str) -> set[int]:
    """Those of the members of ``group`` that have tensors."""
    return {int(m[1]) for k in state if (m := re.match(rf"{group}\.(\d+)\.", k))}


def _count(state: State, group: str, where: str) -> int:
    """Number of members of ``group``, which must be numbered without a gap."""
    found = _numbers(state, group)
    missing = sorted(set(range(max(found, default=-1) + 1)) - found)
    if not found or missing:
        what = f"{group}.{missing[0]} has no weights" if found else f"no tensor of {group} is there"
        raise UserError(f"{where}: {what}; expected {group} numbered without a gap")
    return len(found)


def _has_second_block(state: State, block: str) -> bool:
    return any(f"{block}.{i}.in_layers.2.weight" in state for i in (1, 2))


def _widths(state: State, blocks: int, levels: int, where: str) -> list[int]:
    """Channels of the levels, outermost first."""
    names = (f"input_blocks.{1 + level * (blocks + 1)}.0.in_layers.2.weight" for level in range(levels))
    return [need(state, name, 4, where).shape[0] for name in names]


def _multiplier(width: int, base: int) -> int | float:
    """m with int(m * base) == width, a whole number where there is one."""
    if width % base == 0:
        return width // base
    m = width / base
    return m if int(m * base) == width else math.nextafter(m, math.inf)


def _attention_rates(state: State, blocks: int, levels: int, where: str, output: bool = True) -> tuple[int, ...]:
    """Down-sampling rates whose blocks attend; UserError unless all blocks of a level, in both halves, agree.

    ``output``: whether there is an output half.
    """
    rates = []
    for level in range(levels):
        first, last = 1 + level * (blocks + 1), (levels - 1 - level) * (blocks + 1)
        members = [f"input_blocks.{first + i}" for i in range(blocks)]
        members += [f"output_blocks.{last + i}" for i in range(blocks + 1)] if output else []
        attends = [f"{member}.1.qkv.weight" in state for member in members]
        if all(attends):
            rates.append(2**level)
        elif any(attends):
            odd = members[attends.index(not attends[0])]
            raise UserError(
                f"{where}: {members[0]} has {'an' if attends[0] else 'no'} attention layer and {odd} has "
                f"{'none' if attends[0] else 'one'}; expected all blocks at down-sampling rate {2**level} to agree"
            )
    return tuple(rates)
