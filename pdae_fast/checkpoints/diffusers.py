"""Reading a diffusers directory: which files of it count, and what its configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..limits import load_json, read_text
from .kinds import Kind, as_state, identify
from .names import modernise
from .read import read_file
from .settings import Given

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
_EXPECTED = "expected a UNet2DModel that predicts noise in images"
# Read in this order: whole precision before half, tensors alone before pickles.
_FILES = (
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}.safetensors.index.json",
    f"{WEIGHTS}.bin",
    f"{WEIGHTS}.bin.index.json",
    f"{WEIGHTS}.fp16.safetensors",
    f"{WEIGHTS}.safetensors.index.fp16.json",
    f"{WEIGHTS}.fp16.bin",
    f"{WEIGHTS}.bin.index.fp16.json",
)
_SUFFIXES = (".safetensors", ".bin", ".index.json")
# What the library takes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
# Schedulers whose training process is the usual one, whatever way they sample; some have end points of their own.
_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "RePaintScheduler",
)
_NARROW = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PIPELINES = ("ConsistencyModelPipeline", "ScoreSdeVePipeline", "KarrasVePipeline")


@dataclass(frozen=True)
class Place:
    """A diffusers model on disk: its folder, and the weights file where the user named one."""

    folder: Path
    file: Path | None = None


@dataclass
class Model:
    """A model as read: today's tensor names, and what its configurations say. ``averaged``: EMA weights."""

    where: str
    state: dict[str, Tensor]
    averaged: bool
    said: dict[str, Given]
    notes: list[str] = field(default_factory=list)


def find(path: Path) -> Place | None:
    """The diffusers model that ``path`` names: a pipeline's or a model's folder, or a file inside; else None."""
    if path.is_dir():
        own = _is_theirs(path / CONFIG) or (path / INDEX).is_file() or (path / SCHEDULER).is_file()
        parts = any(_is_theirs(path / part / CONFIG) for part in ("unet", "unet_ema"))
        weights = any((path / part / name).is_file() for part in (".", "unet", "unet_ema") for name in _FILES)
        return Place(path) if own or parts or weights else None
    if path.name in (INDEX, SCHEDULER) and path.is_file():
        return find(path.parent if path.parent.name != "scheduler" else path.parent.parent)
    if path.name == CONFIG and _is_theirs(path):
        return Place(path.parent)
    if path.is_file() and path.name.endswith(_SUFFIXES) and _is_theirs(path.parent / CONFIG):
        return Place(path.parent, path)
    return None


