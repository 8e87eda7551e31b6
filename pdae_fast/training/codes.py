"""From a trained PDAE and its latents to the two tasks on z: the latent DPM and the attribute classifier."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor, nn

from ..config import LatentConfig
from ..data import Labels
from ..errors import UserError
from ..models import PDAE
from ..models.latent import LatentMLP
from .labels import split
from .latents import Latents, LatentSet
from .tasks import ClassifierTask, LatentTask


def latent_task(
    pdae: PDAE, latents: Latents, hidden: int = 2048, layers: int = 10, seed: int = 0
) -> tuple[LatentTask, LatentSet]:
    """A fresh latent DPM for ``pdae``, and what it is trained on: all latents, normalised by their own statistics.

    Those statistics become the model's. A classifier that is there already is kept: it reads normalised latents, so
    where the statistics change it is rewritten to give the same logits for the same z.
    """
    config = LatentConfig(pdae.config.latent_dim, hidden, layers)
    torch.manual_seed(seed)
    fresh = LatentMLP(config)
    extended = _extend(pdae, "latent_denoiser", fresh, latents.mean, latents.std, latent=config)
    if pdae.classifier is not None and pdae.config.latent_statistics:
        _renormalise(extended.classifier, pdae.latent_mean, pdae.latent_std, latents.mean, latents.std)
    task = LatentTask(extended, {"encoder weights": latents.encoder, "images": latents.images})
    return task, LatentSet(latents.z, latents.mean, latents.std)


def classifier_task(
    pdae: PDAE, latents: Latents, labels: Labels, holdout: float = 0.1, seed: int = 0
) -> tuple[ClassifierTask, LatentSet, LatentSet]:
    """A fresh classifier with one output for each column of ``labels``, the latents it is trained on, and those that
    are held out (the training ones where ``holdout`` is 0).

    A model that has statistics keeps them, because a latent DPM in it depends on them; else those of ``latents`` become
    the model's.
    """
    if len(labels.indices) < 2:
        raise UserError(f"a classifier needs at least 2 images with labels, not {len(labels.indices)}")
    own = pdae.config.latent_statistics
    mean, std = (pdae.latent_mean, pdae.latent_std) if own else (latents.mean, latents.std)
    torch.manual_seed(seed)
    fresh = nn.Linear(pdae.config.latent_dim, len(labels.columns))
    extended = _extend(pdae, "classifier", fresh, mean, std, attributes=tuple(labels.columns))
    rows = torch.as_tensor(labels.indices)
    parts = []
    for places in split(len(rows), holdout, seed):
        chosen = torch.from_numpy(places)
        parts.append(LatentSet(latents.z, mean, std, rows[chosen], labels.values[chosen]))
    digest = hashlib.sha256(rows.numpy())
    digest.update(labels.values.contiguous().numpy())
    record = {
        "encoder weights": latents.encoder,
        "images": latents.images,
        "labels": digest.hexdigest()[:40],
        "latent statistics": hashlib.sha256(torch.cat([mean, std]).numpy()).hexdigest()[:40],
        "held-out images": len(parts[1]),
    }
    return ClassifierTask(extended, record), parts[0], parts[1] if len(parts[1]) else parts[0]


def _extend(pdae: PDAE, part: str, module: nn.Module, mean: Tensor, std: Tensor, **changes: object) -> PDAE:
    """``pdae`` with ``module`` as its ``part``, latent statistics, and a configuration that says so (a copy)."""
    config = dataclasses.replace(pdae.config, latent_statistics=True, **changes)
    state = {name: tensor for name, tensor in pdae.state_dict().items() if not name.startswith(f"{part}.")}
    state |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    state |= {"latent_mean": mean, "latent_std": std}
    extended = PDAE.from_state(config, state, part)
    extended.notes = pdae.notes
    return extended


@torch.no_grad()
def _renormalise(classifier: nn.Linear, mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
    """Rewrite w (z - mean) / std + b as w' (z - new_mean) / new_std + b': the same function of z."""
    w, b = classifier.weight.double(), classifier.bias.double()
    mean, std, new_mean, new_std = (v.double() for v in (mean, std, new_mean, new_std))
    classifier.bias.copy_(b + (w / std) @ (new_mean - mean))
    classifier.weight.copy_(w * new_std / std)
