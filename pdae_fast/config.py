"""Frozen configurations, their JSON form, and the presets of the paper's Table 1.

Field names of :class:`UNetConfig` are those of the published YAML files, so that a user can paste them.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .limits import (
    MAX_ATTRIBUTES,
    MAX_BLOCKS,
    MAX_LAYERS,
    MAX_LEVELS,
    MAX_NAME,
    MAX_SIZE,
    MAX_TIMESTEPS,
    boolean,
    brief,
    instance,
    is_int,
    is_number,
    listed,
    load_json,
    one_of,
    positive,
    require,
    weights,
)
from .student_config import StudentConfig

FORMAT_VERSION = 1
NORM_GROUPS = 32  # of E_phi's norms, and of the U-Net's unless its configuration says otherwise
NOISES = ("normal", "standardised")  # how random x_T is drawn, see samplers.noise.random_noise
SCHEDULES = ("linear", "cosine", "constant", "scaled_linear", "sigmoid", "stored")
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what the output of a U-Net is
CROPS = ("centre", "celeba")  # which square of an image is seen, see data.preprocess
DOWNSAMPLES = ("residual", "conv", "conv_asymmetric", "pool")
UPSAMPLES = ("residual", "conv", "nearest")
MIDDLES = ("attention", "plain", "none")


@dataclass(frozen=True)
class ScheduleConfig:
    """The diffusion process.

    ``kind`` says how beta runs: ``linear``, ``scaled_linear`` (its root is linear) and ``sigmoid`` from ``beta_start``
    to ``beta_end``; ``cosine``; ``constant`` (0.008); ``stored``, the values of ``betas``. Without ``beta_start`` and
    ``beta_end`` they are 1e-4 and 0.02, of the linear kinds times 1000 / T. ``zero_terminal_snr`` shifts and scales
    sqrt(alpha_bar) so that it ends at 0 (arXiv 2305.08891, algorithm 1).
    """

    kind: str = "linear"
    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        one_of("schedule kind", self.kind, SCHEDULES)
        require(
            is_int(self.timesteps, 2, MAX_TIMESTEPS),
            f"timesteps must be an integer from 2 to {MAX_TIMESTEPS}, not {brief(self.timesteps)}",
        )
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            require(
                value is None or (is_number(value, 0, 1) and 0 < value < 1),
                f"{name} must be between 0 and 1, not {brief(value)}",
            )
        require((self.beta_start is None) == (self.beta_end is None), "beta_start and beta_end go together")
        if self.betas is not None:
            object.__setattr__(self, "betas", listed("betas", self.betas, "numbers"))
            require(
                all(is_number(b, 0, 1) and b > 0 for b in self.betas) and len(self.betas) == self.timesteps,
                f"betas must be {self.timesteps} numbers between 0 and 1",
            )
        require((self.betas is not None) == (self.kind == "stored"), "betas go with the schedule kind stored")
        boolean("zero_terminal_snr", self.zero_terminal_snr)


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net of eps_theta: ADM's, and through the second half of the fields those of its relatives.

    ``attention_resolutions`` are down-sampling *rates* (as in PDAE and guided-diffusion): 4 means attention at 16x16
    for a 64x64 image. ``head_channel`` = -1 means that ``num_heads`` counts; otherwise every attention layer has
    ``channels // head_channel`` heads. ``use_new_attention_order`` False is the legacy layout of the qkv rows.
    ``learn_sigma`` doubles the output channels, of which the first half is eps. ``time_channel`` is the width of the
    time embedding, 4 * base_channel when None (Diff-AE priors use 512).

    channel_multiplier: widths of the levels are int(m * base_channel): fractions are allowed.
    stem_channel: width of the first convolution, None: of the first level.
    use_scale_shift_norm: time scales and shifts the second norm of a block; False: it is added before it.
    downsample: a "residual" block with 2x pooling, a "conv" of stride 2 (padding 1; "conv_asymmetric": zeros at the
        bottom and right only), or "pool" alone.
    upsample: a "residual" block with 2x nearest, a "conv" after 2x nearest, or "nearest" alone.
    norm_groups: of every norm, at most its channels; norm_eps: of every norm.
    flip_sin_to_cos: the time sinusoid starts with the cosine; freq_shift: its frequencies are
        exp(-ln 10000 i / (half - freq_shift)); time_scale: it is that of t * time_scale.
    num_heads_upsample: heads in the output half where ``num_heads`` counts, -1: as many.
    middle: "attention" between two blocks, "plain" (two blocks) or "none"; middle_attention_norm: it has a norm;
        middle_scale_factor: what (residual + branch) is divided by there.
    num_classes: of a class-conditional network, whose label embedding is added to that of time.
    center_input_sample: the network is given 2x - 1.
    """

    input_channel: int = 3
    base_channel: int = 64
    channel_multiplier: tuple[int | float, ...] = (1, 2, 4, 8)
    num_residual_blocks_of_a_block: int = 2
    attention_resolutions: tuple[int, ...] = (4,)
    num_heads: int = 1
    head_channel: int = -1
    use_new_attention_order: bool = False
    dropout: float = 0.1
    learn_sigma: bool = False
    time_channel: int | None = None
    stem_channel: int | None = None
    use_scale_shift_norm: bool = True
    downsample: str = "residual"
    upsample: str = "residual"
    norm_groups: int = NORM_GROUPS
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_scale: float = 1.0
    num_heads_upsample: int = -1
    middle: str = "attention"
    middle_attention_norm: bool = True
    middle_scale_factor: float = 1.0
    num_classes: int | None = None
    center_input_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("channel_multiplier", "attention_resolutions"):
            object.__setattr__(self, name, listed(name, getattr(self, name), "numbers"))
        for name in ("input_channel", "base_channel", "num_heads", "norm_groups"):
            positive(name, getattr(self, name))
        positive("num_residual_blocks_of_a_block", self.num_residual_blocks_of_a_block, most=MAX_BLOCKS)
        for name in ("time_channel", "stem_channel", "num_classes"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), "a positive integer or None")
        for name in ("head_channel", "num_heads_upsample"):
            if getattr(self, name) != -1:
                positive(name, getattr(self, name), "-1 or a positive integer")
        for name in (
            "use_new_attention_order",
            "learn_sigma",
            "use_scale_shift_norm",
            "flip_sin_to_cos",
            "middle_attention_norm",
            "center_input_sample",
        ):
            boolean(name, getattr(self, name))
        require(
            1 <= len(self.channel_multiplier) <= MAX_LEVELS
            and all(is_number(m, 0, MAX_SIZE) for m in self.channel_multiplier)
            and all(1 <= m * self.base_channel <= MAX_SIZE for m in self.channel_multiplier),
            f"channel_multiplier must be 1 to {MAX_LEVELS} positive numbers that make widths from 1 to {MAX_SIZE}, "
            f"not {brief(self.channel_multiplier)}",
        )
        whole = tuple(int(m) if m == int(m) else m for m in self.channel_multiplier)
        object.__setattr__(self, "channel_multiplier", whole)
        require(
            all(is_int(r, 1, MAX_SIZE) for r in self.attention_resolutions)
            and len(self.attention_resolutions) <= 2 * MAX_LEVELS,
            f"attention_resolutions must be positive integers (rates), not {brief(self.attention_resolutions)}",
        )
        one_of("downsample", self.downsample, DOWNSAMPLES)
        one_of("upsample", self.upsample, UPSAMPLES)
        one_of("middle", self.middle, MIDDLES)
        require(
            is_number(self.dropout, 0, 1) and self.dropout < 1, f"dropout must be in [0, 1), not {brief(self.dropout)}"
        )
        require(
            is_number(self.freq_shift, 0, MAX_SIZE) and self.freq_shift < self.base_channel // 2,
            f"freq_shift must be from 0 to less than half of base_channel, not {brief(self.freq_shift)}",
        )
        for name, least, most in (
            ("norm_eps", 1e-12, 1),
            ("time_scale", 1e-6, MAX_SIZE),
            ("middle_scale_factor", 1e-6, MAX_SIZE),
        ):
            value = getattr(self, name)
            require(
                is_number(value, least, most),
                f"{name} must be a positive number from {least:g} to {most}, not {brief(value)}",
            )
        blocks = self.blocks()
        embedded = self.time_width + 2 * sum(out for _, out in blocks) + (self.num_classes or 0)
        weights("the U-Net", sum(9 * out * (into + out) for into, out in blocks) + self.time_width * embedded)
        for channels in sorted({width for block in blocks for width in block}):
            groups = min(self.norm_groups, channels)
            require(
                channels % groups == 0,
                f"a norm of {channels} channels cannot have {groups} groups; expected multiples of norm_groups",
            )
        for channels in self.attention_channels():
            for heads in (self.num_heads, self.num_heads_upsample if self.num_heads_upsample != -1 else 1):
                per_head = heads if self.head_channel == -1 else self.head_channel
                require(
                    channels % per_head == 0,
                    f"attention layers of {channels} channels cannot be split by "
                    + (f"num_heads={heads}" if self.head_channel == -1 else f"head_channel={self.head_channel}"),
                )

    @property
    def time_width(self) -> int:
        return 4 * self.base_channel if self.time_channel is None else self.time_channel

    @property
    def out_channels(self) -> int:
        return self.input_channel * (2 if self.learn_sigma else 1)

    @property
    def levels(self) -> int:
        return len(self.channel_multiplier)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, outermost first."""
        return tuple(int(m * self.base_channel) for m in self.channel_multiplier)

    @property
    def stem_width(self) -> int:
        return self.widths[0] if self.stem_channel is None else self.stem_channel

    def heads(self, channels: int, output: bool = False) -> int:
        """Heads of an attention layer of ``channels``; ``output``: of the output half."""
        if self.head_channel != -1:
            return channels // self.head_channel
        return self.num_heads_upsample if output and self.num_heads_upsample != -1 else self.num_heads

    def attention_channels(self) -> set[int]:
        """Widths of all attention layers (the middle block of a PDAE's G always has one)."""
        widths = {width for i, width in enumerate(self.widths) if 2**i in self.attention_resolutions}
        return widths | {self.widths[-1]}

    def skip_widths(self) -> list[int]:
        """Channels of every map that the trunk leaves for the decoders, first to last."""
        skips = [self.stem_width]
        for level, width in enumerate(self.widths):
            skips += [width] * (self.num_residual_blocks_of_a_block + (level < self.levels - 1))
        return skips

    def blocks(self) -> list[tuple[int, int]]:
        """Channels that every residual block of the two halves reads, joined maps included, and writes."""
        skips, width = self.skip_widths(), self.widths[-1]
        found = list(zip(skips, skips[1:], strict=False))
        for out in reversed(self.widths):
            for _ in range(self.num_residual_blocks_of_a_block + 1):
                found.append((width + skips.pop(), out))
                width = out
        return found


@dataclass(frozen=True)
class LatentConfig:
    """The latent DPM: an MLP with skips on z, its own diffusion process (T = 1000, beta constant 0.008)."""

    latent_dim: int = 512
    hidden: int = 2048
    layers: int = 10
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("constant"))

    def __post_init__(self) -> None:
        for name in ("latent_dim", "hidden"):
            positive(f"latent {name}", getattr(self, name))
        require(
            is_int(self.layers, 2, MAX_LAYERS),
            f"the latent MLP needs at least 2 layers, and has at most {MAX_LAYERS}, not {brief(self.layers)}",
        )
        instance("the latent DPM's schedule", self.schedule, ScheduleConfig)
        D, H = self.latent_dim, self.hidden
        weights("the latent DPM", self.layers * H * (H + 2 * D) + D * D)


