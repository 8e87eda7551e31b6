"""The whole autoencoder, and the prior alone, as users hold them: load, run, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..config import DiffAEConfig, PDAEConfig, PriorConfig
from ..errors import UserError
from ..isolation import undisturbed
from ..schedule import build_schedule
from ..student_config import StudentConfig
from .encoder import Encoder
from .latent import LatentMLP
from .unet import PDAEDecoder, UNet

_Model = TypeVar("_Model", bound="_Pretrained")


class _Pretrained(nn.Module):
    """What every loadable model shares; subclasses take their config as the only argument."""

    config: Any
    # What neither a foreign file nor its user said and was assumed, such as the number of attention heads.
    notes: tuple[str, ...] = ()

    @classmethod
    @undisturbed()
    def from_pretrained(cls: type[_Model], source: str | Path, **options: Any) -> _Model:
        """Load a bundled name, a directory written by :meth:`save_pretrained`, or a foreign checkpoint file.

        A foreign file says nothing about some settings; give them as ``num_heads=``, ``head_channel=``,
        ``use_new_attention_order=``, ``config=`` (the official YAML) and ``encoder=`` (a second file). See
        :class:`pdae_fast.checkpoints.load.Options` for all of them. Returns the model in eval mode, float32, on the
        CPU; ``model.notes`` lists what was assumed, such as one attention head where nothing says how many.

        Raises UserError with one line that says what the file is and what was expected.
        """
        loaded = checkpoints.load(source, **options)
        model = cls.from_state(cls._adopt(loaded), loaded.state, str(source))
        model.notes = tuple(loaded.notes)
        return model

    @classmethod
    def from_state(cls: type[_Model], config: Any, state: dict[str, Tensor], where: str) -> _Model:
        """Build the model and fill it with ``state`` (names of this module); UserError unless they fit exactly."""
        with torch.device("meta"):
            model = cls._class_of(config)(config)
        expected = model.state_dict()
        missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        if missing or unexpected:
            which = [
                f"{kind} {len(names)} ({names[0]})"
                for kind, names in (("missing", missing), ("unexpected", unexpected))
                if names
            ]
            raise UserError(f"{where}: the weights do not fit the configuration: tensors {' and '.join(which)}")
        for name, tensor in expected.items():
            if state[name].shape != tensor.shape:
                raise UserError(
                    f"{where}: {name} has shape {list(state[name].shape)}; "
                    f"the configuration expects {list(tensor.shape)}"
                )
        model.load_state_dict({k: v.float().clone() for k, v in state.items()}, assign=True)
        return model.eval()

    @classmethod
    def _class_of(cls: type[_Model], config: Any) -> type[_Model]:
        return cls

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> Any:
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors; ``dtype`` float16 halves the file (weights are read as float32)."""
        checkpoints.save_directory(directory, self.config, self.state_dict(), dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.config.image_size
        return self.config.unet.input_channel, size, size


def refuse_student(loaded: checkpoints.Loaded) -> None:
    """UserError where what was read is a student, and no diffusion model."""
    if isinstance(loaded.config, StudentConfig):
        raise UserError(f"{loaded.origin} is a student; expected a diffusion model (load it with pdae_fast.Student)")


class Prior(_Pretrained):
    """A pre-trained diffusion model alone: eps_theta(x_t, t) on images of ``config.image_size``."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet, build_schedule(config.schedule).to_eps(config.prediction))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W], t int64 [B] -> eps_hat [B, C, H, W]; labels y int64 [B] for a class-conditional prior."""
        return self.unet(x_t, t, y)

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> PriorConfig:
        refuse_student(loaded)
        if isinstance(loaded.config, PriorConfig):
            return loaded.config
        if isinstance(loaded.config, DiffAEConfig):
            raise UserError(f"{loaded.origin} is a Diff-AE, whose U-Net needs z; expected a prior, or a PDAE")
        # A PDAE contains its frozen prior: keep just that.
        trained = tuple(f"decoder.{name}." for name in PDAEDecoder.TRAINED)
        loaded.state = {
            "unet." + k.removeprefix("decoder."): v
            for k, v in loaded.state.items()
            if k.startswith("decoder.") and not k.startswith(trained)
        }
        return loaded.config.prior


class Autoencoder(_Pretrained):
    """A model with an encoder, and what may sit on top of its z: latent DPM, classifier, statistics.

    ``Autoencoder.from_pretrained`` loads whichever of the classes derived from it the source is.
    """

    encoder: nn.Module
    CONFIG: type | None = None  # of a derived class

    def _add_tops(self, config: PDAEConfig | DiffAEConfig) -> None:
        self.latent_denoiser = LatentMLP(config.latent) if config.latent else None
        self.classifier = nn.Linear(config.latent_dim, len(config.attributes)) if config.attributes else None
        if config.latent_statistics:
            self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
            self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def encode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H, W] in [-1, 1] -> z [B, latent_dim]."""
        return self.encoder(x0)

    @classmethod
    def _class_of(cls: type[_Model], config: Any) -> type[_Model]:
        return next(kind for kind in (cls, *cls.__subclasses__()) if kind.CONFIG is type(config))

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> PDAEConfig | DiffAEConfig:
        refuse_student(loaded)
        if isinstance(loaded.config, PriorConfig):
            raise UserError(
                f"{loaded.origin} is a prior (a diffusion model without G and encoder); expected an autoencoder. "
                "Train a PDAE on it with `python -m pdae_fast.train pdae --init-from`"
            )
        return loaded.config


class PDAE(Autoencoder):
    """E_phi, the frozen eps_theta, G_psi, and what may sit on top of z (latent DPM, classifier, statistics)."""

    CONFIG = PDAEConfig

    def __init__(self, config: PDAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.image_size, config.unet.input_channel, config.latent_dim, config.encoder_channel)
        to_eps = build_schedule(config.schedule).to_eps(config.prediction)
        self.decoder = PDAEDecoder(config.unet, config.latent_dim, to_eps)
        self._add_tops(config)

    @classmethod
    def from_prior(cls, prior: Prior, **settings: Any) -> PDAE:
        """A fresh PDAE around a pre-trained prior: G = 0 and a random encoder; ``settings`` as in PDAEConfig."""
        config = PDAEConfig(
            image_size=prior.config.image_size,
            unet=prior.config.unet,
            schedule=prior.config.schedule,
            noise=prior.config.noise,
            prediction=prior.config.prediction,
            crop=prior.config.crop,
            **settings,
        )
        model = cls(config)
        model.decoder.load_state_dict(prior.unet.state_dict(), strict=False)
        return model

    def prior(self) -> Prior:
        """The frozen prior inside this model, as a model of its own (weights are copied)."""
        prior = Prior(self.config.prior)
        own = self.decoder.state_dict()
        prior.unet.load_state_dict({k: own[k] for k in prior.unet.state_dict()})
        return prior.eval()

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_t [B, C, H, W], t int64 [B], z [B, latent_dim] -> (eps_hat, G), from one trunk pass; y as in Prior."""
        return self.decoder(x_t, t, z, y)

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> PDAEConfig:
        if isinstance(loaded.config, DiffAEConfig):
            raise UserError(f"{loaded.origin} is a Diff-AE; expected a PDAE (load it with pdae_fast.DiffAE)")
        return super()._adopt(loaded)


def unet_of(model: Autoencoder | Prior) -> UNet:
    """The network that predicts eps; of a PDAE with G's decoder."""
    return model.decoder if isinstance(model, PDAE) else model.unet


def load_model(source: str | Path, **options: Any) -> Autoencoder | Prior:
    """The autoencoder or the prior that ``source`` holds; arguments and errors as of ``from_pretrained``."""
    loaded = checkpoints.load(source, **options)
    refuse_student(loaded)
    kind = Prior if isinstance(loaded.config, PriorConfig) else Autoencoder
    model = kind.from_state(loaded.config, loaded.state, str(source))
    model.notes = tuple(loaded.notes)
    return model
