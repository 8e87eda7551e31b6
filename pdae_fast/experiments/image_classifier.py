"""A small image classifier that experiments train for themselves: one that guides knows the noise, one that judges
sees clean images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.directory import save_torch
from ..errors import UserError
from ..files import make_folder
from ..models.layers import timestep_embedding
from ..schedule import Schedule, q_sample

FORMAT = "pdae_fast-image-classifier-1"
TIME_WIDTH = 64
SHIFT = 2  # pixels that training images move by


class ImageClassifier(nn.Module):
    """Logits [B, classes] of images [B, channels, H, W] in [-1, 1]; ``timed``: of x_t, told t int64 [B].

    Three stages of convolution, GroupNorm (shifted and scaled by the time) and SiLU, each halving the image, and a
    linear layer on their mean: about ``width`` squared times 100 parameters.
    """

    def __init__(self, channels: int, classes: int, timed: bool = False, width: int = 24) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip((channels, *widths[:-1]), widths, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in widths)
        self.times = nn.ModuleList(nn.Linear(TIME_WIDTH, 2 * w) for w in widths) if timed else None
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        if (t is None) != (self.times is None):
            raise ValueError("a timed classifier, and no other, needs t")
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            if self.times is not None:
                scale, shift = self.times[i](timestep_embedding(t, TIME_WIDTH))[:, :, None, None].chunk(2, dim=1)
                x = x * (1 + scale) + shift
            x = F.avg_pool2d(F.silu(x), 2)
        return self.last(x.mean((2, 3)))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    epochs: int = 25,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    advance: Callable[[int], Any] = lambda n: None,
) -> ImageClassifier:
    """Fit to images [N, C, H, W] in [-1, 1] of classes ``labels`` int64 [N] (0 ... classes - 1), in eval mode.

    With a ``schedule`` on x_t at uniform t: the classifier is then ``timed``. Images are moved by up to SHIFT pixels.
    Adam at 2e-3 falling along a half cosine. The same seed and machine give the same weights. ``advance(n)`` is called
    for every n images seen. Raises UserError unless two classes occur.
    """
    if len(torch.unique(labels)) < 2:
        raise UserError(f"a classifier needs images of at least two classes; all {len(labels)} are of one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(images.shape[1], classes, timed=schedule is not None).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = epochs * -(-len(images) // batch_size)
    slope = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(batch_size):
            x, t = _moved(images[part], generator), None
            if schedule is not None:
                t = torch.randint(schedule.T, (len(x),), generator=generator)
                x = q_sample(schedule, x, t, torch.randn(x.shape, generator=generator))
            with torch.enable_grad():
                logits = model(x.to(device), None if t is None else t.to(device))
                loss = F.cross_entropy(logits, labels[part].to(device))
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            slope.step()
            advance(len(part))
    return model.eval().requires_grad_(False)


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """x [B, C, H, W] shifted as a batch by up to SHIFT pixels either way, its edge repeated."""
    H, W = x.shape[2:]
    dy, dx = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    return F.pad(x, (SHIFT,) * 4, mode="replicate")[:, :, dy : dy + H, dx : dx + W]


def cached_classifier(
    path: str | os.PathLike,
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    epochs: int = 25,
    device: torch.device | str = "cpu",
    advance: Callable[[int], Any] = lambda n: None,
) -> ImageClassifier:
    """`train_classifier`, or what it left in the file ``path`` for the same images, labels and settings."""
    path, timed = Path(path), schedule is not None
    digest = hashlib.sha256(json.dumps([classes, seed, timed, epochs]).encode())
    arrays = [images.numpy(), labels.numpy(), *([schedule.alpha_bar] if timed else [])]
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    job = digest.hexdigest()
    model = ImageClassifier(images.shape[1], classes, timed)
    state = _read(path, job, model.state_dict())
    if state is not None:
        model.load_state_dict(state)
        advance(epochs * len(images))
        return model.to(device).eval().requires_grad_(False)
    make_folder(path.parent)
    settings = {"seed": seed, "schedule": schedule, "epochs": epochs, "device": device, "advance": advance}
    model = train_classifier(images, labels, classes, **settings)
    save_torch(path, {"format": FORMAT, "job": job, "state": {k: v.cpu() for k, v in model.state_dict().items()}})
    return model


def _read(path: Path, job: str, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """None when the file is missing, damaged or of another job: it is then made again."""
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = found["state"]
        whole = (found["format"], found["job"]) == (FORMAT, job) and state.keys() == expected.keys()
        same = whole and all(state[k].shape == v.shape and state[k].dtype == v.dtype for k, v in expected.items())
        return state if same and all(bool(torch.isfinite(v).all()) for v in state.values()) else None
    except MemoryError:
        raise
    except Exception:  # damaged bytes make the readers of zip files and pickles raise almost anything
        return None


@torch.inference_mode()
def predict(classifier: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits [N, classes] on the CPU, of clean images [N, C, H, W] clamped to [-1, 1] as a file would hold them."""
    parameter = next(classifier.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    parts = [classifier(part.clamp(-1, 1).to(device)).float().cpu() for part in images.split(batch_size)]
    return torch.cat(parts)


def accuracy_at(classifier: nn.Module, schedule: Schedule, images: Tensor, labels: Tensor, t: int, seed: int) -> float:
    """Share of x_t, one for each of images [N, C, H, W], that a ``timed`` classifier gets right."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(images),), t, dtype=torch.int64)
    x_t = q_sample(schedule, images, times, noise)
    device = next(classifier.parameters()).device
    with torch.inference_mode():
        logits = classifier(x_t.to(device), times.to(device)).cpu()
    return float((logits.argmax(1) == labels).float().mean())


class UserClassifier(nn.Module):
    """A user's TorchScript classifier; ``option`` is what the command called it, for errors.

    ``timed``: it is called with x_t float32 [B, C, H, W] and t int64 [B], else with clean images alone; it returns
    logits [B, ``classes``]. Raises UserError for a file that is not TorchScript, and when it returns anything else.
    """

    def __init__(
        self, path: str | os.PathLike, option: str, classes: int, timed: bool, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.what, self.classes, self.timed = f"{option} {os.fspath(path)}", classes, timed
        if not os.path.isfile(path):
            raise UserError(f"{self.what}: no such file; expected a TorchScript network")
        try:
            self.network = torch.jit.load(os.fspath(path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"{self.what}: not a TorchScript file ({str(error).splitlines()[0]})") from None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """As ImageClassifier."""
        try:
            logits = self.network(x, t) if self.timed else self.network(x)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{self.what} cannot run on {list(x.shape)}{' and t' * self.timed}: {reason}") from None
        if not isinstance(logits, Tensor) or logits.shape != (len(x), self.classes):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.what} returns {found}; expected logits [{len(x)}, {self.classes}]")
        return logits