def check_noise(noise: Any) -> None:
    """UserError unless ``noise`` is one of NOISES."""
    known = isinstance(noise, str) and noise in NOISES
    require(known, f"noise {brief(noise)} is not known; expected {' or '.join(NOISES)}")


def _check_process(config: AnyConfig) -> None:
    """What the configurations of all models share."""
    instance("unet", config.unet, UNetConfig)
    instance("schedule", config.schedule, ScheduleConfig)
    _check_image_size(config.image_size, config.unet)
    check_noise(config.noise)
    one_of("prediction", config.prediction, PREDICTIONS)
    one_of("crop", config.crop, CROPS)
    require(
        not config.schedule.zero_terminal_snr or config.prediction != "epsilon",
        "a network that predicts eps says nothing about the image where alpha_bar is 0; expected v_prediction or "
        "sample with zero_terminal_snr",
    )


def _check_codes(config: PDAEConfig | DiffAEConfig) -> None:
    """What the configurations of autoencoders share."""
    positive("latent_dim", config.latent_dim)
    weights("what reads z", config.latent_dim * sum(out for _, out in config.unet.blocks()))
    boolean("latent_statistics", config.latent_statistics)
    names = listed("attributes", config.attributes, "names")
    require(
        len(names) <= MAX_ATTRIBUTES and all(_is_name(name) for name in names),
        f"attributes must be at most {MAX_ATTRIBUTES} names of at most {MAX_NAME} characters, not {brief(names)}",
    )
    object.__setattr__(config, "attributes", names)
    if config.latent is not None:
        instance("latent", config.latent, LatentConfig)
    require(
        config.latent is None or config.latent.latent_dim == config.latent_dim,
        f"the latent DPM is {config.latent and config.latent.latent_dim}-dimensional but z is {config.latent_dim}",
    )


