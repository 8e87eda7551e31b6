"""Trainers: the prior, PDAE on a frozen prior, and the latent DPM and the attribute classifier on its latents; and a
warm start for the encoder."""

from .settings import TrainSettings
from .step import StepOptions
from .tasks import ClassifierTask, EncoderTask, LatentTask, PDAETask, PriorTask, Task
from .trainer import Trainer

__all__ = [
    "ClassifierTask",
    "EncoderTask",
    "LatentTask",
    "PDAETask",
    "PriorTask",
    "StepOptions",
    "Task",
    "TrainSettings",
    "Trainer",
]
