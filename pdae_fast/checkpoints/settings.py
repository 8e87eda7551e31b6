"""What users say about a file: keyword options, and the published YAML (or JSON) configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import UNetConfig
from ..errors import UserError
from ..limits import MAX_TIMESTEPS, brief, check_tree, is_int, is_number, parse_json, read_text

_INTEGERS = (
    "input_channel",
    "base_channel",
    "num_residual_blocks_of_a_block",
    "num_heads",
    "head_channel",
    "time_channel",
    "image_size",
    "latent_dim",
    "encoder_channel",
    "timesteps",
    "hidden",
    "layers",
    "num_heads_upsample",
    "norm_groups",
    "stem_channel",
    "num_classes",
)
_NUMBERS = (
    "dropout",
    "norm_eps",
    "freq_shift",
    "time_scale",
    "middle_scale_factor",
    "beta_start",
    "beta_end",
)
_BOOLEANS = (
    "use_new_attention_order",
    "learn_sigma",
    "use_scale_shift_norm",
    "rescale_timesteps",
    "flip_sin_to_cos",
    "middle_attention_norm",
    "center_input_sample",
    "zero_terminal_snr",
    "resamp_with_conv",
    "resblock_updown",
    "class_cond",
)
_LISTS = ("channel_multiplier", "attention_resolutions", "feature_sizes")
_UNET_KEYS = {field.name: field.name for field in dataclasses.fields(UNetConfig)}
_ANYWHERE_KEYS = {
    "image_size": "image_size",
    "image_channel": "input_channel",
    "latent_dim": "latent_dim",
    "encoder_channel": "encoder_channel",
    "timesteps": "timesteps",
    "betas_type": "schedule",
    "linear_beta_start": "linear_beta_start",
    "linear_beta_end": "linear_beta_end",
    "attributes": "attributes",
}
_LATENT_KEYS = {"model_channel": "hidden", "num_layers": "layers"}
# Diff-AE's own settings, as its checkpoints carry them; net_attn holds feature-map sizes, not rates.
_DIFFAE_KEYS = {
    "img_size": "image_size",
    "net_ch": "base_channel",
    "net_ch_mult": "channel_multiplier",
    "net_num_res_blocks": "num_residual_blocks_of_a_block",
    "net_attn": "feature_sizes",
    "net_beatgans_attn_head": "num_heads",
    "dropout": "dropout",
    "T": "timesteps",
    "beta_scheduler": "schedule",
    "style_ch": "latent_dim",
}
# ermongroup/ddim's; attn_resolutions holds feature-map sizes.
_DDIM_KEYS = {
    "in_channels": "input_channel",
    "ch": "base_channel",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_residual_blocks_of_a_block",
    "attn_resolutions": "feature_sizes",
    "dropout": "dropout",
    "resamp_with_conv": "resamp_with_conv",
}
_DDIM_DIFFUSION_KEYS = {
    "beta_schedule": "schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "num_diffusion_timesteps": "timesteps",
}
# The flags of improved- and guided-diffusion; attention_resolutions holds feature-map sizes there.
_FLAGS = {
    "image_size": "image_size",
    "num_channels": "base_channel",
    "channel_mult": "channel_multiplier",
    "num_res_blocks": "num_residual_blocks_of_a_block",
    "attention_resolutions": "feature_sizes",
    "num_heads": "num_heads",
    "num_head_channels": "head_channel",
    "num_heads_upsample": "num_heads_upsample",
    "use_new_attention_order": "use_new_attention_order",
    "use_scale_shift_norm": "use_scale_shift_norm",
    "learn_sigma": "learn_sigma",
    "class_cond": "class_cond",
    "resblock_updown": "resblock_updown",
    "dropout": "dropout",
    "diffusion_steps": "timesteps",
    "noise_schedule": "schedule",
    "rescale_timesteps": "rescale_timesteps",
    "predict_xstart": "prediction",
}
# Options that are known under a flag's name too, or only under it.
_FLAG_OPTIONS = ("num_head_channels", "noise_schedule", "diffusion_steps", "predict_xstart")
_UNSET = ("head_channel", "num_heads_upsample")  # integers of which -1 says that another setting counts
_MAX_YAML = 2**17  # bytes: reading YAML takes its time
_SCHEDULES = {"squaredcos_cap_v2": "cosine", "quad": "scaled_linear"}
_LINEAR_BETAS = {"linear_beta_start": 1e-4, "linear_beta_end": 0.02}


@dataclass(frozen=True)
class Given:
    """One value and where it was said, for messages."""

    value: Any
    origin: str


@dataclass
class Settings:
    """Values by their name in this project's configurations; later sources fill what earlier ones left open."""

    given: dict[str, Given] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        return self.given[name].value if name in self.given else default

    def add(self, found: Mapping[str, Given]) -> None:
        """Fill in ``found``. Saying either num_heads or head_channel settles both."""
        settled = {"num_heads", "head_channel"} if {"num_heads", "head_channel"} & self.given.keys() else set()
        for name, given in found.items():
            if name not in settled:
                self.given.setdefault(name, given)

    def agree(self, found: Mapping[str, Given], where: str) -> None:
        """Fill in ``found``, what the source itself says for certain; UserError where something else was given."""
        for name, said in found.items():
            if name == "dropout":
                continue  # a choice for further training
            for other in {name} | ({"num_heads", "head_channel"} if name in ("num_heads", "head_channel") else set()):
                given = self.given.get(other)
                if given is not None and (other != name or given.value != said.value):
                    raise UserError(
                        f"{where}: {given.origin} says {other} {_show(given.value)} but {said.origin} says "
                        f"{name} {_show(said.value)}"
                    )
        self.add(found)

    def check(self, name: str, actual: Any, where: str, what: str = "the weights") -> None:
        """Raise UserError when ``name`` was given and differs from what ``what`` say."""
        if name not in self.given:
            return
        given = self.given[name]
        same = set(given.value) == set(actual) if name == "attention_resolutions" else given.value == actual
        if not same:
            raise UserError(f"{where}: {given.origin} says {name} {_show(given.value)} but {what} say {_show(actual)}")