def _is_name(value: Any) -> bool:
    """Whether ``value`` is a word that can be printed and written as UTF-8, all on one line."""
    return (
        isinstance(value, str)
        and len(value) <= MAX_NAME
        and not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)
    )


def _check_image_size(size: Any, unet: UNetConfig) -> None:
    factor = 2 ** (unet.levels - 1)
    positive("image_size", size)
    require(
        size % factor == 0,
        f"image_size {size} cannot be halved {unet.levels - 1} times (channel_multiplier has {unet.levels} levels)",
    )


@dataclass(frozen=True)
class PriorConfig:
    """A U-Net alone: the pre-trained diffusion model before anything of PDAE is added.

    ``prediction`` says what the U-Net's output is, one of PREDICTIONS: eps, v = sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x0, or x0. ``noise`` says how random x_T is drawn for it unless asked otherwise, one of NOISES,
    and ``crop`` which square of an image it was trained on, one of CROPS.
    """

    image_size: int = 64
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    noise: str = "normal"
    prediction: str = "epsilon"
    crop: str = "centre"

    def __post_init__(self) -> None:
        _check_process(self)


@dataclass(frozen=True)
class PDAEConfig:
    """eps_theta, G_psi and E_phi, and what is optionally trained on top of z.

    ``encoder_channel`` is the width of E_phi's stem (64 in the paper). ``latent`` and ``attributes`` are None/empty
    until a latent DPM and a linear attribute classifier are part of the model. The rest is as in PriorConfig.
    """

    image_size: int = 64
    latent_dim: int = 512
    encoder_channel: int = 64
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    latent: LatentConfig | None = None
    attributes: tuple[str, ...] = ()
    latent_statistics: bool = False
    noise: str = "normal"
    prediction: str = "epsilon"
    crop: str = "centre"

    def __post_init__(self) -> None:
        _check_process(self)
        size = self.image_size
        require(
            size >= 32 and size & (size - 1) == 0,
            f"the encoder needs an image_size that is a power of two from 32 up, not {size}",
        )
        _check_codes(self)
        require(
            is_int(self.encoder_channel, 1, MAX_SIZE) and self.encoder_channel % NORM_GROUPS == 0,
            f"encoder_channel must be a multiple of {NORM_GROUPS} up to {MAX_SIZE}, not {brief(self.encoder_channel)}",
        )
        width = self.encoder_channel * max(size // 32, 1)  # it doubles with every halving, down to 16x16
        weights("the encoder", width * (12 * width + 16 * self.latent_dim))

    @property
    def prior(self) -> PriorConfig:
        return PriorConfig(self.image_size, self.unet, self.schedule, self.noise, self.prediction, self.crop)


@dataclass(frozen=True)
class DiffAEConfig:
    """Diff-AE (arXiv 2111.15640): a U-Net whose every block reads z, and its encoder, half a U-Net.

    ``encoder_multiplier`` are the encoder's widths as multiples of ``unet.base_channel``, level by level; the rest of
    its shape is the U-Net's, attention at the same rates included. The rest is as in PDAEConfig.
    """

    image_size: int = 128
    latent_dim: int = 512
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            base_channel=128, channel_multiplier=(1, 1, 2, 3, 4), attention_resolutions=(8,), time_channel=512
        )
    )
    encoder_multiplier: tuple[int | float, ...] = (1, 1, 2, 3, 4, 4)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    latent: LatentConfig | None = None
    attributes: tuple[str, ...] = ()
    latent_statistics: bool = False
    noise: str = "normal"
    prediction: str = "epsilon"
    crop: str = "centre"

    def __post_init__(self) -> None:
        _check_process(self)
        _check_codes(self)
        try:
            encoder = self.encoder
        except UserError as error:
            raise UserError(f"encoder_multiplier: {error}") from None
        object.__setattr__(self, "encoder_multiplier", encoder.channel_multiplier)
        _check_image_size(self.image_size, encoder)

    @property
    def encoder(self) -> UNetConfig:
        """Of the U-Net whose input half and middle the encoder is."""
        return dataclasses.replace(self.unet, channel_multiplier=self.encoder_multiplier)


