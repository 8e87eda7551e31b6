"""Diff-AE (arXiv 2111.15640): a U-Net conditioned on z in every block, trained together with its encoder."""

from __future__ import annotations

from torch import Tensor

from .. import checkpoints
from ..config import DiffAEConfig, PDAEConfig
from ..errors import UserError
from ..schedule import build_schedule
from .pdae import Autoencoder
from .unet import HalfUNet, UNet


class DiffAE(Autoencoder):
    """Encoder and eps(x_t, t, z), and what may sit on top of z (latent DPM, classifier, statistics)."""

    CONFIG = DiffAEConfig

    def __init__(self, config: DiffAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = HalfUNet(config.encoder, config.latent_dim)
        to_eps = build_schedule(config.schedule).to_eps(config.prediction)
        self.unet = UNet(config.unet, to_eps, z_width=config.latent_dim)
        self._add_tops(config)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t [B, C, H, W], t int64 [B], z [B, latent_dim] -> eps_hat [B, C, H, W]."""
        return self.unet(x_t, t, z=z)

    @classmethod
    def _adopt(cls, loaded: checkpoints.Loaded) -> DiffAEConfig:
        if isinstance(loaded.config, PDAEConfig):
            raise UserError(f"{loaded.origin} is a PDAE autoencoder; expected a Diff-AE (load it with pdae_fast.PDAE)")
        return super()._adopt(loaded)
