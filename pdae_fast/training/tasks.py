"""The things that can be trained: which weights, what one step's loss is, and what a user gets.

A task is a module whose ``forward`` is the loss, so that it can be compiled or wrapped as it is; the Trainer does all
the rest and knows none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import AnyConfig, DiffAEConfig, PDAEConfig
from ..models import PDAE, Autoencoder, Prior
from ..schedule import Tables, build_schedule
from .objective import classifier_loss, encoder_loss, latent_loss, pdae_loss, simple_loss


def _images(samples: list[Any]) -> Tensor:
    return torch.stack([sample.image for sample in samples])


def _images_with_rows(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, rows = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(rows)


def _as_they_are(batch: Any) -> Any:
    return batch


class ImagesWithRows(Dataset):
    """The images ``indices`` of ``dataset`` with their rows of ``table``, codes [N, D] or class labels [N]."""

    def __init__(self, dataset: Any, table: Tensor, indices: Sequence[int]) -> None:
        self.dataset, self.table, self.indices = dataset, table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        index = int(self.indices[place])
        return self.dataset[index].image, self.table[index]


class Task(nn.Module):
    """One thing to train.

    ``model`` is what the optimiser changes (where ``requires_grad`` is set), what the EMA follows and what the
    checkpoint holds. ``record`` says what else decides a run's course: a resumed run must have the same. ``collate``
    makes a batch of what the data set hands out; it runs in loader workers. ``units`` is what the data set consists of.
    """

    name: str
    units = "images"
    collate = staticmethod(_images)

    def __init__(self, model: nn.Module, record: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self.record = dict(record or {})

    @property
    def config(self) -> AnyConfig:
        """Configuration of what :meth:`export` gives."""
        return self.model.config

    def part_of(self, name: str) -> str:
        """Which of the parts that learn at rates of their own the parameter ``name`` of the model belongs to."""
        return ""

    def rate_of(self, part: str, progress: float) -> float:
        """What the learning rate is multiplied by for ``part`` once ``progress`` in [0, 1) of the steps are done."""
        return 1.0

    def draw(self, batch: Any, generator: torch.Generator, flip: bool) -> tuple[Tensor, ...]:
        """``batch`` with all random numbers of its step (dropout's excepted): the arguments of ``forward``, all on the
        CPU. The order of draws is part of what a resumed run must repeat."""
        raise NotImplementedError

    def forward(self, *tensors: Tensor) -> Tensor:
        """The loss, a scalar, of what :meth:`draw` gave, on the model's device."""
        raise NotImplementedError

    def export(self, ema: nn.Module) -> Prior | Autoencoder:
        """What users load, with the weights of ``ema`` (a copy of ``model``)."""
        return ema


class _ImageTask(Task):
    """Noise prediction on images that may be mirrored, which come with their labels (`ImagesWithRows`) where the prior
    is class-conditional; ``velocity`` as in `objective`."""

    def __init__(self, model: Prior | Autoencoder, velocity: float = 0.0, record: dict[str, Any] | None = None) -> None:
        # What is off is not recorded: runs from before it existed can be resumed.
        super().__init__(model, (record or {}) | ({"--velocity": velocity} if velocity else {}))
        self.velocity = velocity
        self.schedule = build_schedule(model.config.schedule)
        self.tables = Tables(self.schedule, model.config.prediction)
        self.times = self.schedule.T
        if model.config.unet.num_classes is not None:
            self.collate = _images_with_rows

    def draw(self, batch: Any, generator: torch.Generator, flip: bool) -> tuple[Tensor, ...]:
        """images [B, C, H, W] -> (images, t [B], noise [B, C, H, W]); (images, labels [B]) -> these and the labels."""
        images, *labels = (batch,) if isinstance(batch, Tensor) else batch
        B = len(images)
        t = torch.randint(0, self.times, (B,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        if flip:
            flipped = torch.rand(B, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return images, t, noise, *labels


class PriorTask(_ImageTask):
    """The pre-trained diffusion model itself: all of a Prior but a learned variance. Nothing here reads that, and no
    gradient reaches its rows of the last convolution: they stay as they are."""

    name = "prior"

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        return simple_loss(self.model, self.tables, x0, t, noise, self.velocity, y)


class DiffAETask(PriorTask):
    """Encoder and conditional U-Net of a Diff-AE, trained together."""

    name = "diffae"


class PDAETask(_ImageTask):
    """Encoder and G of a PDAE; what it has from its prior is frozen (Algorithm 1). With ``freeze_encoder`` G alone:
    codes, and what is made of them, stay as they are."""

    name = "pdae"

    def __init__(self, model: PDAE, velocity: float = 0.0, freeze_encoder: bool = False) -> None:
        super().__init__(model, velocity, {"--freeze-encoder": True} if freeze_encoder else None)
        self.times = self.schedule.last + 1  # beyond it x_t is noise alone, and no G says anything of x0
        model.requires_grad_(False)
        model.encoder.requires_grad_(not freeze_encoder)
        model.decoder.freeze_prior()
        self.register_module("frozen", None)  # another way to run the frozen half: step.FrozenHalf

    def train(self, mode: bool = True) -> PDAETask:
        # The frozen half must compute what it will compute at inference: no dropout there.
        super().train(False)
        self.training = mode
        for name in self.model.decoder.TRAINED:
            getattr(self.model.decoder, name).train(mode)
        self.model.encoder.train(mode)
        return self

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        return pdae_loss(self.model, self.tables, x0, t, noise, self.frozen, self.velocity, y)


class _PartTask(Task):
    """One network of ``model``, an autoencoder: it is trained alone, and put back for users."""

    part: str

    def __init__(self, model: Autoencoder, record: dict[str, Any] | None = None) -> None:
        # A copy: export() puts averaged weights into the original while this one goes on learning.
        super().__init__(copy.deepcopy(getattr(model, self.part)), record)
        # In a tuple, where it is no submodule: it is neither trained nor moved to the device.
        self._whole = (model,)

    @property
    def config(self) -> PDAEConfig | DiffAEConfig:
        return self._whole[0].config

    def export(self, ema: nn.Module) -> Autoencoder:
        (model,) = self._whole
        getattr(model, self.part).load_state_dict(ema.state_dict())
        return model


class EncoderTask(_PartTask):
    """The encoder of ``pdae`` by regression onto codes that are known: a warm start (see `warm_start`)."""

    name = "encoder"
    part = "encoder"
    collate = staticmethod(_images_with_rows)

    def draw(self, batch: tuple[Tensor, Tensor], generator: torch.Generator, flip: bool) -> tuple[Tensor, Tensor]:
        """(images [B, C, H, W], codes [B, latent_dim]); nothing is random."""
        return batch

    def forward(self, x0: Tensor, z: Tensor) -> Tensor:
        return encoder_loss(self.model, x0, z)


class _CodeTask(_PartTask):
    """A network on normalised latents."""

    units = "latents"
    collate = staticmethod(_as_they_are)


class LatentTask(_CodeTask):
    """The latent DPM of an autoencoder that has one in its configuration."""

    name = "latent"
    part = "latent_denoiser"

    def __init__(self, model: Autoencoder, record: dict[str, Any] | None = None) -> None:
        super().__init__(model, record)
        self.schedule = build_schedule(model.config.latent.schedule)
        self.tables = Tables(self.schedule)

    def draw(self, z: Tensor, generator: torch.Generator, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised z [B, D] -> (z, t [B], noise [B, D])."""
        t = torch.randint(0, self.schedule.T, (len(z),), generator=generator)
        return z, t, torch.randn(z.shape, generator=generator)

    def forward(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return latent_loss(self.model, self.tables, z, t, noise)


class ClassifierTask(_CodeTask):
    """The linear attribute classifier of an autoencoder that has attributes in its configuration."""

    name = "classifier"
    part = "classifier"

    def draw(self, batch: tuple[Tensor, Tensor], generator: torch.Generator, flip: bool) -> tuple[Tensor, Tensor]:
        """(normalised z [B, D], labels [B, attributes]); nothing is random."""
        return batch

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return classifier_loss(self.model, z, labels)


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PriorTask, EncoderTask, PDAETask, DiffAETask, LatentTask, ClassifierTask)
}