AnyConfig = PDAEConfig | PriorConfig | DiffAEConfig | StudentConfig
_KINDS: dict[str, type] = {
    "pdae": PDAEConfig,
    "prior": PriorConfig,
    "diffae": DiffAEConfig,
    "student": StudentConfig,
}
_NESTED: dict[str, type] = {"unet": UNetConfig, "schedule": ScheduleConfig, "latent": LatentConfig}


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """``config`` as JSON-ready values, with its kind and the format version."""
    kind = next(k for k, cls in _KINDS.items() if type(config) is cls)
    return {"format": FORMAT_VERSION, "kind": kind, **dataclasses.asdict(config)}


def _build(cls: type, values: Any, where: str) -> Any:
    require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(
        name if isinstance(name, str) and name.isidentifier() else brief(name) for name in values.keys() - known
    )
    require(
        not unknown,
        f"{where}: unknown field {', '.join(unknown[:9])[:200]}; expected some of {', '.join(sorted(known))}",
    )
    arguments = {
        k: _build(_NESTED[k], v, f"{where}.{k}")
        if k in _NESTED and v is not None
        else (tuple(v) if isinstance(v, list) else v)
        for k, v in values.items()
    }
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except TypeError as error:
        raise UserError(f"{where}: a field has the wrong type ({error})") from None