def from_options(options: Mapping[str, Any]) -> dict[str, Given]:
    """Keyword options (None means not given) as settings; some have a second name, that of a family's flag."""
    found: dict[str, Given] = {}
    for option, value in options.items():
        if value is None:
            continue
        name = _FLAGS[option] if option in _FLAG_OPTIONS else option
        given = Given(_checked(name, value, "the option"), "the option")
        if name in found and found[name].value != given.value:
            raise UserError(
                f"the options say {name} {_show(found[name].value)} and {option} {_show(given.value)}, which is "
                "another name for it; expected one of them"
            )
        found[name] = given
    return found


def from_config(config: str | Path | Mapping[str, Any]) -> dict[str, Given]:
    """Settings from the published YAML or JSON configuration, or the mapping that such a file holds.

    Sections may nest and have any name; keys that describe no part of the model are ignored. Raises UserError when
    the file cannot be read, contradicts itself, or describes nothing known here.
    """
    if isinstance(config, Mapping):
        origin, tree = "config=", config
        _check_tree(tree, origin)
    elif isinstance(config, str | Path):
        origin, tree = str(config), _parse(Path(config))
    else:
        raise UserError(f"config= is {brief(config)}; expected a file, or the mapping that it holds")
    found: dict[str, Given] = {}
    for path, name, value in _walk(tree, ()):
        section = ".".join(path)[:100]
        place = f"{origin} ({section})" if path else origin
        if name in _LINEAR_BETAS:
            _check_beta(name, value, place)
            continue
        given = Given(_checked(name, value, place), place)
        if name in found and found[name].value != given.value:
            raise UserError(
                f"{origin}: {name} is {_show(found[name].value)} in one section and {_show(given.value)} in another "
                f"({section or 'top level'}); expected one value"
            )
        found.setdefault(name, given)
    if not found:
        raise UserError(
            f"{origin}: no section describes a model; expected keys such as base_channel, channel_multiplier, "
            "num_heads, image_size"
        )
    return found


