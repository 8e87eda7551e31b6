"""Frozen configurations, their JSON form, and the presets of the paper's Table 1.

Field names of :class:`UNetConfig` are those of the published YAML files, so that a user can paste them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

FORMAT_VERSION = 1
NORM_GROUPS = 32  # of E_phi's norms, and of the U-Net's unless its configuration says otherwise
NOISES = ("normal", "standardised")  # how random x_T is drawn, see samplers.noise.random_noise
SCHEDULES = ("linear", "cosine", "constant", "scaled_linear", "sigmoid", "stored")
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what the output of a U-Net is
CROPS = ("centre", "celeba")  # which square of an image is seen, see data.preprocess
DOWNSAMPLES = ("residual", "conv", "conv_asymmetric", "pool")
UPSAMPLES = ("residual", "conv", "nearest")
MIDDLES = ("attention", "plain", "none")
# What no model has more of: a damaged or hostile configuration is refused before anything is built from it.
MAX_SIZE, MAX_LEVELS, MAX_TIMESTEPS = 2**16, 12, 10**6


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _as_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(name: str, value: Any, what: str = "a positive integer") -> None:
    _require(_as_int(value) and value >= 1, f"{name} must be {what}, not {value!r}")
    _require(value <= MAX_SIZE, f"{name} must be at most {MAX_SIZE}, not {value}")


def _boolean(name: str, value: Any) -> None:
    _require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    _require(value in known, f"{name} {value!r} is not known; expected one of {', '.join(known)}")


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
        _one_of("schedule kind", self.kind, SCHEDULES)
        _require(
            _as_int(self.timesteps) and 2 <= self.timesteps <= MAX_TIMESTEPS,
            f"timesteps must be an integer from 2 to {MAX_TIMESTEPS}, not {self.timesteps!r}",
        )
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            _require(
                value is None or (_number(value) and 0 < value < 1), f"{name} must be between 0 and 1, not {value!r}"
            )
        _require((self.beta_start is None) == (self.beta_end is None), "beta_start and beta_end go together")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
            _require(
                all(_number(b) and 0 < b <= 1 for b in self.betas) and len(self.betas) == self.timesteps,
                f"betas must be {self.timesteps} numbers between 0 and 1",
            )
        _require((self.betas is not None) == (self.kind == "stored"), "betas go with the schedule kind stored")
        _boolean("zero_terminal_snr", self.zero_terminal_snr)


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
            value = getattr(self, name)
            _require(isinstance(value, (tuple, list)), f"{name} must be a list of numbers, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("input_channel", "base_channel", "num_residual_blocks_of_a_block", "num_heads", "norm_groups"):
            _positive(name, getattr(self, name))
        for name in ("time_channel", "stem_channel", "num_classes"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name), "a positive integer or None")
        for name in ("head_channel", "num_heads_upsample"):
            if getattr(self, name) != -1:
                _positive(name, getattr(self, name), "-1 or a positive integer")
        for name in (
            "use_new_attention_order",
            "learn_sigma",
            "use_scale_shift_norm",
            "flip_sin_to_cos",
            "middle_attention_norm",
            "center_input_sample",
        ):
            _boolean(name, getattr(self, name))
        _require(
            1 <= len(self.channel_multiplier) <= MAX_LEVELS
            and all(_number(m) and 0 < m * self.base_channel <= MAX_SIZE for m in self.channel_multiplier),
            f"channel_multiplier must be 1 to {MAX_LEVELS} positive numbers, not {self.channel_multiplier!r}",
        )
        whole = tuple(int(m) if m == int(m) else m for m in self.channel_multiplier)
        object.__setattr__(self, "channel_multiplier", whole)
        _require(
            all(_as_int(r) and r >= 1 for r in self.attention_resolutions),
            f"attention_resolutions must be positive integers (rates), not {self.attention_resolutions!r}",
        )
        _one_of("downsample", self.downsample, DOWNSAMPLES)
        _one_of("upsample", self.upsample, UPSAMPLES)
        _one_of("middle", self.middle, MIDDLES)
        _require(
            _number(self.dropout) and 0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout!r}"
        )
        _require(
            _number(self.freq_shift) and 0 <= self.freq_shift < self.base_channel // 2,
            f"freq_shift must be from 0 to less than half of base_channel, not {self.freq_shift!r}",
        )
        for name in ("norm_eps", "time_scale", "middle_scale_factor"):
            value = getattr(self, name)
            _require(_number(value) and value > 0, f"{name} must be a positive number, not {value!r}")
        for channels in sorted(self._norm_widths()):
            groups = min(self.norm_groups, channels)
            _require(
                channels % groups == 0,
                f"a norm of {channels} channels cannot have {groups} groups; expected multiples of norm_groups",
            )
        for channels in self.attention_channels():
            for heads in (self.num_heads, self.num_heads_upsample if self.num_heads_upsample != -1 else 1):
                per_head = heads if self.head_channel == -1 else self.head_channel
                _require(
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

    def _norm_widths(self) -> set[int]:
        """Channels of every norm, those of joined maps included."""
        skips, width = self.skip_widths(), self.widths[-1]
        found = set(skips)
        for out in reversed(self.widths):
            for _ in range(self.num_residual_blocks_of_a_block + 1):
                found.add(width + skips.pop())
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
            _require(
                _as_int(getattr(self, name)) and getattr(self, name) >= 1, f"latent {name} must be a positive integer"
            )
        _require(
            _as_int(self.layers) and self.layers >= 2, f"the latent MLP needs at least 2 layers, not {self.layers!r}"
        )


def check_noise(noise: Any) -> None:
    """UserError unless ``noise`` is one of NOISES."""
    _require(noise in NOISES, f"noise {noise!r} is not known; expected {' or '.join(NOISES)}")


def _check_process(config: AnyConfig) -> None:
    """What the configurations of all models share."""
    _check_image_size(config.image_size, config.unet)
    check_noise(config.noise)
    _one_of("prediction", config.prediction, PREDICTIONS)
    _one_of("crop", config.crop, CROPS)
    _require(
        not config.schedule.zero_terminal_snr or config.prediction != "epsilon",
        "a network that predicts eps says nothing about the image where alpha_bar is 0; expected v_prediction or "
        "sample with zero_terminal_snr",
    )


def _check_codes(config: PDAEConfig | DiffAEConfig) -> None:
    """What the configurations of autoencoders share."""
    _require(
        _as_int(config.latent_dim) and config.latent_dim >= 1,
        f"latent_dim must be a positive integer, not {config.latent_dim!r}",
    )
    _require(
        config.latent is None or config.latent.latent_dim == config.latent_dim,
        f"the latent DPM is {config.latent and config.latent.latent_dim}-dimensional but z is {config.latent_dim}",
    )


def _check_image_size(size: Any, unet: UNetConfig) -> None:
    factor = 2 ** (unet.levels - 1)
    _positive("image_size", size)
    _require(
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
        object.__setattr__(self, "attributes", tuple(self.attributes))
        _check_process(self)
        size = self.image_size
        _require(
            size >= 32 and size & (size - 1) == 0,
            f"the encoder needs an image_size that is a power of two from 32 up, not {size}",
        )
        _check_codes(self)
        _require(
            _as_int(self.encoder_channel) and self.encoder_channel >= 1 and self.encoder_channel % NORM_GROUPS == 0,
            f"encoder_channel must be a multiple of {NORM_GROUPS}, not {self.encoder_channel!r}",
        )

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
        object.__setattr__(self, "attributes", tuple(self.attributes))
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


AnyConfig = PDAEConfig | PriorConfig | DiffAEConfig
_KINDS: dict[str, type] = {"pdae": PDAEConfig, "prior": PriorConfig, "diffae": DiffAEConfig}
_NESTED: dict[str, type] = {"unet": UNetConfig, "schedule": ScheduleConfig, "latent": LatentConfig}


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """``config`` as JSON-ready values, with its kind and the format version."""
    kind = next(k for k, cls in _KINDS.items() if type(config) is cls)
    return {"format": FORMAT_VERSION, "kind": kind, **dataclasses.asdict(config)}


def _build(cls: type, values: Any, where: str) -> Any:
    _require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    _require(not unknown, f"{where}: unknown field {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
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
    _require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
    values = dict(values)
    version, kind = values.pop("format", None), values.pop("kind", None)
    _require(version == FORMAT_VERSION, f"{where}: format {version!r} is not readable here; expected {FORMAT_VERSION}")
    _require(kind in _KINDS, f"{where}: kind {kind!r} is not known; expected one of {', '.join(_KINDS)}")
    return _build(_KINDS[kind], values, where)


def dumps(config: AnyConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def load(path: str | Path) -> AnyConfig:
    """Read a ``config.json``. Raises UserError when it is missing, not JSON, or describes no model known here."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    return from_dict(values, str(path))


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
        ),
    ),
    # For drawn avatars (`python -m pdae_fast.data avatars`): as small, in colour.
    "avatars64": PDAEConfig(
        image_size=64,
        latent_dim=512,
        encoder_channel=64,
        noise="standardised",
        unet=UNetConfig(
            input_channel=3,
            base_channel=32,
            channel_multiplier=(1, 1, 2, 3),
            num_residual_blocks_of_a_block=1,
            attention_resolutions=(4,),
            num_heads=4,
            dropout=0.0,
        ),
    ),
}
