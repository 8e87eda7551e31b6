"""The networks, with reference semantics and official parameter names."""

from .encoder import Encoder
from .latent import LatentMLP
from .pdae import PDAE, Prior
from .unet import Features, PDAEDecoder, UNet

__all__ = ["PDAE", "Encoder", "Features", "LatentMLP", "PDAEDecoder", "Prior", "UNet"]
