"""Trainers: the prior, PDAE on a frozen prior, Diff-AE, the latent DPM and the attribute classifier on the latents of
either; a warm start for the encoder; and a student of any of them."""

from .settings import TrainSettings
from .step import StepOptions
from .tasks import ClassifierTask, DiffAETask, EncoderTask, LatentTask, PDAETask, PriorTask, Task
from .trainer import Trainer

__all__ = [
    "ClassifierTask",
    "DiffAETask",
    "EncoderTask",
    "LatentTask",
    "PDAETask",
    "PriorTask",
    "StepOptions",
    "Task",
    "TrainSettings",
    "Trainer",
]
