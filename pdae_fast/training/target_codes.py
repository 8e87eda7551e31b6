"""Codes of images that are known without training: what `train encoder` learns. Not in the paper.

Three kinds: principal components of the pixels, principal components of what the frozen prior's trunk makes of the
images, and the codes of another PDAE. Attributes that are known of the images can come first in each. All come as
`Latents`, kept in a file under the fingerprints of rule and images.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data import open_dataset, stream
from ..data.attributes import Labels
from ..data.latents import Latents, data_fingerprint, encode_all, encode_dataset, kept, statistics
from ..errors import UserError
from ..models import PDAE
from ..models.unet import UNet
from ..tensors import weights_fingerprint

PCA, FEATURES = "pca", "features"
COMPONENTS = (PCA, FEATURES)  # the targets that are no model
PCA_SIZE = 64  # leading components are smooth: larger images are averaged down to this first
FEATURE_SIZE = 8  # so are those of features; a level of 256 channels is then 16,384 numbers an image
# t at which the trunk reads the clean image, of 1000: it has learned to see fine things in hardly any noise.
FEATURE_TIME = 20
FLOOR = 1e-10  # of the largest variance: what lies below is rounding
BATCH = 64

Describe = Callable[[Tensor], list[Tensor]]  # x0 [B, C, S, S] -> groups of features, each [B, anything]


def check_pca() -> None:
    """UserError when principal components cannot be computed here."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("principal components need scikit-learn: pip install 'pdae_fast[experiments]'")


def pca_codes(dataset: Any, dim: int, cache: str | os.PathLike | None = None, **options: Any) -> Latents:
    """The ``dim`` leading principal components of the images of ``dataset``, each divided by its standard deviation.

    Images larger than 64 px are averaged down to that, so the fit holds 4 bytes for each of at most 64 x 64 values and
    channels of ``count`` images, 0.5 GB for 10,000 in colour. options, errors: see `_components`.
    """
    return _components(_pixels, ["pca", PCA_SIZE], dataset, dim, cache, **options)


def feature_codes(
    unet: UNet,
    dataset: Any,
    dim: int,
    cache: str | os.PathLike | None = None,
    *,
    device: torch.device | str = "cpu",
    T: int = 1000,
    label: int | None = None,
    **options: Any,
) -> Latents:
    """The ``dim`` leading principal components of the features that the frozen trunk of ``unet`` finds in the images of
    ``dataset``, each divided by its standard deviation.

    The trunk reads the clean image as x_t of t = 20 (of ``T`` = 1000), under ``label`` where it knows classes. Of every
    resolution its last activation is taken and averaged down to 8 x 8; all resolutions weigh the same (each is divided
    by the root of its total variance). Such features tell small things apart that hardly show in the variance of
    pixels, as has been found of diffusion models in general (Baranchuk et al., arXiv 2112.03126). The fit holds 4 bytes
    for 64 times the channels of ``count`` images: 0.6 GB for 10,000 and the bundled ``avatars64``, 2.9 GB for the
    paper's CelebA-64 network. options, errors: see `_components`.
    """
    unet, time = unet.to(device).eval(), round(FEATURE_TIME * T / 1000)

    @torch.inference_mode()
    def describe(x0: Tensor) -> list[Tensor]:
        x0 = x0.to(device)
        t = torch.full((len(x0),), time, device=device)
        y = None if label is None else torch.full((len(x0),), label, device=device)
        last = {skip.shape[-1]: skip for skip in unet.trunk(x0, t, y).skips}
        pooled = [F.adaptive_avg_pool2d(skip.float(), min(FEATURE_SIZE, size)) for size, skip in last.items()]
        return [level.flatten(1).cpu() for level in pooled]

    trunk = weights_fingerprint(unet.input_blocks, weights_fingerprint(unet.time_embed))
    rule = ["features", FEATURE_SIZE, time, trunk]
    if label is not None:
        rule += [label, weights_fingerprint(unet.class_emb)]
    return _components(describe, rule, dataset, dim, cache, **options)


