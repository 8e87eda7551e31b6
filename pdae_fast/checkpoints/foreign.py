"""From a foreign file's entries to a configuration and tensors under this project's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DiffAEConfig, PDAEConfig, PriorConfig, ScheduleConfig, UNetConfig
from ..errors import UserError
from . import diffae, diffusers, infer, names
from .directory import Loaded, check_finite
from .kinds import Kind, as_state, identify, refusal
from .read import read_file
from .settings import DDIM_NETWORK, Given, Settings, from_diffae
from .unpickle import Inert
from .wrappers import unwrap

DIFFAE = (Kind.DIFFAE, Kind.DIFFAE_AUTOENCODER)
PRIORS = (Kind.PRIOR, Kind.DIFFAE, Kind.UNET, Kind.DIFFUSERS, Kind.DDIM)
AUTOENCODERS = (Kind.AUTOENCODER, Kind.LATENT, Kind.CLASSIFIER, Kind.DECODER)
# The network that a file of one network alone holds.
_SINGLE = {
    Kind.UNET: "denoise_fn",
    Kind.DIFFUSERS: "denoise_fn",
    Kind.DDIM: "denoise_fn",
    Kind.DECODER: "decoder",
    Kind.ENCODER: "encoder",
    Kind.DIFFAE_ENCODER: "encoder",
    Kind.LATENT: "latent_denoise_fn",
}


@dataclass
class ForeignFile:
    """An opened and identified file or directory.

    ``entries``: network name -> (its name in the file, state dict). ``said``: what the source itself says of the
    model beside its weights, ``notes`` what it does not and is assumed.
    """

    where: str
    kind: Kind
    contents: Mapping[str, Any]
    entries: dict[str, tuple[str, Any]]
    weights: str = "ema"
    said: dict[str, Given] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, weights: str = "ema") -> ForeignFile:
        """Read and identify ``path``; ``weights`` is "ema" (preferred where present) or "raw"."""
        path = Path(path).expanduser()
        if path.is_dir():
            raise UserError(f"{path}: a directory; expected a checkpoint file")
        copies = unwrap(read_file(path))
        contents = copies.preferred(weights)
        kind = identify(contents)
        entries = {name: (name, value) for name, value in contents.items() if isinstance(name, str)}
        said: dict[str, Given] = {}
        if kind is Kind.DIFFAE:
            state = contents["state_dict"]
            for prefix, entry in (("model", "denoise_fn"), ("ema_model", "ema_denoise_fn")):
                part = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
                entries[entry] = (prefix, part)
            said = from_diffae(contents.get("hyper_parameters"))
        elif kind in (Kind.DIFFAE_AUTOENCODER, Kind.DIFFAE_CLASSIFIER):
            entries, said = diffae.entries(contents), from_diffae(contents.get("hyper_parameters"))
        elif kind is Kind.DIFFUSERS:
            raise refusal(kind, contents, str(path))
        elif kind in _SINGLE and _SINGLE[kind] not in contents and f"ema_{_SINGLE[kind]}" not in contents:
            held = {"": copies.raw, "ema_": copies.ema}
            entries = {f"{which}{_SINGLE[kind]}": ("", state) for which, state in held.items() if state is not None}
            said = DDIM_NETWORK if kind is Kind.DDIM else {}
        return cls(str(path), kind, contents, entries, weights, said)

    @classmethod
    def open_directory(cls, place: diffusers.Place, weights: str = "ema") -> ForeignFile:
        """Read a diffusers directory; ``weights`` "ema" prefers ``unet_ema`` over ``unet``."""
        model = diffusers.read(place, weights)
        network = "ema_denoise_fn" if model.averaged else "denoise_fn"
        entries = {network: ("", model.state)}
        return cls(model.where, Kind.DIFFUSERS, model.state, entries, weights, model.said, model.notes)

    def has(self, network: str) -> bool:
        return bool(self._pick(network))

    def network(self, network: str) -> dict[str, Tensor]:
        """The float32 tensors of ``network``; UserError when missing, malformed, or not finite."""
        picked = self._pick(network)
        if not picked:
            raise UserError(f"{self.where}: no {network} in it; it is {self.kind.value}")
        label, value = self.entries[picked]
        averaged = picked.startswith("ema_")
        if self.weights == "raw" and averaged:
            raise UserError(f"{self.where}: holds only the EMA weights of {network}; expected raw ones (weights=raw)")
        raw = self._paired(network) or f"ema_{network}" in self.entries
        self.used[network] = "EMA" if averaged else "raw" if raw else "as stored"
        state = as_state(value, label, self.where)
        check_finite({f"{label}.{k}" if label else k: v for k, v in state.items()}, self.where)
        return {name: tensor.float() for name, tensor in state.items()}

    def _pick(self, network: str) -> str | None:
        """The entry that holds ``network``."""
        order = (network, f"ema_{network}") if self.weights == "raw" else (f"ema_{network}", network)
        # An empty state_dict stands for "not saved"; anything else that is wrong is reported when it is read.
        return next((name for name in order if name in self.entries and not _empty(self.entries[name][1])), None)

    def _paired(self, network: str) -> bool:
        trained = {Kind.AUTOENCODER: ("encoder", "decoder"), Kind.PRIOR: ("denoise_fn",), Kind.DIFFAE: ("denoise_fn",)}
        trained |= {Kind.LATENT: ("latent_denoise_fn",), Kind.CLASSIFIER: ("classifier",)}
        if self.kind in (Kind.DIFFAE_AUTOENCODER, Kind.DIFFAE_CLASSIFIER):
            return "state_dict" in self.contents
        return network in trained.get(self.kind, ())

    def describe_weights(self) -> str:
        """ "EMA", "raw", "as stored", or which network has which."""
        if len(set(self.used.values())) <= 1:
            return next(iter(self.used.values()), "as stored")
        return ", ".join(f"{network} {which}" for network, which in self.used.items())


def build(file: ForeignFile, settings: Settings, encoder: ForeignFile | None = None) -> Loaded:
    """The prior or autoencoder in ``file``; ``encoder`` is a second file whose encoder is used instead.

    Raises UserError when the file is of another kind, incomplete, or contradicts ``settings``.
    """
    notes = file.notes
    if settings.get("rescale_timesteps"):
        scale = 1000 / (settings.get("timesteps", 1000) or 1)  # ScheduleConfig refuses 0
        settings.add({"time_scale": dataclasses.replace(settings.given["rescale_timesteps"], value=scale)})
    if file.kind in PRIORS:
        if encoder is not None:
            raise UserError(f"{file.where}: {file.kind.value}, which has no encoder; encoder= goes with a PDAE decoder")
        config, state = _prior(file, settings, notes)
    elif file.kind in AUTOENCODERS:
        config, state = _pdae(file, settings, encoder, notes)
    elif file.kind is Kind.DIFFAE_AUTOENCODER:
        config, state = _diffae(file, settings, encoder, notes)
    else:
        raise refusal(file.kind, file.contents, file.where)
    raw = [network for network, which in file.used.items() if which == "raw"]
    if raw and file.weights == "ema":
        notes.append(f"no EMA weights of {' and '.join(raw)}: the raw ones are used")
    return Loaded(config, state, file.where, file.kind.value, file.describe_weights(), notes)


def _prior(file: ForeignFile, settings: Settings, notes: list[str]) -> tuple[PriorConfig, dict[str, Tensor]]:
    state = _adm_names(file, settings)
    fields = infer.unet_fields(state, file.where)
    if file.kind is Kind.DDIM and fields["downsample"] == "conv":
        fields["downsample"] = "conv_asymmetric"
    if file.kind in (Kind.DIFFAE, Kind.DDIM, Kind.UNET):
        _resolve_feature_sizes(settings, fields, _drawn_size(file, fields), file)
    size = settings.get("image_size", _drawn_size(file, fields))
    unet = _unet_config(fields, settings, file.where, notes)
    if size is None:
        size, reason = infer.prior_image_size(unet.attention_resolutions, unet.levels)
        notes.append(f"image size {size} ({reason}; a U-Net's weights do not say: --image-size, image_size=)")
    schedule = _schedule(settings, notes)
    if file.kind is Kind.UNET:
        if "prediction" not in settings:
            notes.append("its output is eps (the weights do not say: --predict-xstart)")
        if schedule.timesteps != 1000 and "rescale_timesteps" not in settings:
            notes.append("it is given t as it is (the weights do not say: --rescale-timesteps, then t * 1000 / T)")
    with located(file.where):
        config = PriorConfig(size, unet, schedule, **_process(settings))
    return config, {f"unet.{name}": tensor for name, tensor in state.items()}


def _adm_names(file: ForeignFile, settings: Settings) -> dict[str, Tensor]:
    """The prior's tensors under the names of this project's U-Net."""
    state = file.network("denoise_fn")
    if file.kind not in (Kind.DIFFUSERS, Kind.DDIM):
        return infer.rename_classes(state)
    if file.kind is Kind.DDIM and state.pop("logvar", None) is not None:
        file.notes.append('logvar, the learned variance of a "bayesian" model, is left out')
    shortcut = next((name for name in state if ".conv_shortcut." in name), None)
    if file.kind is Kind.DDIM and shortcut:
        raise UserError(f"{file.where}: a U-Net with 3x3 shortcuts ({shortcut}); expected 1x1 ones (nin_shortcut)")

    def heads(channels: int) -> int:
        width = settings.get("head_channel", -1)
        count = settings.get("num_heads", 1) if width == -1 else channels // width if width > 0 else 0
        if count < 1 or channels % count or (width != -1 and channels % width):
            said = f"num_heads={count}" if width == -1 else f"head_channel={width}"
            raise UserError(f"{file.where}: attention layers of {channels} channels cannot be split by {said}")
        return count

    spelling = names.DDIM if file.kind is Kind.DDIM else names.DIFFUSERS
    return names.to_adm(state, spelling, heads, file.where)


def _pdae(
    file: ForeignFile, settings: Settings, encoder_file: ForeignFile | None, notes: list[str]
) -> tuple[PDAEConfig, dict[str, Tensor]]:
    where = file.where
    if not file.has("decoder"):
        flag = "--latent" if file.kind is Kind.LATENT else "--classifier"
        raise UserError(
            f"{where}: {file.kind.value} without the autoencoder it belongs to; "
            f"convert the autoencoder with {flag} {where}"
        )
    if encoder_file is None and not file.has("encoder"):
        raise UserError(f"{where}: a PDAE decoder without an encoder; expected one in it, or --encoder FILE (encoder=)")
    decoder = file.network("decoder")
    source = encoder_file or file
    encoder = source.network("encoder")
    fields, shape = infer.unet_fields(decoder, where), infer.encoder_shape(encoder, source.where)
    if shape.input_channel != fields["input_channel"]:
        raise UserError(
            f"{where}: the decoder works on {fields['input_channel']} channels; "
            f"the encoder of {source.where} expects {shape.input_channel}"
        )
    label = infer.need(decoder, "label_emb.weight", 2, where)
    if label.shape[1] != shape.latent_dim:
        raise UserError(
            f"{where}: label_emb.weight has shape {list(label.shape)}; the encoder of {source.where} gives z of "
            f"{shape.latent_dim} dimensions, so expected {[label.shape[0], shape.latent_dim]}"
        )
    for name in ("image_size", "latent_dim", "encoder_channel"):
        settings.check(name, getattr(shape, name), where, "the encoder's weights")
    unet = _unet_config(fields, settings, where, notes)
    with located(where):
        config = PDAEConfig(
            image_size=shape.image_size,
            latent_dim=shape.latent_dim,
            encoder_channel=shape.encoder_channel,
            unet=unet,
            schedule=_schedule(settings, notes),
            **_process(settings),
        )
    state = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    return config, state | {f"decoder.{name}": tensor for name, tensor in decoder.items()}


def _diffae(
    file: ForeignFile, settings: Settings, encoder_file: ForeignFile | None, notes: list[str]
) -> tuple[DiffAEConfig, dict[str, Tensor]]:
    where, source = file.where, encoder_file or file
    if not file.has("unet"):
        parts = ", ".join(f"its {name.removeprefix('ema_')}" for name in file.entries)
        raise UserError(f"{where}: {file.kind.value} without its U-Net ({parts} alone); expected the whole of it")
    if not source.has("encoder"):
        raise UserError(f"{where}: the U-Net of a Diff-AE alone; expected its encoder too: --encoder FILE (encoder=)")
    unet, encoder = diffae.unet_names(file.network("unet")), source.network("encoder")
    fields = infer.unet_fields(unet, where)
    shape = infer.half_unet_fields(
        encoder, fields["base_channel"], fields["num_residual_blocks_of_a_block"], source.where
    )
    latent_dim = infer.need(unet, "input_blocks.1.0.emb_z_layers.1.weight", 2, where).shape[1]
    for name, value in (("latent_dim", latent_dim), ("input_channel", fields["input_channel"])):
        if shape[name] != value:
            raise UserError(f"{source.where}: the encoder has {name} {shape[name]}; the U-Net of {where} has {value}")
    settings.check("latent_dim", latent_dim, where)
    drawn = _drawn_size(file, fields)
    _resolve_feature_sizes(settings, fields, drawn, file)
    size = settings.get("image_size") or drawn
    # The encoder is of more levels than the U-Net, and attends where the feature maps are of the same size.
    own, theirs = set(fields["attention_resolutions"]), set(shape["attention_resolutions"])
    if own != {rate for rate in theirs if rate < 2 ** len(fields["channel_multiplier"])}:
        raise UserError(
            f"{where}: the U-Net attends at down-sampling rates {sorted(own)} and the encoder of {source.where} at "
            f"{sorted(theirs)}; expected the same"
        )
    unet_config = _unet_config(fields, settings, where, notes)
    unet_config = dataclasses.replace(unet_config, attention_resolutions=tuple(sorted(theirs)))
    if size is None:
        size, reason = infer.prior_image_size(unet_config.attention_resolutions, len(shape["encoder_multiplier"]))
        notes.append(f"image size {size} ({reason}; the weights do not say: --image-size, image_size=)")
    with located(where):
        config = DiffAEConfig(
            image_size=size,
            latent_dim=latent_dim,
            unet=unet_config,
            encoder_multiplier=shape["encoder_multiplier"],
            schedule=_schedule(settings, notes),
            noise=settings.get("noise", "normal"),
        )
    state = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    return config, state | {f"unet.{name}": tensor for name, tensor in unet.items()}


def _unet_config(fields: dict[str, Any], settings: Settings, where: str, notes: list[str]) -> UNetConfig:
    rates = settings.given.get("attention_resolutions")
    if rates is not None:
        # A rate below the deepest level asks for nothing.
        reached = tuple(rate for rate in rates.value if rate < 2 ** len(fields["channel_multiplier"]))
        settings.given["attention_resolutions"] = dataclasses.replace(rates, value=reached)
    # The two ways of padding a strided convolution leave the same tensors.
    if fields["downsample"] == "conv" and settings.get("downsample") == "conv_asymmetric":
        fields["downsample"] = "conv_asymmetric"
    for name, value in fields.items():
        if name == "time_channel":
            value = value or 4 * fields["base_channel"]
        settings.check(name, value, where)
    if len(fields["channel_multiplier"]) > 1:
        settings.check("resamp_with_conv", fields["downsample"] != "pool", where)
        settings.check("resblock_updown", fields["downsample"] == "residual", where)
    settings.check("class_cond", fields["num_classes"] is not None, where)
    free = {f.name for f in dataclasses.fields(UNetConfig)} - fields.keys()
    with located(where):
        unet = UNetConfig(**fields, **{name: settings.get(name) for name in free if name in settings})
    attends = unet.middle == "attention" or unet.attention_resolutions
    if attends and not {"num_heads", "head_channel"} & settings.given.keys():
        notes.append("1 attention head per layer (the weights do not say: --num-heads, --head-channel, --config)")
    elif "use_new_attention_order" not in settings and any(unet.heads(c) > 1 for c in unet.attention_channels()):
        notes.append("the legacy attention layout (the weights do not say: --use-new-attention-order, --config)")
    return unet


def _schedule(settings: Settings, notes: list[str]) -> ScheduleConfig:
    start, end = settings.get("beta_start"), settings.get("beta_end")
    kind, timesteps = settings.get("schedule", "linear"), settings.get("timesteps", 1000)
    if kind != "sigmoid" and (start, end) == (1e-4, 0.02) and timesteps == 1000:
        start = end = None  # the published ones, which need no saying
    extra = {name: settings.get(name) for name in ("betas", "zero_terminal_snr") if name in settings}
    config = ScheduleConfig(kind, timesteps, start, end, **extra)
    if "schedule" not in settings:
        notes.append(f"a {config.kind} noise schedule of {config.timesteps} steps (--schedule, --timesteps, --config)")
    return config


def _process(settings: Settings) -> dict[str, Any]:
    return {name: settings.get(name) for name in ("noise", "prediction", "crop") if name in settings}


def _drawn_size(file: ForeignFile, fields: dict[str, Any]) -> int | None:
    """The image size from Diff-AE's buffer of fixed noise [N, C, S, S], if there is one."""
    noise = (file.contents.get("state_dict") or {}).get("x_T") if file.kind in DIFFAE else None
    if isinstance(noise, Tensor) and noise.ndim == 4 and noise.shape[1] == fields["input_channel"]:
        return noise.shape[3] if noise.shape[2] == noise.shape[3] else None
    return None


