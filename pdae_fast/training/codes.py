"""From a trained autoencoder and its latents to the two tasks on z, the latent DPM and the attribute classifier; and
how good the classifier is on held-out images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from .. import cli
from ..config import LatentConfig
from ..data import Labels
from ..data.latents import Latents, LatentSet, split
from ..errors import UserError
from ..models import Autoencoder
from ..models.latent import LatentMLP
from .tasks import ClassifierTask, LatentTask

INSTALL = "AUROC needs scikit-learn: pip install 'pdae_fast[experiments]'"

# -- the tasks ---------------------------------------------------------------------------------------------------------


def latent_task(
    model: Autoencoder, latents: Latents, hidden: int = 2048, layers: int = 10, seed: int = 0
) -> tuple[LatentTask, LatentSet]:
    """A fresh latent DPM for ``model``, and what it is trained on: all latents, normalised by their own statistics.

    Those statistics become the model's. A classifier that is there already is kept: it reads normalised latents, so
    where the statistics change it is rewritten to give the same logits for the same z.
    """
    config = LatentConfig(model.config.latent_dim, hidden, layers)
    torch.manual_seed(seed)
    fresh = LatentMLP(config)
    extended = _extend(model, "latent_denoiser", fresh, latents.mean, latents.std, latent=config)
    if model.classifier is not None and model.config.latent_statistics:
        _renormalise(extended.classifier, model.latent_mean, model.latent_std, latents.mean, latents.std)
    task = LatentTask(extended, {"encoder weights": latents.encoder, "images": latents.images})
    return task, LatentSet(latents.z, latents.mean, latents.std)


def classifier_task(
    model: Autoencoder, latents: Latents, labels: Labels, holdout: float = 0.1, seed: int = 0
) -> tuple[ClassifierTask, LatentSet, LatentSet]:
    """A fresh classifier with one output for each column of ``labels``, the latents it is trained on, and those that
    are held out (the training ones where ``holdout`` is 0).

    A model that has statistics keeps them, because a latent DPM in it depends on them; else those of ``latents`` become
    the model's.
    """
    if len(labels.indices) < 2:
        raise UserError(f"a classifier needs at least 2 images with labels, not {len(labels.indices)}")
    own = model.config.latent_statistics
    mean, std = (model.latent_mean, model.latent_std) if own else (latents.mean, latents.std)
    torch.manual_seed(seed)
    fresh = nn.Linear(model.config.latent_dim, len(labels.columns))
    extended = _extend(model, "classifier", fresh, mean, std, attributes=tuple(labels.columns))
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


def class_labels(latents: Latents, class_names: Sequence[str]) -> Labels:
    """One attribute for each class of the data set, called ``class_names[class]``: one of them is 1 for each image."""
    indices = [i for i, label in enumerate(latents.labels) if label is not None]
    if not indices:
        raise UserError("these images have no classes: give --attributes FILE (CelebA's list or a CSV file)")
    classes = torch.tensor([latents.labels[i] for i in indices])
    present = classes.unique().tolist()
    values = (classes[:, None] == torch.tensor(present)).to(torch.uint8)
    missing = [name for name, label in zip(latents.names, latents.labels, strict=True) if label is None]
    return Labels(values, [class_names[c] for c in present], indices, missing, [])


def _extend(
    model: Autoencoder, part: str, module: nn.Module, mean: Tensor, std: Tensor, **changes: object
) -> Autoencoder:
    """``model`` with ``module`` as its ``part``, latent statistics, and a configuration that says so (a copy)."""
    config = dataclasses.replace(model.config, latent_statistics=True, **changes)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{part}.")}
    state |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    state |= {"latent_mean": mean, "latent_std": std}
    extended = type(model).from_state(config, state, part)
    extended.notes = model.notes
    return extended


@torch.no_grad()
def _renormalise(classifier: nn.Linear, mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
    """Rewrite w (z - mean) / std + b as w' (z - new_mean) / new_std + b': the same function of z."""
    w, b = classifier.weight.double(), classifier.bias.double()
    mean, std, new_mean, new_std = (v.double() for v in (mean, std, new_mean, new_std))
    classifier.bias.copy_(b + (w / std) @ (new_mean - mean))
    classifier.weight.copy_(w * new_std / std)


# -- the classifier, judged --------------------------------------------------------------------------------------------


def evaluate(logits: Tensor, labels: Tensor, columns: list[str], exclusive: bool = False) -> dict[str, Any]:
    """Quality of ``logits`` [K, n] against ``labels`` [K, n] of 0 and 1, for attributes called ``columns``.

    Each attribute: how many of the K are positive, the accuracy at probability one half, the accuracy of always
    answering with the more frequent value ("majority"), and the area under the ROC curve, None where it is not
    defined (all K alike) or scikit-learn is missing; "auroc_available" says which. ``exclusive``: exactly one label
    of each row is 1, and "class_accuracy" is that of the largest logit.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        roc_auc_score = None
    labels = labels.bool()
    attributes = {}
    for i, name in enumerate(columns):
        truth, positives = labels[:, i], float(labels[:, i].float().mean())
        defined = roc_auc_score is not None and 0 < positives < 1
        attributes[name] = {
            "positives": int(truth.sum()),
            "accuracy": float(((logits[:, i] > 0) == truth).float().mean()),
            "majority": max(positives, 1 - positives),
            "auroc": float(roc_auc_score(truth.numpy(), logits[:, i].double().numpy())) if defined else None,
        }
    areas = [values["auroc"] for values in attributes.values() if values["auroc"] is not None]
    report = {
        "images": len(labels),
        "mean_accuracy": fmean(values["accuracy"] for values in attributes.values()),
        "mean_auroc": fmean(areas) if areas else None,
        "auroc_available": roc_auc_score is not None,
        "attributes": attributes,
    }
    if exclusive:
        report["class_accuracy"] = float((logits.argmax(1) == labels.int().argmax(1)).float().mean())
    return report


@torch.inference_mode()
def logits_of(classifier: nn.Linear, z: Tensor) -> Tensor:
    """Logits float32 [K, n] of normalised z [K, D], on the CPU."""
    return classifier.cpu()(z.float())


def summary(report: dict[str, Any]) -> str:
    """``report`` of `evaluate` as a table, and a line for what is missing from it."""

    def area(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        [name, str(v["positives"]), f"{v['majority']:.4f}", f"{v['accuracy']:.4f}", area(v["auroc"])]
        for name, v in report["attributes"].items()
    ]
    rows.append(["mean", "", "", f"{report['mean_accuracy']:.4f}", area(report["mean_auroc"])])
    lines = [cli.table(["attribute", "positives", "majority", "accuracy", "AUROC"], rows)]
    if "class_accuracy" in report:
        lines.append(f"class of the largest logit: accuracy {report['class_accuracy']:.4f}")
    if not report["auroc_available"]:
        lines.append(INSTALL)
    return "\n".join(lines)
