"""Frozen configurations, their JSON form, and the presets of the paper's Table 1.

Field names of :class:`UNetConfig` are those of the published YAML files, so that a user can paste them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

FORMAT_VERSION = 1
NORM_GROUPS = 32  # every norm of the ADM U-Net and of E_phi
NOISES = ("normal", "standardised")  # how random x_T is drawn, see sampling.random_noise


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _as_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ScheduleConfig:
    """The diffusion process: ``kind`` is ``linear`` (beta 1e-4 ... 0.02), ``cosine`` or ``constant`` (beta 0.008)."""

    kind: str = "linear"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        _require(
            self.kind in ("linear", "cosine", "constant"),
            f"schedule kind {self.kind!r} is not known; expected linear, cosine or constant",
        )
        _require(
            _as_int(self.timesteps) and self.timesteps >= 2,
            f"timesteps must be an integer >= 2, not {self.timesteps!r}",
        )


@dataclass(frozen=True)
class UNetConfig:
    """The ADM U-Net eps_theta.

    ``attention_resolutions`` are down-sampling *rates* (as in PDAE and guided-diffusion): 4 means attention at 16x16
    for a 64x64 image. ``head_channel`` = -1 means that ``num_heads`` counts; otherwise every attention layer has
    ``channels // head_channel`` heads. ``use_new_attention_order`` False is the legacy layout of the qkv rows.
    ``learn_sigma`` doubles the output channels, of which the first half is eps. ``time_channel`` is the width of the
    time embedding, 4 * base_channel when None (Diff-AE priors use 512).
    """

    input_channel: int = 3
    base_channel: int = 64
    channel_multiplier: tuple[int, ...] = (1, 2, 4, 8)
    num_residual_blocks_of_a_block: int = 2
    attention_resolutions: tuple[int, ...] = (4,)
    num_heads: int = 1
    head_channel: int = -1
    use_new_attention_order: bool = False
    dropout: float = 0.1
    learn_sigma: bool = False
    time_channel: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multiplier", tuple(self.channel_multiplier))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        for name in ("input_channel", "base_channel", "num_residual_blocks_of_a_block", "num_heads"):
            value = getattr(self, name)
            _require(_as_int(value) and value >= 1, f"{name} must be a positive integer, not {value!r}")
        _require(
            len(self.channel_multiplier) >= 1 and all(_as_int(m) and m >= 1 for m in self.channel_multiplier),
            f"channel_multiplier must be positive integers, not {self.channel_multiplier!r}",
        )
        _require(
            all(_as_int(r) and r >= 1 for r in self.attention_resolutions),
            f"attention_resolutions must be positive integers (rates), not {self.attention_resolutions!r}",
        )
        _require(
            self.base_channel % NORM_GROUPS == 0,
            f"base_channel must be a multiple of {NORM_GROUPS} (the groups of a norm), not {self.base_channel}",
        )
        _require(
            _as_int(self.head_channel) and (self.head_channel == -1 or self.head_channel >= 1),
            f"head_channel must be -1 or a positive integer, not {self.head_channel!r}",
        )
        _require(
            self.time_channel is None or (_as_int(self.time_channel) and self.time_channel >= 1),
            f"time_channel must be a positive integer or None, not {self.time_channel!r}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout!r}")
        for channels in self.attention_channels():
            per_head = self.num_heads if self.head_channel == -1 else self.head_channel
            _require(
                channels % per_head == 0,
                f"attention layers of {channels} channels cannot be split by "
                + (f"num_heads={self.num_heads}" if self.head_channel == -1 else f"head_channel={self.head_channel}"),
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

    def heads(self, channels: int) -> int:
        return self.num_heads if self.head_channel == -1 else channels // self.head_channel

    def attention_channels(self) -> set[int]:
        """Widths of all attention layers (the middle block always has one)."""
        widths = {
            m * self.base_channel for i, m in enumerate(self.channel_multiplier) if 2**i in self.attention_resolutions
        }
        return widths | {self.channel_multiplier[-1] * self.base_channel}


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


def _check_image_size(size: Any, unet: UNetConfig) -> None:
    factor = 2 ** (unet.levels - 1)
    _require(_as_int(size) and size >= 1, f"image_size must be a positive integer, not {size!r}")
    _require(
        size % factor == 0,
        f"image_size {size} cannot be halved {unet.levels - 1} times (channel_multiplier has {unet.levels} levels)",
    )


@dataclass(frozen=True)
class PriorConfig:
    """A U-Net alone: the pre-trained diffusion model before anything of PDAE is added.

    ``noise`` says how random x_T is drawn for it unless asked otherwise, one of NOISES.
    """

    image_size: int = 64
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    noise: str = "normal"

    def __post_init__(self) -> None:
        _check_image_size(self.image_size, self.unet)
        check_noise(self.noise)


@dataclass(frozen=True)
class PDAEConfig:
    """eps_theta, G_psi and E_phi, and what is optionally trained on top of z.

    ``encoder_channel`` is the width of E_phi's stem (64 in the paper). ``latent`` and ``attributes`` are None/empty
    until a latent DPM and a linear attribute classifier are part of the model. ``noise`` as in PriorConfig.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", tuple(self.attributes))
        _check_image_size(self.image_size, self.unet)
        check_noise(self.noise)
        size = self.image_size
        _require(
            size >= 32 and size & (size - 1) == 0,
            f"the encoder needs an image_size that is a power of two from 32 up, not {size}",
        )
        _require(
            _as_int(self.latent_dim) and self.latent_dim >= 1,
            f"latent_dim must be a positive integer, not {self.latent_dim!r}",
        )
        _require(
            _as_int(self.encoder_channel) and self.encoder_channel >= 1 and self.encoder_channel % NORM_GROUPS == 0,
            f"encoder_channel must be a multiple of {NORM_GROUPS}, not {self.encoder_channel!r}",
        )
        _require(
            self.latent is None or self.latent.latent_dim == self.latent_dim,
            f"the latent DPM is {self.latent and self.latent.latent_dim}-dimensional but z is {self.latent_dim}",
        )

    @property
    def prior(self) -> PriorConfig:
        return PriorConfig(self.image_size, self.unet, self.schedule, self.noise)


_KINDS: dict[str, type] = {"pdae": PDAEConfig, "prior": PriorConfig}
_NESTED: dict[str, type] = {"unet": UNetConfig, "schedule": ScheduleConfig, "latent": LatentConfig}


def to_dict(config: PDAEConfig | PriorConfig) -> dict[str, Any]:
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


def from_dict(values: dict[str, Any], where: str = "config") -> PDAEConfig | PriorConfig:
    """The inverse of :func:`to_dict`. Raises UserError naming the field that is wrong."""
    _require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
    values = dict(values)
    version, kind = values.pop("format", None), values.pop("kind", None)
    _require(version == FORMAT_VERSION, f"{where}: format {version!r} is not readable here; expected {FORMAT_VERSION}")
    _require(kind in _KINDS, f"{where}: kind {kind!r} is not known; expected one of {', '.join(_KINDS)}")
    return _build(_KINDS[kind], values, where)


def dumps(config: PDAEConfig | PriorConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def load(path: str | Path) -> PDAEConfig | PriorConfig:
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
    "celeba64": _paper(64, 64, (1, 2, 4, 8), heads=4),
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
