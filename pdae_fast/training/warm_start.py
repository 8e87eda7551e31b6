"""A warm start for E_phi, and encoder and G taken over from another PDAE. Not in the paper.

A fresh encoder says next to nothing about its image, and G learns to ignore it long before that changes. Codes of the
images that are known beforehand can be learned by plain regression, in minutes: the images' principal components, or
what the encoder of another PDAE makes of them, whose G then need not be learned anew. That PDAE may be of another image
size: no weight of G depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import cli
from ..data import open_dataset, stream
from ..errors import UserError
from ..models import PDAE
from .labels import split
from .latents import Latents, data_fingerprint, encode_all, encode_dataset, kept, weights_fingerprint
from .tasks import EncoderTask

PCA = "pca"  # the target that is no model
PCA_SIZE = 64  # leading components are smooth: larger images are averaged down to this first
FLOOR = 1e-10  # of the largest variance: what lies below is rounding
BATCH = 64


# -- the codes to learn ------------------------------------------------------------------------------------------------


def pca_codes(
    dataset: Any,
    dim: int,
    cache: str | os.PathLike | None = None,
    *,
    count: int = 10_000,
    seed: int = 0,
    require: bool = False,
    quiet: bool = False,
) -> Latents:
    """The ``dim`` leading principal components of the images of ``dataset``, each divided by its standard deviation.

    Mean 0 and covariance 1 over the images that the components come from: ``count`` spread evenly over the data set, or
    all of them. Images larger than 64 px are averaged down to that, so the fit holds 4 bytes for each of at most 64 x
    64 values and channels of ``count`` images, 0.5 GB for 10,000 in colour. seed: of the randomised decomposition.
    cache, require: as `encode_dataset`; a broken image raises BrokenImage. Raises UserError without scikit-learn, for
    no more than ``dim`` images, and for images that vary along fewer directions than ``dim``.
    """
    check_pca()
    if not len(dataset):
        raise UserError("the data set is empty; expected images")
    used = min(count, len(dataset))
    if used <= dim:
        raise UserError(f"{dim} principal components need at least {dim + 1} images, not {used}")
    rule = json.dumps(["pca", PCA_SIZE, dim, used, seed])
    name, images = hashlib.sha256(rule.encode()).hexdigest()[:40], data_fingerprint(dataset)

    def make() -> Latents:
        fitted = _fit(dataset, np.linspace(0, len(dataset) - 1, used).astype(int), dim, seed, quiet)

        def encode(x0: Tensor) -> Tensor:
            return torch.from_numpy(fitted.transform(_flat(x0)))

        return encode_all(encode, dataset, BATCH, "fail", quiet, name, images)

    return kept(cache, name, images, make, f"{len(dataset)} images by principal components" if require else None)


def check_pca() -> None:
    """UserError when principal components cannot be computed here."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("principal components need scikit-learn: pip install 'pdae_fast[experiments]'")


def _flat(x0: Tensor) -> np.ndarray:
    """x0 [B, C, S, S] -> float32 [B, features], S averaged down to PCA_SIZE where it is larger."""
    if x0.shape[-1] > PCA_SIZE:
        x0 = F.adaptive_avg_pool2d(x0, PCA_SIZE)
    return x0.flatten(1).numpy()


def _fit(dataset: Any, chosen: Sequence[int], dim: int, seed: int, quiet: bool) -> Any:
    """scikit-learn's PCA of these images."""
    from sklearn.decomposition import PCA as Decomposition

    matrix, filled = None, 0
    with tqdm(total=len(chosen), unit="image", desc="read", disable=quiet or None) as bar:
        for batch in stream(_Chosen(dataset, chosen), BATCH, "fail"):
            flat = _flat(batch.images)
            if matrix is None:
                matrix = np.empty((len(chosen), flat.shape[1]), np.float32)
            matrix[filled : filled + len(flat)] = flat
            filled += len(flat)
            bar.update(len(flat))
    if dim > matrix.shape[1]:
        raise UserError(f"images of {matrix.shape[1]} values have no {dim} principal components")
    # Seven power iterations: the trailing ones of `dim` components are hardly larger than the first that is left out.
    fitted = Decomposition(dim, whiten=True, svd_solver="randomized", iterated_power=7, random_state=seed, copy=False)
    with np.errstate(invalid="ignore"):  # images that are all alike: said below
        fitted.fit(matrix)
    variance = fitted.explained_variance_
    varying = int((variance > max(FLOOR * variance[0], 0)).sum())
    if varying < dim:
        raise UserError(f"these images vary along {varying} directions alone; their {dim} codes cannot all be white")
    return fitted


