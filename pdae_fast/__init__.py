"""pdae_fast: a fast engine for PDAE, which turns a pre-trained diffusion model into an autoencoder."""

from .checkpoints import available
from .config import LatentConfig, PDAEConfig, PriorConfig, ScheduleConfig, UNetConfig, presets
from .errors import UserError
from .models import PDAE, Prior
from .pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "PDAE",
    "LatentConfig",
    "PDAEConfig",
    "Pipeline",
    "Prior",
    "PriorConfig",
    "ScheduleConfig",
    "UNetConfig",
    "UserError",
    "available",
    "presets",
]