def from_dict(values: dict[str, Any], where: str = "config") -> AnyConfig:
    """The inverse of :func:`to_dict`. Raises UserError naming the field that is wrong."""
    require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
    values = dict(values)
    version, kind = values.pop("format", None), values.pop("kind", None)
    require(
        is_int(version, FORMAT_VERSION, FORMAT_VERSION),
        f"{where}: format {brief(version)} is not readable here; expected {FORMAT_VERSION}",
    )
    one_of(f"{where}: kind", kind, _KINDS)
    return _build(_KINDS[kind], values, where)


def dumps(config: AnyConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def load(path: str | Path) -> AnyConfig:
    """Read a ``config.json``. Raises UserError when it is missing, not JSON, or describes no model known here."""
    return from_dict(load_json(Path(path), "the configuration of a model"), str(path))


def _paper(size: int, base: int, multiplier: tuple[int, ...], heads: int) -> PDAEConfig:
    # Attention sits where the feature map is 16x16 in all five networks.
    unet = UNetConfig(
        base_channel=base, channel_multiplier=multiplier, attention_resolutions=(size // 16,), num_heads=heads
    )
    return PDAEConfig(image_size=size, unet=unet)


presets: dict[str, PDAEConfig] = {
    # The published images are a square of the aligned ones around the face.
    "celeba64": dataclasses.replace(_paper(64, 64, (1, 2, 4, 8), heads=4), crop="celeba"),
    "celebahq128": _paper(128, 128, (1, 1, 2, 3, 4), heads=1),
    "ffhq128": _paper(128, 128, (1, 1, 2, 3, 4), heads=1),
    "horse128": _paper(128, 128, (1, 1, 2, 3, 4), heads=1),
    "bedroom128": _paper(128, 128, (1, 1, 2, 3, 4), heads=1),
    # The bundled Fashion-MNIST model: small enough to travel with the package and to train on a laptop. So narrow a
    # network misjudges the level of the noise it is given (docs/reconstruct.md), hence the standardised one.
    "fashion32": PDAEConfig(
        image_size=32,
        latent_dim=128,
        encoder_channel=64,
        noise="standardised",
        unet=UNetConfig(
            input_channel=1,
            base_channel=32,
            channel_multiplier=(1, 2, 3),
            num_residual_blocks_of_a_block=1,
            attention_resolutions=(4,),
            num_heads=4,
            dropout=0.0,
            norm_groups=8,
        ),
    ),
    # For drawn avatars (`python -m pdae_fast.data avatars`): as small, in colour; groups of four channels and more see
    # colours better.
    "avatars64": PDAEConfig(
        image_size=64,
        latent_dim=512,
        encoder_channel=64,
        prediction="v_prediction",
        unet=UNetConfig(
            input_channel=3,
            base_channel=32,
            channel_multiplier=(1, 1, 2, 3),
            num_residual_blocks_of_a_block=1,
            attention_resolutions=(4,),
            num_heads=4,
            dropout=0.0,
            norm_groups=8,
        ),
    ),
}
