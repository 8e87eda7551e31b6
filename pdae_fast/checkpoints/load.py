"""One way in: a bundled name, a directory, or a foreign file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PriorConfig
from ..errors import UserError
from ..student_config import StudentConfig
from . import diffusers
from .directory import BUNDLED, Loaded, available, load_directory
from .extras import attach_classifier, attach_latent, attach_statistics, has_statistics
from .foreign import DIFFAE, ForeignFile, build
from .settings import Settings, from_config, from_options

_SAID = (
    "num_heads",
    "head_channel",
    "num_head_channels",
    "num_heads_upsample",
    "use_new_attention_order",
    "dropout",
    "image_size",
    "schedule",
    "noise_schedule",
    "timesteps",
    "diffusion_steps",
    "rescale_timesteps",
    "predict_xstart",
)


@dataclass(frozen=True)
class Options:
    """What a foreign file does not say, or says elsewhere. None means not given.

    num_heads, head_channel, num_heads_upsample, use_new_attention_order, dropout, image_size, schedule (a kind of
        ScheduleConfig), timesteps: win over ``config``. num_head_channels, noise_schedule and diffusion_steps are other
        names of head_channel, schedule and timesteps, those of improved- and guided-diffusion's flags.
    rescale_timesteps: the network was trained on t * 1000 / T; predict_xstart: its output is x_0.
    config: path of the published YAML (or JSON) configuration, or the mapping it holds. Values that the weights
        contradict are an error.
    encoder: a second file whose encoder goes with the decoder in the first.
    latent, classifier, statistics: files of a latent DPM, an attribute classifier and latent statistics to make part
        of the autoencoder; these three may be added to a saved directory too.
    attributes: names of the classifier's rows: a list, a comma-separated string, or a file with one a line.
    weights: "ema" (used where the file has them) or "raw".
    """

    num_heads: int | None = None
    head_channel: int | None = None
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    use_new_attention_order: bool | None = None
    dropout: float | None = None
    image_size: int | None = None
    schedule: str | None = None
    noise_schedule: str | None = None
    timesteps: int | None = None
    diffusion_steps: int | None = None
    rescale_timesteps: bool | None = None
    predict_xstart: bool | None = None
    config: str | Path | Mapping[str, Any] | None = None
    encoder: str | Path | None = None
    latent: str | Path | None = None
    classifier: str | Path | None = None
    statistics: str | Path | None = None
    attributes: str | Path | Sequence[str] | None = None
    weights: str = "ema"


def load(source: str | Path, **options: Any) -> Loaded:
    """Read a model from a bundled name, a saved directory or a foreign one, or a file; ``options``: those of Options.

    Known are files of PDAE (autoencoder, prior, latent DPM, classifier), Diff-AE (autoencoder, DDPM), improved- and
    guided-diffusion, and ermongroup/ddim, each also as .safetensors, and directories of diffusers' UNet2DModel. The
    result's tensors are on the CPU; those of a foreign file are float32 and finite.

    Raises UserError with one line that says what the source is and what was expected; TypeError for an option that
    does not exist.
    """
    given = Options(**options)
    if given.weights not in ("ema", "raw"):
        raise UserError(f"weights={given.weights!r} is not known; expected ema or raw")
    settings = Settings()
    settings.add(from_options({name: getattr(given, name) for name in _SAID}))
    if given.config is not None:
        settings.add(from_config(given.config))

    directory, file = _locate(source), None
    place = diffusers.find(directory or Path(source).expanduser())
    if directory is not None and place is None:
        if given.encoder is not None:
            raise UserError(f"{source}: a saved model has its encoder; encoder= goes with a foreign file")
        loaded = load_directory(directory)
        if isinstance(loaded.config, StudentConfig):
            if options:
                raise UserError(f"{source}: is a student, which takes no {', '.join(options)}")
            return loaded
        _check_directory(loaded, settings)
    else:
        file = ForeignFile.open_directory(place, given.weights) if place else ForeignFile.open(source, given.weights)
        if file.kind in DIFFAE:
            settings.add(file.said)  # its settings may have been changed after
        else:
            settings.agree(file.said, file.where)
        encoder = ForeignFile.open(given.encoder, given.weights) if given.encoder is not None else None
        loaded = build(file, settings, encoder)
    _attach(loaded, given, settings, file)
    return loaded


def _locate(source: str | Path) -> Path | None:
    """The directory that ``source`` names, or None when it is a file; UserError when it is nothing."""
    if isinstance(source, str) and source in available():
        return BUNDLED / source
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not path.exists():
        raise UserError(
            f"{source}: neither a bundled model ({', '.join(available()) or 'none'}), nor a directory, nor a file"
        )
    return None


def _attach(loaded: Loaded, given: Options, settings: Settings, file: ForeignFile | None) -> None:
    def opened(option: str | Path | None, entry: str) -> ForeignFile | None:
        """The file that the option names, or else the main one when it holds the same thing."""
        if option is not None:
            return ForeignFile.open(option, given.weights)
        return file if coded and file is not None and file.has(entry) else None

    coded = not isinstance(loaded.config, PriorConfig)
    if latent := opened(given.latent, "latent_denoise_fn"):
        attach_latent(loaded, latent, settings)
    if classifier := opened(given.classifier, "classifier"):
        attach_classifier(loaded, classifier, settings, given.attributes)
    elif given.attributes is not None:
        raise UserError(f"{loaded.origin}: attributes name the rows of a classifier and there is none; add classifier=")
    if given.statistics is not None:
        attach_statistics(loaded, ForeignFile.open(given.statistics))
    elif coded:
        for part in filter(has_statistics, (file, latent, classifier)):
            attach_statistics(loaded, part)
    if file is not None:
        loaded.weights = file.describe_weights()


def _check_directory(loaded: Loaded, settings: Settings) -> None:
    """A saved model says everything itself; what the user said may only repeat it."""
    config = loaded.config
    for name in settings.given:
        if name in ("schedule", "timesteps"):
            actual = config.schedule.kind if name == "schedule" else config.schedule.timesteps
        elif name == "rescale_timesteps":
            actual = config.unet.time_scale != 1 or config.schedule.timesteps == 1000
        elif name == "time_channel":
            actual = config.unet.time_width
        else:
            owner = next((o for o in (config.unet, config) if hasattr(o, name)), None)
            if owner is None or name in ("dropout", "attributes"):
                continue
            actual = getattr(owner, name)
        settings.check(name, actual, loaded.origin, "the saved model's own settings")
