"""The same U-Net under other families' tensor names: to ADM's, which this project uses, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import UNetConfig
from ..errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spelling:
    """How a family calls the modules. In templates ``level`` counts from outside, ``depth`` from inside, and ``j`` the
    blocks of a level."""

    plain: dict[str, str]
    block: dict[str, str]
    attention: dict[str, str]
    down: str
    down_attention: str
    downsample: str
    middle: tuple[str, str, str]
    up: str
    up_attention: str
    upsample: str


DIFFUSERS = Spelling(
    plain={
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "class_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    },
    block={
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    down="down_blocks.{level}.resnets.{j}",
    down_attention="down_blocks.{level}.attentions.{j}",
    downsample="down_blocks.{level}.downsamplers.0",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    up="up_blocks.{depth}.resnets.{j}",
    up_attention="up_blocks.{depth}.attentions.{j}",
    upsample="up_blocks.{depth}.upsamplers.0",
)
DDIM = Spelling(
    plain={
        "time_embed.0": "temb.dense.0",
        "time_embed.2": "temb.dense.1",
        "input_blocks.0.0": "conv_in",
        "out.0": "norm_out",
        "out.2": "conv_out",
    },
    block=DIFFUSERS.block | {"emb_layers.1": "temb_proj", "skip_connection": "nin_shortcut"},
    attention={"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "proj_out"},
    down="down.{level}.block.{j}",
    down_attention="down.{level}.attn.{j}",
    downsample="down.{level}.downsample",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    up="up.{level}.block.{j}",
    up_attention="up.{level}.attn.{j}",
    upsample="up.{level}.upsample",
)
# What diffusers called the attention's parts before its attention classes were merged (2023-05).
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modernise(state: State) -> dict[str, Tensor]:
    """A diffusers state dict with the attention's names of today."""
    found = {}
    for name, tensor in state.items():
        head, _, leaf = name.rpartition(".")
        owner, _, part = head.rpartition(".")
        new = f"{owner}.{_OLD[part]}.{leaf}" if part in _OLD and ".attentions." in owner else name
        found[new] = tensor
    return found