def from_diffae(parameters: Any) -> dict[str, Given]:
    """Settings of a Diff-AE checkpoint from its hyper_parameters, if it has any."""
    place = "its hyper_parameters"
    # Diff-AE has no setting for the attention layout: it is always legacy.
    layout = {"use_new_attention_order": Given(False, "Diff-AE")}
    if not isinstance(parameters, Mapping):
        return layout
    _check_tree([parameters.get(key) for key in _DIFFAE_KEYS], place)
    return layout | {
        name: Given(_checked(name, parameters[key], place), place)
        for key, name in _DIFFAE_KEYS.items()
        if parameters.get(key) is not None
    }


def _said(origin: str, **values: Any) -> dict[str, Given]:
    return {name: Given(value, origin) for name, value in values.items()}


# What every network of ermongroup/ddim has.
DDIM_NETWORK = _said(
    "ermongroup/ddim",
    num_heads=1,
    use_new_attention_order=False,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
)


def _walk(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every (section, name in this project, value) of a configuration tree."""
    keys = _keys_of(node, path)
    if node.get("num_head_channels", -1) != -1:
        keys = {key: name for key, name in keys.items() if key != "num_heads"}  # the width of a head beats their number
    for key, name in keys.items():
        # Flags that are not set are empty or -1.
        unset = node.get(key) in (None, "") or (key == "num_head_channels" and node[key] == -1)
        if not unset and (name != "attributes" or node[key]):
            yield path, name, node[key]
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, str(key)))


def _keys_of(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, str]:
    # A latent DPM has an input_channel, a dropout and a schedule too: they are not the image model's.
    if any(part.startswith("latent") for part in path):
        return _LATENT_KEYS
    keys = dict(_ANYWHERE_KEYS)
    if not any(part.startswith("encoder") for part in path) and {
        "base_channel",
        "channel_multiplier",
        "num_heads",
        "head_channel",
        "use_new_attention_order",
    } & set(node):
        keys |= _UNET_KEYS
    if {"net_ch", "net_ch_mult", "img_size", "net_attn"} & set(node):
        keys |= _DIFFAE_KEYS
    if {"ch", "ch_mult"} & set(node):
        keys |= _DDIM_KEYS
    if {"num_diffusion_timesteps", "beta_schedule"} & set(node):
        keys |= _DDIM_DIFFUSION_KEYS
    flags = {"num_channels", "num_res_blocks", "num_head_channels", "diffusion_steps", "noise_schedule"}
    if flags & set(node) and "ch" not in node:
        keys = {key: name for key, name in keys.items() if key != "attention_resolutions"} | _FLAGS
    if path[-1:] == ("schedule",):
        keys |= {"kind": "schedule"} | {name: name for name in ("beta_start", "beta_end", "betas", "zero_terminal_snr")}
    if not path:
        keys |= {"prediction": "prediction", "crop": "crop"}
    if not path or path[-1] == "diffusion_config":  # this project's own words; elsewhere it may mean anything
        keys["noise"] = "noise"
    return keys


def _parse(path: Path) -> Mapping[str, Any]:
    text = read_text(path.expanduser(), "a YAML or JSON configuration")
    try:
        tree = parse_json(text)
    except ValueError as error:
        if path.suffix.lower() == ".json":
            raise UserError(f"{path}: not JSON ({error})") from None
        tree = _parse_yaml(text, path)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: holds one {type(tree).__name__}; expected the sections of a configuration")
    return tree


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError(
            f'{path}: reading YAML needs pyyaml: pip install "pdae_fast[convert]" (JSON is read without it)'
        ) from None
    if len(text) > _MAX_YAML:
        raise UserError(f"{path}: more than {_MAX_YAML >> 10} KiB of YAML; expected a configuration")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is made of it: merging keys follows aliases too.
        check_tree(node, _yaml_parts)
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{path}: not YAML (nested too deeply)") from None
    # A scalar that is not what its tag says makes its constructor fail in any way there is.
    except Exception as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _yaml_parts(node: Any) -> list[Any]:
    """The nodes in a node of YAML: a scalar holds text, a sequence nodes, a mapping pairs of them."""
    if isinstance(node.value, str):
        return []
    return [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]


def _check_tree(tree: Any, place: str) -> None:
    try:
        check_tree(tree)
    except ValueError as error:
        raise UserError(f"{place}: {error}; expected the sections of a configuration") from None


def _checked(name: str, value: Any, place: str) -> Any:
    """``value`` in the type that ``name`` has in the configurations."""
    if name in _INTEGERS:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{place}: {name} is {brief(value)}; expected an integer")
        if not is_int(value, 1, MAX_TIMESTEPS) and (name not in _UNSET or value != -1):
            raise UserError(f"{place}: {name} is {brief(value)}; expected an integer from 1 to {MAX_TIMESTEPS}")
    elif name in _LISTS:
        if name != "attention_resolutions":
            value = _numbers(value)  # a flag: "1,2,4"
        kinds = (int, float) if name == "channel_multiplier" else (int,)
        if not isinstance(value, list | tuple) or not all(type(v) in kinds for v in value):
            raise UserError(f"{place}: {name} is {brief(value)}; expected a list of integers")
        if not all(is_number(v, 0, MAX_TIMESTEPS) and v > 0 for v in value):
            raise UserError(f"{place}: {name} is {brief(value)}; expected numbers from 1 to {MAX_TIMESTEPS}")
        value = tuple(value)
    elif name in _BOOLEANS:
        if not isinstance(value, bool):
            raise UserError(f"{place}: {name} is {brief(value)}; expected true or false")
    elif name in _NUMBERS:
        value = _from_yaml(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{place}: {name} is {brief(value)}; expected a number")
        if not is_number(value, 0, MAX_TIMESTEPS):
            raise UserError(f"{place}: {name} is {brief(value)}; expected a number from 0 to {MAX_TIMESTEPS}")
        value = float(value)
    elif name == "schedule":
        if not isinstance(value, str):
            raise UserError(f"{place}: the betas type is {brief(value)}; expected linear or cosine")
        value = _SCHEDULES.get(value, value)
    elif name == "prediction" and isinstance(value, bool):
        value = "sample" if value else "epsilon"  # predict_xstart
    elif name in ("prediction", "crop", "noise"):
        if not isinstance(value, str):
            raise UserError(f"{place}: {name} is {brief(value)}; expected a word")
    elif name == "betas":
        if not isinstance(value, list | tuple):
            raise UserError(f"{place}: betas are {brief(value)}; expected a list of numbers")
        value = tuple(value)
    elif name == "attributes":
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{place}: attributes are {brief(value)}; expected a list of names")
        value = tuple(value)
    return value


def _from_yaml(value: Any) -> Any:
    """YAML takes 1e-4 for a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(value: Any) -> Any:
    """The numbers in a string of them; any other value as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) if "." in part else int(part) for part in value.split(","))
    except ValueError:
        return value


def _check_beta(name: str, value: Any, place: str) -> None:
    try:
        same = abs(float(value) - _LINEAR_BETAS[name]) < 1e-9
    except (TypeError, ValueError, OverflowError):
        same = False
    if not same:
        raise UserError(f"{place}: {name} is {brief(value)}; only {_LINEAR_BETAS[name]} is supported")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return brief(list(value))
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 60 else brief(value)
