"""Everything that decides what a training run computes; written beside its checkpoint as train.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..arguments import as_seed
from ..errors import UserError

TASKS = ("prior", "encoder", "pdae", "diffae", "latent", "classifier", "student", "recognise")
ON_IMAGES = ("prior", "pdae", "diffae")  # which may be mirrored
# Where a task's usual values are not those of TrainSettings. The latent DPM's batch is the paper's (Table 2); the
# classifier is a convex problem of one layer; the encoder's warm start is plain regression, which ends where its rate
# has fallen to nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "prior": {},
    "encoder": {"steps": 1000, "batch_size": 64, "lr": 1e-3, "lr_schedule": "cosine", "warmup": 100, "flip": False},
    "pdae": {},
    "diffae": {},
    "latent": {"batch_size": 512, "flip": False},
    "classifier": {"steps": 10_000, "batch_size": 512, "lr": 1e-3, "flip": False},
    "student": {"steps": 2000, "batch_size": 64, "lr": 1e-3, "lr_schedule": "cosine", "warmup": 100, "flip": False},
    "recognise": {"steps": 600, "batch_size": 32, "lr": 1e-3, "lr_schedule": "cosine", "warmup": 50, "flip": False},
}


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Published values: batch 128, Adam 1e-4, constant rate, EMA 0.9999, flips.

    ``batch_size`` counts images (or latents) per forward pass of all processes together, however many they are; an
    optimiser step sees ``batch_size * accumulate``.
    ``ema_decay`` is reached gradually, min(ema_decay, (1 + n) / (10 + n)) after n steps, so that short runs do not
    average in their random start. ``amp`` is "off" or "bfloat16" (bfloat16 needs no loss scaling). ``flip`` goes with
    images; latents are encoded once, from images as they are.
    """

    task: str
    data: str
    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 0
    ema_decay: float = 0.9999
    flip: bool = True
    amp: str = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise UserError(message)

        require(self.task in TASKS, f"task {self.task!r} is not known; expected one of {', '.join(TASKS)}")
        as_seed(self.seed)
        for name in ("steps", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.lr > 0 and math.isfinite(self.lr), f"lr must be a positive number, not {self.lr}")
        require(
            self.lr_schedule in ("constant", "cosine"),
            f"lr_schedule must be constant or cosine, not {self.lr_schedule!r}",
        )
        require(self.warmup >= 0, f"warmup must not be negative, not {self.warmup}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), not {self.ema_decay}")
        learned = "what is known" if self.task in ("student", "recognise") else "latents"
        require(
            not self.flip or self.task in ON_IMAGES,
            f"flip mirrors images; {self.task} is trained on {learned} of images as they are (flip=False)",
        )
        require(self.amp in ("off", "bfloat16"), f"amp must be off or bfloat16, not {self.amp!r}")

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step ``step`` (from 0): linear warm-up, then constant or a half cosine down to zero."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate

    def ema_rate(self, step: int) -> float:
        """EMA decay applied after optimiser step ``step`` (from 0)."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """UserError naming the first setting that differs from a saved run's and would change its course.

        More (or fewer) steps are fine under a constant rate; a cosine rate depends on their number.
        """
        free = {"data", *(("steps",) if self.lr_schedule == "constant" else ())}
        for name, value in dataclasses.asdict(self).items():
            if name not in free and saved.get(name) != value:
                raise UserError(
                    f"cannot resume: {name} is {value!r} but the saved run used {saved.get(name)!r}; "
                    f"give --{name.replace('_', '-')} {saved.get(name)} or start a new --out"
                )