def _resolve_feature_sizes(settings: Settings, fields: dict[str, Any], drawn: int | None, file: ForeignFile) -> None:
    """Diff-AE's, ddim's and guided-diffusion's attention lists hold feature-map sizes: turn them into rates, or the
    image size they imply."""
    where, rates = file.where, set(fields["attention_resolutions"])
    reachable = {2**level for level in range(len(fields["channel_multiplier"]))}
    # A PDAE-style configuration of a Diff-AE prior has rates already: those are compared later.
    if file.kind in DIFFAE and set(settings.get("attention_resolutions", rates)) != rates:
        settings.given["feature_sizes"] = settings.given.pop("attention_resolutions")
    given = settings.given.pop("feature_sizes", None)
    if given is None:
        return

    def as_rates(image_size: int) -> set[int]:
        return {image_size // s for s in given.value if s > 0 and image_size % s == 0} & reachable

    size = settings.get("image_size") or drawn
    sizes = [size] if size else sorted({s * r for s in given.value for r in rates})
    fitting = [s for s in sizes if as_rates(s) == rates]
    if not fitting and (sizes or rates):
        raise UserError(
            f"{where}: {given.origin} says attention at feature-map sizes {sorted(given.value)}"
            + (f" of {size}x{size} images" if size else "")
            + f" but the weights say attention_resolutions (down-sampling rates) {sorted(rates)}"
        )
    if fitting and "image_size" not in settings:
        settings.given["image_size"] = dataclasses.replace(given, value=fitting[0])


def _empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value and not isinstance(value, Inert)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the file's name before the message of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
