"""What a run shows of itself while it goes on: grids of images, and scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data import save_grid
from ..errors import UserError
from ..models import PDAE, Autoencoder, Prior
from ..pipeline import Pipeline

IMAGES = 8
STEPS = 20


class ImagePreview:
    """Draws samples (Prior) or ``images`` [N, C, H, W] and their reconstructions (autoencoder)."""

    def __init__(self, images: Tensor, device: torch.device, seed: int) -> None:
        self.images, self.device, self.seed = images, device, seed

    def __call__(self, model: Prior | Autoencoder, step: int, path: Path) -> None:
        pipe = Pipeline(model, steps=STEPS, device=self.device, dtype="float32")
        if isinstance(model, Prior):
            save_grid([pipe.decode(count=len(self.images), seed=self.seed)], path, ["samples"])
            return
        z = pipe.encode(self.images)
        rows = {
            "input": self.images,
            "inferred x_T": pipe.decode(z, pipe.invert(self.images, z)),
            "random x_T": pipe.decode(z, seed=self.seed),
        }
        if isinstance(model, PDAE):
            rows["without G"] = pipe.decode(count=len(self.images), seed=self.seed)
        save_grid(list(rows.values()), path, list(rows))


class SamplePreview:
    """Draws images from the latent DPM of an autoencoder."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed

    def __call__(self, model: Autoencoder, step: int, path: Path) -> None:
        pipe = Pipeline(model, steps=STEPS, device=self.device, dtype="float32")
        save_grid([pipe.sample(IMAGES, seed=self.seed)], path, ["samples"])


def tensorboard(directory: Path):
    """A function (step, values) that writes scalars there; UserError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install 'pdae_fast[train]'") from None
    writer = SummaryWriter(str(directory))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log