class _Chosen(Dataset):
    """Some images of a data set, in the order of ``indices``."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[int(self.indices[place])]


def model_codes(
    model: PDAE, start: PDAE, name: str, data: str, cache: str | os.PathLike | None = None, **options: Any
) -> Latents:
    """z = E(x_0) by the encoder of ``start``, a PDAE called ``name``, for ``model`` to learn: not normalised.

    The images of ``data`` are read at the size of ``start``, that is by the same Lanczos filter from the same files as
    in its own training, whatever size ``model`` has. options: as `encode_dataset`.
    Raises UserError when the two have other channels or latent dimensions.
    """
    for field, own, other in (
        ("latent_dim", model.config.latent_dim, start.config.latent_dim),
        ("input_channel", model.config.unet.input_channel, start.config.unet.input_channel),
    ):
        if own != other:
            raise UserError(f"--target {name}: its {field} is {other}; the model to train has {own}")
    channels, size, _ = start.image_shape
    return encode_dataset(start, open_dataset(data, size, channels, split="train"), cache, on_error="fail", **options)


# -- what is taken over ------------------------------------------------------------------------------------------------


def take_trained_half(model: PDAE, start: PDAE, name: str) -> None:
    """Give ``model`` the encoder and the G of ``start``, a PDAE of the same shape around another prior."""
    for field in ("image_size", "latent_dim", "encoder_channel", "unet", "schedule"):
        own, other = getattr(model.config, field), getattr(start.config, field)
        if own != other:
            raise UserError(f"--start-from {name}: its {field} is {other}; the model to train has {own}")
    model.encoder.load_state_dict(start.encoder.state_dict())
    _copy_g(model, start)


def take_g(model: PDAE, start: PDAE) -> str | None:
    """Give ``model`` the G of ``start``, which may be of another image size; None, or in words why it does not fit."""
    # Dropout has no weights and no part in what a trained network computes.
    own, other = (dataclasses.asdict(dataclasses.replace(m.config.unet, dropout=0.0)) for m in (model, start))
    own["schedule"], other["schedule"] = model.config.schedule, start.config.schedule
    for field, value in own.items():
        if other[field] != value:
            return f"its {field} is {other[field]}, that of the model to train {value}"
    _copy_g(model, start)
    return None


def _copy_g(model: PDAE, start: PDAE) -> None:
    for part in model.decoder.TRAINED:
        getattr(model.decoder, part).load_state_dict(getattr(start.decoder, part).state_dict())


# -- the task ----------------------------------------------------------------------------------------------------------


class ImagesWithCodes(Dataset):
    """The images ``indices`` of ``dataset`` with their rows of z: (x_0 [C, H, W], z [D])."""

    def __init__(self, dataset: Any, z: Tensor, indices: Sequence[int]) -> None:
        self.dataset, self.z, self.indices = dataset, z, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        index = int(self.indices[place])
        return self.dataset[index].image, self.z[index]


def encoder_task(
    model: PDAE, dataset: Any, latents: Latents, holdout: float = 0.1, seed: int = 0
) -> tuple[EncoderTask, ImagesWithCodes, ImagesWithCodes]:
    """The encoder of ``model`` with what it is trained on, the images of ``dataset`` and their ``latents``, and those
    that are held out (the training ones where ``holdout`` is 0). UserError where the two do not belong together."""
    if len(latents.z) != len(dataset):
        raise UserError(f"{len(latents.z)} codes for {len(dataset)} images; expected one for each")
    train, held = split(len(dataset), holdout, seed)
    record = {
        "target codes": latents.encoder,
        "images": latents.images,
        "decoder weights": weights_fingerprint(model.decoder),
        "held-out images": len(held),
    }
    parts = [ImagesWithCodes(dataset, latents.z, part) for part in (train, held if len(held) else train)]
    return EncoderTask(model, record), *parts


@torch.inference_mode()
def evaluate(encoder: nn.Module, pairs: ImagesWithCodes, device: torch.device) -> dict[str, Any]:
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
