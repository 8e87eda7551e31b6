"""Trainers: the prior, and PDAE on a frozen prior."""

from .settings import TrainSettings
from .trainer import Trainer

__all__ = ["TrainSettings", "Trainer"]