def model_codes(
    model: PDAE, start: PDAE, name: str, data: Any, cache: str | os.PathLike | None = None, **options: Any
) -> Latents:
    """z = E(x_0) by the encoder of ``start``, a PDAE called ``name``, for ``model`` to learn: not normalised.

    data: as `open_dataset` takes it, or a data set of the shape that ``start`` takes. The images are read at the size
    of ``start``, that is by the same Lanczos filter from the same files as in its own training, whatever size ``model``
    has. options: as `encode_dataset`.
    Raises UserError when the two have other channels or latent dimensions.
    """
    own, other = model.config.latent_dim, start.config.latent_dim
    if own != other:
        raise UserError(f"--target {name}: its latent_dim is {other}; the model to train has {own}")
    return own_codes(model, start, f"--target {name}", data, cache, **options)


def own_codes(
    model: PDAE, start: PDAE, what: str, data: Any, cache: str | os.PathLike | None = None, **options: Any
) -> Latents:
    """`model_codes` of whatever dimension ``start`` has. what: for the error, where the two have other channels."""
    channels, size, _ = start.image_shape
    own = model.config.unet.input_channel
    if own != channels:
        raise UserError(f"{what}: its input_channel is {channels}; the model to train has {own}")
    dataset = open_dataset(data, size, channels, split="train") if isinstance(data, (str, os.PathLike)) else data
    return encode_dataset(start, dataset, cache, on_error="fail", **options)


def known_attributes(labels: Labels, dim: int) -> Tensor:
    """The K attributes of ``labels``, each with mean 0 and variance 1, to begin codes of ``dim`` dimensions; float64
    [N, K]. UserError where an image has none, where all images or none have one, and for K >= ``dim``."""
    if labels.missing:
        raise UserError(f"{labels.report()}; codes that begin with attributes need those of every image")
    if len(labels.columns) >= dim:
        raise UserError(f"{len(labels.columns)} attributes leave no room in codes of {dim} dimensions")
    for column, values in zip(labels.columns, labels.values.T, strict=True):
        if values.min() == values.max():
            raise UserError(f"the attribute {column} is {int(values[0])} for every image, which tells nothing")
    values = labels.values.double()
    return (values - values.mean(0)) / values.std(0, correction=0)


def attributes_first(
    latents: Latents, known: Tensor, cache: str | os.PathLike | None = None, require: bool = False
) -> Latents:
    """``latents`` with codes [N, D] that begin with ``known`` [N, K], see `known_attributes`.

    What follows are the D - K leading principal components of the part of ``latents.z`` that no linear map of
    ``known`` explains (float64), at their own scale: an attribute has one direction of z to itself.
    cache, require: as `encode_dataset`.
    """
    rule = ["attributes", latents.encoder, hashlib.sha256(known.numpy()).hexdigest()]
    name = hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:40]
    N, D = latents.z.shape

    def make() -> Latents:
        z = latents.z.double()
        z -= z.mean(0)
        z -= known @ torch.linalg.lstsq(known, z, driver="gelsd").solution
        leading = torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, : D - known.shape[1]]
        codes = torch.cat([known, z @ leading], 1).float()
        mean, std = statistics(codes)
        return latents._replace(z=codes, mean=mean, std=std, encoder=name)

    return kept(cache, name, latents.images, make, f"{N} images with their attributes" if require else None)


# -- principal components ----------------------------------------------------------------------------------------------


class _Fitted(NamedTuple):
    describe: Describe
    scales: list[float]  # one for each group of features
    decomposition: Any  # scikit-learn's PCA of all groups, scaled

    def __call__(self, x0: Tensor) -> Tensor:
        groups = zip(self.scales, self.describe(x0), strict=True)
        return torch.from_numpy(self.decomposition.transform(torch.cat([s * g for s, g in groups], 1).numpy()))