def read(place: Place, weights: str) -> Model:
    """The model at ``place``; ``weights`` "ema" prefers ``unet_ema`` over ``unet``, "raw" takes ``unet``.

    Raises UserError that names what is missing, of another kind, or not supported.
    """
    notes: list[str] = []
    _refuse_pipeline(place.folder)
    folder, averaged = _model_folder(place.folder, weights, notes)
    config = _config(folder / CONFIG)
    said = network_settings(config, folder / CONFIG)
    said |= _scheduler_settings(folder, notes)
    file = place.file or _weights_file(folder)
    if ".fp16." in file.name or "index.fp16" in file.name:
        notes.append(f"weights of half precision ({file.name})")
    state = read_weights(file)
    kind = identify(state)
    if kind is not Kind.DIFFUSERS:
        what = kind.value if kind is not Kind.UNKNOWN else "not the tensors of a UNet2DModel"
        raise UserError(f"{file}: {what}; {folder / CONFIG} says UNet2DModel")
    return Model(str(file if place.file else folder), modernise(state), averaged, said, notes)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of ``file``, or of the shards that it lists."""
    if not file.name.endswith(".json"):
        contents = read_file(file)
        return as_state(contents, "", str(file))
    listed = _json(file).get("weight_map")
    if not isinstance(listed, Mapping) or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{file}: no weight_map in it; expected an index of shards")
    state: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        shard = file.parent / Path(name).name
        if not shard.is_file():
            raise UserError(f"{shard}: missing; {file.name} says that it holds part of the weights")
        state |= as_state(read_file(shard), "", str(shard))
    missing = sorted(listed.keys() - state.keys())
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is in no shard; expected it in {listed[missing[0]]}")
    return state


def network_settings(config: Mapping[str, Any], path: Path) -> dict[str, Given]:
    """What config.json says of the network, in this project's words; UserError for what it cannot express."""
    c = _DEFAULTS | dict(config)
    for name, default in _DEFAULTS.items():
        _check_type(name, c[name], default, path)
    _refuse_variants(c, path)
    widths, downs, ups = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
    if not len(widths) == len(downs) == len(ups) or not widths:
        raise UserError(
            f"{path}: {len(downs)} down blocks, {len(ups)} up blocks and {len(widths)} widths; expected as many of each"
        )
    if min(widths) < 1:
        raise UserError(f"{path}: block_out_channels is {list(widths)}; expected positive numbers")
    base, levels = widths[0], len(widths)
    values = {
        "input_channel": c["in_channels"],
        "learn_sigma": c["out_channels"] == 2 * c["in_channels"],
        "base_channel": base,
        "channel_multiplier": tuple(width // base if width % base == 0 else width / base for width in widths),
        "num_residual_blocks_of_a_block": c["layers_per_block"],
        "attention_resolutions": tuple(2**i for i, name in enumerate(downs) if name.startswith("Attn")),
        "time_channel": c["time_embedding_dim"] or 4 * base,
        "use_scale_shift_norm": c["resnet_time_scale_shift"] == "scale_shift",
        "num_classes": c["num_class_embeds"],
        "middle": "none" if c["mid_block_type"] is None else "attention" if c["add_attention"] else "plain",
        "middle_scale_factor": float(c["mid_block_scale_factor"]),
        "center_input_sample": c["center_input_sample"],
        "flip_sin_to_cos": c["flip_sin_to_cos"],
        "freq_shift": c["freq_shift"],
        "norm_groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "dropout": c["dropout"],
        "use_new_attention_order": False,
    }
    if levels > 1:
        values["downsample"] = _resampling(c, "down", downs[:-1], path)
        values["upsample"] = _resampling(c, "up", ups[:-1], path)
    if c["attention_head_dim"] is None:
        values["num_heads"] = 1
    else:
        values["head_channel"] = c["attention_head_dim"]
    if (size := _image_size(c["sample_size"], path)) is not None:
        values["image_size"] = size
    return {name: Given(value, str(path)) for name, value in values.items()}


def _resampling(c: Mapping[str, Any], way: str, blocks: tuple[str, ...], path: Path) -> str:
    """The value of ``downsample`` or ``upsample`` that these blocks stand for."""
    of_attention = c[f"{way}sample_type"] or "conv"
    kinds = {
        "residual" if name.startswith("Resnet") or (name.startswith("Attn") and of_attention == "resnet") else "conv"
        for name in blocks
    }
    if len(kinds) > 1:
        raise UserError(
            f"{path}: {way}_block_types {', '.join(blocks)} with {way}sample_type {of_attention!r} resample partly by "
            "convolution, partly by residual blocks; expected one of them at all levels"
        )
    return "conv_asymmetric" if kinds == {"conv"} and way == "down" and c["downsample_padding"] == 0 else kinds.pop()


def _refuse_variants(c: Mapping[str, Any], path: Path) -> None:
    fork = "attention_legacy_order" if c.get("attention_legacy_order") else c["time_embedding_type"] == "adm"
    if fork:
        what = fork if isinstance(fork, str) else "time_embedding_type 'adm'"
        raise UserError(
            f"{path}: made for a fork of diffusers ({what}), without which it computes something else; expected the "
            "guided-diffusion file that it was converted from"
        )
    if c["time_embedding_type"] != "positional":
        raise UserError(f"{path}: time_embedding_type is {c['time_embedding_type']!r}; {_EXPECTED}")
    for name, known in _BLOCKS.items():
        other = next((block for block in c[name] if block not in known), None)
        if other is not None:
            raise UserError(f"{path}: a network with {other}; expected {name} among {', '.join(known)}")
    # Attention on the way down and not on the way up, or the other way round.
    ups = c["up_block_types"][::-1]
    for down, up in zip(c["down_block_types"], ups, strict=False):
        if down.startswith("Attn") != up.startswith("Attn"):
            raise UserError(f"{path}: {down} and {up} at one level; expected attention in both or in none")
    expected = {
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "class_embed_type": (None,),
        "attn_norm_num_groups": (None, c["norm_num_groups"]),
        "downsample_type": ("conv", "resnet", None),
        "upsample_type": ("conv", "resnet", None),
        "downsample_padding": (0, 1),
    }
    for name, known in expected.items():
        if c[name] not in known:
            shown = " or ".join("null" if value is None else str(value) for value in known)
            raise UserError(f"{path}: {name} is {c[name]!r}; only {shown} is supported")


def _check_type(name: str, value: Any, default: Any, path: Path) -> None:
    """UserError unless ``value`` is of the kind that ``name`` has in the library."""
    optional = name in (
        "sample_size", "time_embedding_dim", "mid_block_type", "attention_head_dim", "attn_norm_num_groups",
        "class_embed_type", "num_class_embeds", "downsample_type", "upsample_type",
    )  # fmt: skip
    if value is None and optional:
        return
    if isinstance(default, tuple):
        kind = str if isinstance(default[0], str) else int
        good, what = isinstance(value, list | tuple) and all(type(v) is kind for v in value), "a list"
    elif isinstance(default, bool):
        good, what = isinstance(value, bool), "true or false"
    elif isinstance(default, str) or name == "class_embed_type":
        good, what = isinstance(value, str), "a word"
    elif name == "sample_size":
        return
    else:
        whole = isinstance(default, int) and name != "mid_block_scale_factor" or default is None
        good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        good, what = good and value >= 0, "a number"
    if not good:
        raise UserError(f"{path}: {name} is {value!r}; expected {what}")


def _image_size(size: Any, path: Path) -> int | None:
    if size is None or (isinstance(size, int) and not isinstance(size, bool)):
        return size
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] and isinstance(size[0], int):
        return size[0]
    raise UserError(f"{path}: sample_size is {size!r}; expected the side of a square image")


