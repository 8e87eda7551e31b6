"""Configurations read off the shapes of a state dict; head count and attention layout do not follow from them."""

from __future__ import annotations

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


def unet_fields(state: State, where: str) -> dict[str, Any]:
    """The arguments of UNetConfig that follow from the weights of an ADM U-Net (prior or PDAE decoder).

    Raises UserError that names the variant when these are the weights of a U-Net which UNetConfig cannot express.
    """
    _refuse_variants(state, where)
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
    inputs, outputs = _count(state, "input_blocks", where), _count(state, "output_blocks", where)
    # A level of the output half ends with its up ResBlock, the only second ResBlock of a block.
    ends = [i for i in range(outputs) if _has_second_block(state, f"output_blocks.{i}")]
    blocks = ends[0] if ends else outputs - 1
    if inputs != outputs or blocks < 1 or inputs % (blocks + 1):
        raise UserError(
            f"{where}: {inputs} input blocks and {outputs} output blocks with up-samplers in {ends or 'none'} are not "
            "the layout of an ADM U-Net; expected the same number of residual blocks at every level"
        )
    levels = inputs // (blocks + 1)
    return {
        "input_channel": input_channel,
        "base_channel": base,
        "channel_multiplier": _multipliers(state, base, blocks, levels, where),
        "num_residual_blocks_of_a_block": blocks,
        "attention_resolutions": _attention_rates(state, blocks, levels, where),
        "learn_sigma": out_channels == 2 * input_channel,
        "time_channel": None if time_width == 4 * base else time_width,
    }


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
        "encoder_multiplier": _multipliers(state, base, blocks, levels, where),
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


def _refuse_variants(state: State, where: str) -> None:
    pdae = any(name.startswith("shift_") for name in state)  # there label_emb takes z
    for name, tensor in state.items():
        if name.endswith((".op.weight", ".conv.weight")):
            raise UserError(
                f"{where}: a U-Net with convolutional resampling ({name}); expected resampling by residual blocks "
                "(resblock_updown)"
            )
        if name == "label_emb.weight" and not pdae:
            raise UserError(
                f"{where}: a class-conditional U-Net (label_emb.weight {list(tensor.shape)}: "
                f"{tensor.shape[0]} classes); expected an unconditional one"
            )
        if re.fullmatch(r"(input|output)_blocks\.\d+\.\d+\.emb_layers\.1\.weight", name):
            out = state.get(name.replace("emb_layers.1.weight", "out_layers.0.weight"))
            if out is not None and tensor.ndim == 2 and tensor.shape[0] == out.shape[0]:
                raise UserError(
                    f"{where}: a U-Net without scale-shift norm ({name} has {tensor.shape[0]} rows); "
                    f"expected {2 * out.shape[0]} rows (use_scale_shift_norm)"
                )
    if "middle_block.0.in_layers.2.weight" in state and "middle_block.1.qkv.weight" not in state:
        raise UserError(f"{where}: a U-Net without attention in its middle block; expected middle_block.1.qkv.weight")


def _count(state: State, group: str, where: str) -> int:
    """Number of members of ``group``, which must be numbered without a gap."""
    found = {int(m[1]) for k in state if (m := re.match(rf"{group}\.(\d+)\.", k))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found)
    if not found or missing:
        what = f"{group}.{missing[0]} has no weights" if found else f"no tensor of {group} is there"
        hint = "; resampling without weights is not supported" if found and "blocks" in group else ""
        raise UserError(f"{where}: {what}; expected {group} numbered without a gap{hint}")
    return len(found)


def _has_second_block(state: State, block: str) -> bool:
    return any(f"{block}.{i}.in_layers.2.weight" in state for i in (1, 2))


def _multipliers(state: State, base: int, blocks: int, levels: int, where: str) -> tuple[int, ...]:
    multipliers = []
    for level in range(levels):
        name = f"input_blocks.{1 + level * (blocks + 1)}.0.in_layers.2.weight"
        width = need(state, name, 4, where).shape[0]
        if width % base:
            raise UserError(
                f"{where}: {name} has {width} channels; expected a multiple of the base width {base} "
                "(time_embed.0.weight)"
            )
        multipliers.append(width // base)
    return tuple(multipliers)


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