def _pixels(x0: Tensor) -> list[Tensor]:
    """Every pixel, S averaged down to PCA_SIZE where it is larger."""
    if x0.shape[-1] > PCA_SIZE:
        x0 = F.adaptive_avg_pool2d(x0, PCA_SIZE)
    return [x0.flatten(1)]


def _components(
    describe: Describe,
    rule: list[Any],
    dataset: Any,
    dim: int,
    cache: str | os.PathLike | None = None,
    *,
    count: int = 10_000,
    seed: int = 0,
    require: bool = False,
    quiet: bool = False,
) -> Latents:
    """The ``dim`` leading principal components of what ``describe`` says of the images, known by ``rule``.

    Mean 0 and covariance 1 over the images that the components come from: ``count`` spread evenly over the data set, or
    all of them. seed: of the randomised decomposition. cache, require: as `encode_dataset`; a broken image raises
    BrokenImage. Raises UserError without scikit-learn, for no more than ``dim`` images, and for images that vary along
    fewer directions than ``dim``.
    """
    check_pca()
    if not len(dataset):
        raise UserError("the data set is empty; expected images")
    used = min(count, len(dataset))
    if used <= dim:
        raise UserError(f"{dim} principal components need at least {dim + 1} images, not {used}")
    name = hashlib.sha256(json.dumps([*rule, dim, used, seed]).encode()).hexdigest()[:40]
    images = data_fingerprint(dataset)

    def make() -> Latents:
        chosen = np.linspace(0, len(dataset) - 1, used).astype(int)
        return encode_all(
            _fit(describe, dataset, chosen, dim, seed, quiet), dataset, BATCH, "fail", quiet, name, images
        )

    return kept(cache, name, images, make, f"{len(dataset)} images by principal components" if require else None)


def _fit(describe: Describe, dataset: Any, chosen: Sequence[int], dim: int, seed: int, quiet: bool) -> _Fitted:
    from sklearn.decomposition import PCA as Decomposition

    matrix, filled = None, 0
    with tqdm(total=len(chosen), unit="image", desc="read", disable=quiet or None) as bar:
        for batch in stream(_Chosen(dataset, chosen), BATCH, "fail"):
            groups = describe(batch.images)
            if matrix is None:
                widths = [group.shape[1] for group in groups]
                matrix = np.empty((len(chosen), sum(widths)), np.float32)
            matrix[filled : filled + len(batch.images)] = torch.cat(groups, 1).numpy()
            filled += len(batch.images)
            bar.update(len(batch.images))
    if dim > matrix.shape[1]:
        raise UserError(f"images of {matrix.shape[1]} values have no {dim} principal components")
    scales = _balance(matrix, widths)
    # Seven power iterations: the trailing ones of `dim` components are hardly larger than the first that is left out.
    fitted = Decomposition(dim, whiten=True, svd_solver="randomized", iterated_power=7, random_state=seed, copy=False)
    with np.errstate(invalid="ignore"):  # images that are all alike: said below
        fitted.fit(matrix)
    variance = fitted.explained_variance_
    varying = int((variance > max(FLOOR * variance[0], 0)).sum())
    if varying < dim:
        raise UserError(f"these images vary along {varying} directions alone; their {dim} codes cannot all be white")
    return _Fitted(describe, scales, fitted)


def _balance(matrix: np.ndarray, widths: Sequence[int]) -> list[float]:
    """Give every group of columns the total variance 1, in place; the factors. A single group is left as it is."""
    if len(widths) == 1:
        return [1.0]
    scales, end = [], 0
    for width in widths:
        group = matrix[:, end : end + width]
        total = sum(float(group[:, i].var(dtype=np.float64)) for i in range(width))
        scales.append(total**-0.5 if total > 0 else 1.0)
        group *= scales[-1]
        end += width
    return scales


class _Chosen(Dataset):
    """Some images of a data set, in the order of ``indices``."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[int(self.indices[place])]