def to_adm(state: State, spelling: Spelling, heads: Callable[[int], int], where: str) -> dict[str, Tensor]:
    """``state`` under ADM's names; ``heads`` gives the number of an attention layer of so many channels.

    q, k and v are stacked in the legacy order. UserError naming the first tensor that has no place.
    """
    rest, found = dict(state), {}

    def has(prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.") for name in state)

    def move(adm: str, own: str, shape: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        for leaf in ("weight", "bias"):
            if f"{own}.{leaf}" in rest:
                found[f"{adm}.{leaf}"] = shape(rest.pop(f"{own}.{leaf}"))

    levels, blocks = _extent(state, spelling, where)
    for kind, adm, own in _modules(spelling, levels, blocks, lambda level, prefix: has(prefix), has):
        if kind == "attention":
            parts = spelling.attention
            move(f"{adm}.norm", f"{own}.{parts['norm']}")
            move(f"{adm}.proj_out", f"{own}.{parts['proj_out']}", _as_conv1d)
            for leaf in ("weight", "bias"):
                names = [f"{own}.{parts[part]}.{leaf}" for part in "qkv"]
                for name in names:
                    if name not in rest:
                        raise UserError(f"{where}: tensor {name} is missing; expected it beside {own}.*")
                found[f"{adm}.qkv.{leaf}"] = _stack([rest.pop(name) for name in names], heads, names[0], where)
        elif kind == "plain" or has(f"{own}.conv"):
            move(adm if kind == "plain" else f"{adm}.{kind}", own if kind == "plain" else f"{own}.conv")
        else:
            for part, name in spelling.block.items():
                move(f"{adm}.{part}", f"{own}.{name}")
    if rest:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise UserError(f"{where}: no place for the tensor {min(rest)}{more} in the U-Net known here")
    return found


def from_adm(state: State, spelling: Spelling, config: UNetConfig) -> dict[str, Tensor]:
    """The inverse of :func:`to_adm` for a network of ``config``."""
    found: dict[str, Tensor] = {}

    def move(adm: str, own: str, shape: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        for leaf in ("weight", "bias"):
            if f"{adm}.{leaf}" in state:
                found[f"{own}.{leaf}"] = shape(state[f"{adm}.{leaf}"])

    def attends(level: int, prefix: str) -> bool:
        return 2**level in config.attention_resolutions

    def middle(prefix: str) -> bool:
        return config.middle == "attention" if prefix == spelling.middle[1] else config.middle != "none"

    blocks = config.num_residual_blocks_of_a_block
    for kind, adm, own in _modules(spelling, config.levels, blocks, attends, middle):
        if kind == "attention":
            parts = spelling.attention
            move(f"{adm}.norm", f"{own}.{parts['norm']}")
            move(f"{adm}.proj_out", f"{own}.{parts['proj_out']}", lambda t: t.flatten(1) if t.ndim > 1 else t)
            for leaf in ("weight", "bias"):
                for part, tensor in zip("qkv", _unstack(state[f"{adm}.qkv.{leaf}"], config), strict=True):
                    found[f"{own}.{parts[part]}.{leaf}"] = tensor
        elif kind == "plain" or f"{adm}.{kind}.weight" in state:
            move(adm if kind == "plain" else f"{adm}.{kind}", own if kind == "plain" else f"{own}.conv")
        else:
            for part, name in spelling.block.items():
                move(f"{adm}.{part}", f"{own}.{name}")
    return found


def _modules(
    spelling: Spelling,
    levels: int,
    blocks: int,
    attends: Callable[[int, str], bool],
    middle: Callable[[str], bool],
) -> Iterator[tuple[str, str, str]]:
    """(kind, ADM's name, the family's name) of every module.

    The kind is "plain", "block", "attention", or that of a resampler by convolution, "op" or "conv": what ADM calls
    its convolution. ``attends`` and ``middle`` tell of the family's names whether they are there.
    """
    for adm, own in spelling.plain.items():
        yield "plain", adm, own

    def names(level: int, j: int = 0) -> dict[str, int]:
        return {"level": level, "depth": levels - 1 - level, "j": j}

    for level in range(levels):
        first = 1 + level * (blocks + 1)
        for j in range(blocks):
            yield "block", f"input_blocks.{first + j}.0", spelling.down.format(**names(level, j))
            own = spelling.down_attention.format(**names(level, j))
            if attends(level, own):
                yield "attention", f"input_blocks.{first + j}.1", own
        yield "op", f"input_blocks.{first + blocks}.0", spelling.downsample.format(**names(level))
        first = (levels - 1 - level) * (blocks + 1)
        for j in range(blocks + 1):
            yield "block", f"output_blocks.{first + j}.0", spelling.up.format(**names(level, j))
            own = spelling.up_attention.format(**names(level, j))
            attending = attends(level, own)
            if attending:
                yield "attention", f"output_blocks.{first + j}.1", own
        place = f"output_blocks.{first + blocks}.{2 if attending else 1}"
        yield "conv", place, spelling.upsample.format(**names(level))
    present = [own for own in spelling.middle if middle(own)]
    for i, own in enumerate(present):
        yield "attention" if own == spelling.middle[1] else "block", f"middle_block.{i}", own


def _extent(state: State, spelling: Spelling, where: str) -> tuple[int, int]:
    """Levels, and residual blocks of the outermost."""
    pattern = re.escape(spelling.down).replace(r"\{level\}", r"(\d+)").replace(r"\{j\}", r"(\d+)")
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(rf"{pattern}\.", name))}
    if not found:
        raise UserError(f"{where}: no tensor of {spelling.down.format(level=0, j=0)}; expected the blocks of a U-Net")
    return 1 + max(level for level, _ in found), 1 + max((j for level, j in found if level == 0), default=0)


def _as_conv1d(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)[:, :, None] if tensor.ndim > 1 else tensor


def _stack(parts: list[Tensor], heads: Callable[[int], int], name: str, where: str) -> Tensor:
    """q, k, v of [C, C(, 1, 1)] or [C] -> [3C, C, 1] or [3C], rows ordered by head, then q, k, v."""
    channels = parts[0].shape[0] if parts[0].ndim else 0
    if any(part.shape != parts[0].shape or part.numel() not in (channels, channels**2) for part in parts):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise UserError(f"{where}: {name} and its like have shapes {shapes}; expected {channels} channels in and out")
    count = heads(channels)
    flat = [part.reshape(count, channels // count, -1) for part in parts]
    stacked = torch.stack(flat, dim=1).reshape(3 * channels, -1)
    return stacked[:, :, None] if parts[0].ndim > 1 else stacked[:, 0]


def _unstack(qkv: Tensor, config: UNetConfig) -> tuple[Tensor, ...]:
    """[3C, C, 1] or [3C] -> q, k, v of [C, C] or [C]."""
    channels = qkv.shape[0] // 3
    heads = config.heads(channels)
    new = config.use_new_attention_order
    order = (3, heads) if new else (heads, 3)
    parts = qkv.reshape(*order, channels // heads, -1).unbind(0 if new else 1)
    return tuple(part.reshape(channels, -1) if qkv.ndim > 1 else part.reshape(channels) for part in parts)
