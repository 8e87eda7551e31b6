"""A warm start for E_phi, and encoder and G taken over from another PDAE. Not in the paper.

A fresh encoder says next to nothing about its image, and G learns to ignore it long before that changes. Codes of the
images that are known beforehand (`target_codes`) can be learned by plain regression, in minutes. Where they are another
PDAE's, of whatever image size, its G need not be learned anew: no weight of G depends on that size. Where they are not,
a G that knows others can be given a linear map from the ones to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import cli
from ..config import PriorConfig
from ..data.latents import Latents, split
from ..errors import UserError
from ..models import PDAE, Prior
from ..tensors import weights_fingerprint
from .target_codes import BATCH
from .tasks import EncoderTask, ImagesWithRows

M = TypeVar("M", PDAE, Prior)

# -- what is taken over ------------------------------------------------------------------------------------------------


def take_trained_half(model: PDAE, start: PDAE, name: str) -> None:
    """Give ``model`` the encoder and the G of ``start``, a PDAE of the same shape around another prior."""
    for field in ("image_size", "latent_dim", "encoder_channel", "unet", "schedule"):
        own, other = getattr(model.config, field), getattr(start.config, field)
        if own != other:
            raise UserError(f"--start-from {name}: its {field} is {other}; the model to train has {own}")
    model.encoder.load_state_dict(start.encoder.state_dict())
    _copy_g(model, start)


def around(start: PDAE, prior: Prior, name: str) -> PDAE:
    """``start``, with everything that sits on its codes, around another prior of the same shape."""
    for field in ("image_size", "unet", "schedule"):
        own, other = getattr(prior.config, field), getattr(start.config, field)
        if own != other:
            raise UserError(f"--start-from {name}: its {field} is {other}; the prior of --init-from has {own}")
    start = predicting(start, prior.config.prediction)
    start.decoder.load_state_dict(prior.unet.state_dict(), strict=False)
    return start


def predicting(model: M, prediction: str) -> M:
    """``model`` with a U-Net that is to predict ``prediction``: what it knows of images is a start. G speaks of eps
    whatever that is."""
    if model.config.prediction == prediction:
        return model
    other = type(model)(dataclasses.replace(model.config, prediction=prediction))
    other.load_state_dict(model.state_dict())
    other.notes = model.notes
    return other


def misfit(own: PriorConfig, other: PriorConfig, but: Sequence[str] = ()) -> tuple[str, Any, Any] | None:
    """The first field, ``but`` aside, in which two priors compute something else, with the values of both; or None."""
    # Dropout has no weights and no part in what a trained network computes.
    fields = [
        {
            "image_size": config.image_size,
            **dataclasses.asdict(dataclasses.replace(config.unet, dropout=0.0)),
            "schedule": config.schedule,
            "prediction": config.prediction,
        }
        for config in (own, other)
    ]
    differing = (name for name, value in fields[0].items() if name not in but and fields[1][name] != value)
    return next(((name, fields[0][name], fields[1][name]) for name in differing), None)


def g_misfit(model: PDAE, start: PDAE) -> str | None:
    """In words why the G of ``start`` does not fit ``model``, whatever its z and image size are; None if it does."""
    # Image size and prediction are nothing to G, which reads the trunk and speaks of eps.
    found = misfit(model.config.prior, start.config.prior, but=("image_size", "prediction"))
    return found and f"its {found[0]} is {found[2]}, that of the model to train {found[1]}"


def take_g(model: PDAE, start: PDAE) -> str | None:
    """Give ``model`` the G of ``start``, which may be of another image size; None, or in words why it does not fit."""
    reason = g_misfit(model, start)
    if reason is None:
        _copy_g(model, start)
    return reason


def take_g_for_codes(model: PDAE, start: PDAE, z: Tensor, known: Tensor) -> float:
    """Give ``model`` the G of ``start``, which reads ``known`` [N, d], so that it reads ``z`` [N, D] of those images.

    G sees a code through one linear layer alone. Before it goes the affine map from ``z`` to ``known`` of least squares
    (float64), so the G of ``model`` does with z what that of ``start`` does with the map's result. Returns how much of
    the variance of ``known`` the map explains, over those N images. Raises UserError where the two U-Nets differ.
    """
    _check_codes(model, start, z, known)
    if reason := g_misfit(model, start):
        raise UserError(f"its G does not fit: {reason}")
    _copy_g(model, start, but=("label_emb",))
    slope, offset, explained = _affine(z, known)
    old, new = start.decoder.label_emb, model.decoder.label_emb
    with torch.no_grad():
        weight = old.weight.double().cpu()
        new.weight.copy_(weight @ slope.T)
        new.bias.copy_(old.bias.double().cpu() + weight @ offset)
    return explained


def take_encoder_for_codes(model: PDAE, start: PDAE, z: Tensor, known: Tensor) -> bool:
    """Give ``model`` the encoder of ``start``, which makes ``known`` [N, d] of N images, so that it makes of them what
    is nearest to ``z`` [N, D]: after its last, linear layer comes the affine map of least squares (float64). Returns
    whether it fits; where it does not, nothing changes."""
    _check_codes(model, start, z, known)
    *layers, new = model.encoder.sequence()
    *others, old = start.encoder.sequence()
    weights, own = (nn.Sequential(*part).state_dict() for part in (others, layers))
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in own.items()}:
        return False
    nn.Sequential(*layers).load_state_dict(weights)
    slope, offset, _ = _affine(known, z)
    with torch.no_grad():
        new.weight.copy_(slope.T @ old.weight.double().cpu())
        new.bias.copy_(slope.T @ old.bias.double().cpu() + offset)
    return True


def _check_codes(model: PDAE, start: PDAE, z: Tensor, known: Tensor) -> None:
    widths = known.shape[1], z.shape[1]
    if widths != (start.config.latent_dim, model.config.latent_dim) or len(z) != len(known):
        raise UserError(f"codes {list(z.shape)} and {list(known.shape)} do not belong to these models")


def _affine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """slope [D, d] and offset [d] of the affine map from ``x`` [N, D] to ``y`` [N, d] of least squares, float64, and
    how much of the variance of ``y`` it explains."""
    x, y = x.double(), y.double()
    mean, other = x.mean(0), y.mean(0)
    slope = torch.linalg.lstsq(x - mean, y - other, driver="gelsd").solution  # the least, if not unique
    error = y - other - (x - mean) @ slope
    return slope, other - mean @ slope, float(1 - error.square().sum() / (y - other).square().sum())


def _copy_g(model: PDAE, start: PDAE, but: Sequence[str] = ()) -> None:
    for part in model.decoder.TRAINED:
        if part not in but:
            getattr(model.decoder, part).load_state_dict(getattr(start.decoder, part).state_dict())


# -- the task ----------------------------------------------------------------------------------------------------------


def encoder_task(
    model: PDAE, dataset: Any, latents: Latents, holdout: float = 0.1, seed: int = 0, decoder: str | None = None
) -> tuple[EncoderTask, ImagesWithRows, ImagesWithRows]:
    """The encoder of ``model`` with what it is trained on, the images of ``dataset`` and their ``latents``, and those
    that are held out (the training ones where ``holdout`` is 0). UserError where the two do not belong together.

    decoder: fingerprint of the decoder, for a resumed run to be compared with; default: that of its weights. One that
    was computed (`take_g_for_codes`) has other last bits with other threads, so it is known by what it came from.
    """
    if len(latents.z) != len(dataset):
        raise UserError(f"{len(latents.z)} codes for {len(dataset)} images; expected one for each")
    train, held = split(len(dataset), holdout, seed)
    record = {
        "target codes": latents.encoder,
        "images": latents.images,
        "decoder weights": decoder or weights_fingerprint(model.decoder),
        "held-out images": len(held),
    }
    parts = [ImagesWithRows(dataset, latents.z, part) for part in (train, held if len(held) else train)]
    return EncoderTask(model, record), *parts


@torch.inference_mode()
def evaluate(encoder: nn.Module, pairs: ImagesWithRows, device: torch.device) -> dict[str, Any]:
    """How much of the codes of ``pairs`` the ``encoder`` finds: 1 - (squared error) / (variance), for all dimensions
    together and for each; None where a dimension does not vary. Computed in float64."""
    encoder = encoder.to(device).eval()
    found, expected = [], []
    for x0, z in DataLoader(pairs, BATCH, collate_fn=EncoderTask.collate):
        found.append(encoder(x0.to(device)).double().cpu())
        expected.append(z.double())
    found, expected = torch.cat(found), torch.cat(expected)
    error, variance = (found - expected).square().mean(0), expected.var(0, unbiased=False)
    return {
        "images": len(expected),
        "mse": float(error.mean()),
        "explained_variance": float(1 - error.sum() / variance.sum()),
        "explained_variance_of_dimensions": (1 - error / variance).tolist(),
    }


def summary(report: dict[str, Any]) -> str:
    """``report`` of `evaluate` as a table."""
    each = report["explained_variance_of_dimensions"]
    rows = [
        [f"all {len(each)}", report["explained_variance"]],
        [f"first {min(16, len(each))}, mean", float(np.mean(each[:16]))],
        ["worst", min(each)],
    ]
    return cli.table(["dimensions of z", "explained variance"], [[name, f"{value:.4f}"] for name, value in rows])