def _refuse_pipeline(folder: Path) -> None:
    """UserError when model_index.json names a pipeline that is no plain diffusion of images."""
    if not (folder / INDEX).is_file():
        return
    index = _json(folder / INDEX)
    name = index.get("_class_name")
    encoders = [part for part in ("vae", "vqvae", "movq", "text_encoder", "bert", "prior") if index.get(part)]
    if encoders:
        raise UserError(f"{folder}: {name}, a diffusion of latents or from text (it has {encoders[0]}); {_EXPECTED}")
    if name in _PIPELINES:
        raise UserError(f"{folder}: {name}, another process than DDPM's; {_EXPECTED}")


def _model_folder(folder: Path, weights: str, notes: list[str]) -> tuple[Path, bool]:
    """Where the U-Net is, and whether it is an average."""
    if folder.name == "unet_ema":
        if weights == "raw":
            raise UserError(f"{folder}: holds EMA weights; expected raw ones (weights=raw)")
        return folder, True
    if (folder / CONFIG).is_file() or any((folder / name).is_file() for name in _FILES):
        return folder, False
    raw, ema = folder / "unet", folder / "unet_ema"
    if ema.is_dir() and (weights == "ema" or not raw.is_dir()):
        if weights == "raw":
            raise UserError(f"{folder}: holds EMA weights alone (unet_ema); expected raw ones (weights=raw)")
        if raw.is_dir():
            notes.append("unet_ema is used, not unet (--weights raw for that one)")
        return ema, True
    if raw.is_dir():
        return raw, False
    raise UserError(f"{folder}: no {CONFIG} in it, and no unet; expected a diffusers model or pipeline")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: no {CONFIG} in it; expected that of the UNet2DModel beside its weights")
    config = _json(path)
    name = config.get("_class_name")
    if name != "UNet2DModel":
        hint = " (conditional on text or the like)" if name == "UNet2DConditionModel" else ""
        raise UserError(f"{path}: a {name or 'configuration without _class_name'}{hint}; {_EXPECTED}")
    return config


