"""The networks, with reference semantics and official parameter names."""

from .diffae import DiffAE
from .encoder import Encoder
from .latent import LatentMLP
from .pdae import PDAE, Autoencoder, Prior, load_model, unet_of
from .student import Student
from .unet import Features, HalfUNet, PDAEDecoder, UNet

__all__ = [
    "PDAE",
    "Autoencoder",
    "DiffAE",
    "Encoder",
    "Features",
    "HalfUNet",
    "LatentMLP",
    "PDAEDecoder",
    "Prior",
    "Student",
    "UNet",
    "load_model",
    "unet_of",
]