def _weights_file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    other = sorted(p.name for p in folder.glob(f"{WEIGHTS}*")) or sorted(p.name for p in folder.glob("*.safetensors"))
    more = f", only {other[0]}" if other else ""
    raise UserError(f"{folder}: no weights in it{more}; expected {_FILES[0]} or {_FILES[2]}")


def _scheduler_settings(folder: Path, notes: list[str]) -> dict[str, Given]:
    """What scheduler_config.json says of the process; a note where there is none."""
    places = (folder / SCHEDULER, folder / "scheduler" / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    # Beside the model, or, for a model in a pipeline's folder, beside that.
    if folder.name in ("unet", "unet_ema"):
        places += (folder.parent / SCHEDULER,)
    else:
        places = places[:2]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        notes.append(f"eps is predicted, with the library's linear betas over 1000 steps (no {SCHEDULER})")
        return {name: Given(value, "the library") for name, value in (("schedule", "linear"), ("timesteps", 1000))}
    return scheduler_settings(_json(path), path)


def scheduler_settings(config: Mapping[str, Any], path: Path) -> dict[str, Given]:
    """The noise schedule and the prediction that a scheduler's configuration states."""
    name = config.get("_class_name")
    if name not in (*_SCHEDULERS, *_NARROW):
        raise UserError(f"{path}: {name or 'no _class_name'}; expected the scheduler of a DDPM, such as DDPMScheduler")
    ends = (0.00085, 0.012) if name in _NARROW else (1e-4, 0.02)
    kind, stored = config.get("beta_schedule", "linear"), config.get("trained_betas")
    values: dict[str, Any] = {
        "schedule": "stored" if stored is not None else _BETAS.get(kind) if isinstance(kind, str) else None,
        "timesteps": config.get("num_train_timesteps", 1000),
        "prediction": config.get("prediction_type", "epsilon"),
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
    }
    if values["schedule"] is None:
        raise UserError(f"{path}: beta_schedule is {kind!r}; expected one of {', '.join(_BETAS)}")
    if values["prediction"] not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{path}: prediction_type is {values['prediction']!r}; expected epsilon, v_prediction or sample"
        )
    for field_name, expected in (("timesteps", int), ("zero_terminal_snr", bool)):
        if type(values[field_name]) is not expected:
            raise UserError(f"{path}: {field_name} is {values[field_name]!r}; expected {expected.__name__}")
    if stored is not None:
        if not isinstance(stored, list) or not all(isinstance(b, int | float) for b in stored):
            raise UserError(f"{path}: trained_betas is a {type(stored).__name__}; expected a list of numbers")
        values |= {"betas": tuple(stored), "timesteps": len(stored)}
    elif values["schedule"] != "cosine":
        for end, default in (("beta_start", ends[0]), ("beta_end", ends[1])):
            values[end] = config.get(end, default)
            if isinstance(values[end], bool) or not isinstance(values[end], int | float):
                raise UserError(f"{path}: {end} is {values[end]!r}; expected a number")
    return {name: Given(value, str(path)) for name, value in values.items()}


def _is_theirs(path: Path) -> bool:
    """Whether ``path`` is a diffusers configuration (a saved model of this project has a config.json too)."""
    try:
        return '"_class_name"' in read_text(path, "a configuration")
    except UserError:
        return False


def _json(path: Path) -> dict[str, Any]:
    values = load_json(path, "a configuration of diffusers")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds one {type(values).__name__}; expected a JSON object")
    return values
