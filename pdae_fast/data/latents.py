"""The latents of a whole data set: encoded once, kept on disk, found again only for the same encoder and images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pdae_fast.checkpoints.directory import save_torch
from pdae_fast.config import DiffAEConfig
from pdae_fast.data.sample import BrokenImage
from pdae_fast.data.stream import none_read, stream
from pdae_fast.errors import UserError
from pdae_fast.files import clear_unfinished, make_folder
from pdae_fast.models import Autoencoder
from pdae_fast.pipeline import Pipeline
from pdae_fast.tensors import weights_fingerprint

FORMAT = "pdae_fast-latents-1"
PROBES = 64
ROWS = 65536  # of z at a time in float64


class Latents(NamedTuple):
    """The codes of a data set's N images, in its order.

    z: float32 [N, D]. names: of the images. labels: their classes, None where unknown. mean, std: float32 [D], of each
    dimension, std the unbiased one. encoder, images: fingerprints of what z was made by and from. broken: (name,
    reason) of images that could not be read and are not in z.
    """

    z: Tensor
    names: list[str]
    labels: list[int | None]
    mean: Tensor
    std: Tensor
    encoder: str
    images: str
    broken: list[tuple[str, str]]


def encode_dataset(
    model: Pipeline | Autoencoder,
    dataset: Any,
    cache: str | os.PathLike | None = None,
    *,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    on_error: str = "skip",
    require: bool = False,
    quiet: bool = False,
) -> Latents:
    """z = E(x_0) of every image of ``dataset``, with a progress bar, or from ``cache``.

    model: a Pipeline, or an autoencoder that is run in float32 on ``device`` with ``batch_size`` images at a time
    (default: chosen for the device). dataset: any of `pdae_fast.data`: len, names and dataset[i] -> Sample.
    cache: a folder, made where it is missing, that holds one file for each pair of encoder and data set. The file's
    name follows from both fingerprints (see `encoder_fingerprint` and `data_fingerprint`), so another encoder or other
    images are encoded anew and never mistaken. It is written whole, at the end.
    on_error: "skip" leaves broken images out and lists them in ``broken``; "fail" ends with the first.
    require: UserError instead of encoding when the cache does not hold them.
    Raises UserError also when no image can be read, when z is not finite, and when the system refuses to write.
    """
    pdae = model.model if isinstance(model, Pipeline) else model
    if not isinstance(pdae, Autoencoder):
        raise UserError("encoding a data set needs an autoencoder (PDAE or DiffAE), not a prior alone")
    if on_error not in ("skip", "fail"):
        raise UserError(f"on_error must be 'skip' or 'fail', not {on_error!r}")
    if not len(dataset):
        raise UserError("the data set is empty; expected images")
    dtype = str(model.dtype if isinstance(model, Pipeline) else torch.float32).removeprefix("torch.")
    encoder, images = encoder_fingerprint(pdae, dtype), data_fingerprint(dataset)

    def make() -> Latents:
        # The plan makes no difference to the encoder, and the plain one costs nothing to build.
        pipe = (
            model
            if isinstance(model, Pipeline)
            else Pipeline(pdae, device=device, dtype="float32", batch_size=batch_size, plan="eager")
        )
        return encode_all(pipe.encode, dataset, batch_size or pipe.batch_size, on_error, quiet, encoder, images)

    found = kept(cache, encoder, images, make, f"{len(dataset)} images by this encoder" if require else None)
    if found.broken and on_error == "fail":
        raise BrokenImage(*found.broken[0])
    return found


def kept(
    cache: str | os.PathLike | None, encoder: str, images: str, make: Callable[[], Latents], require: str | None = None
) -> Latents:
    """The latents of these two fingerprints: from the folder ``cache``, or by ``make``, and then kept there.

    require: whose latents they are, in words; UserError instead of making them.
    """
    path = None if cache is None else cache_path(cache, encoder, images)
    there = path is not None and path.exists()
    found = _read(path, encoder, images) if there else None
    if found is not None:
        return found
    if require:
        what = "damaged, so that there are " if there else ""
        raise UserError(f"{path or 'no cache given'}: {what}no latents of these {require}")
    if there:
        print(f"note: {path}: damaged or of an earlier version; made again", file=sys.stderr)
    if path is not None:
        make_folder(path.parent)  # before the work, not after it
        clear_unfinished(path.parent)
    found = make()
    if path is not None:
        save_torch(path, {"format": FORMAT, **found._asdict(), "digest": _digest(found)})
    return found


def cache_path(cache: str | os.PathLike, encoder: str, images: str) -> Path:
    """Where in the folder ``cache`` the latents of these two fingerprints are."""
    return Path(cache) / f"{hashlib.sha256(f'{encoder} {images}'.encode()).hexdigest()[:20]}.pt"


def encoder_fingerprint(model: Autoencoder, dtype: str = "float32") -> str:
    """40 hexadecimal digits of all that decides z for a given image: the encoder's shape, its weights, its dtype.

    The decoder, a latent DPM and a classifier have no part in it: adding them keeps the latents valid.
    """
    config = model.config
    own = dataclasses.asdict(config.encoder) if isinstance(config, DiffAEConfig) else config.encoder_channel
    shape = [config.image_size, config.unet.input_channel, config.latent_dim, own, dtype]
    return weights_fingerprint(model.encoder, shape)


def data_fingerprint(dataset: Any) -> str:
    """40 hexadecimal digits of a data set: every name, the size of every image file, and the pixels of 64 images
    spread over it, as they are handed out; arrays held in memory (IDX files) count whole.

    Reading every file would cost as much as encoding. What is not noticed: a file replaced by another of exactly the
    same size that is none of the 64; in an LMDB, whose records have no sizes here, any image that is none of them.
    """
    count = len(dataset)
    digest = hashlib.sha256(json.dumps([count, list(dataset.names)]).encode())
    for name in ("images", "labels"):
        array = getattr(dataset, name, None)
        if isinstance(array, np.ndarray):
            digest.update(np.ascontiguousarray(array))
    digest.update(json.dumps([_bytes(file) for file in getattr(dataset, "_files", ())]).encode())
    for index in np.unique(np.linspace(0, count - 1, min(count, PROBES)).astype(int)):
        try:
            sample = dataset[int(index)]
        except BrokenImage as error:
            digest.update(error.reason.encode("utf-8", "replace"))
        else:
            digest.update(sample.image.contiguous().numpy())
            digest.update(str(sample.label).encode())
    return digest.hexdigest()[:40]


def _bytes(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each dimension of z [N, D], float32 [D], computed in float64.

    Raises UserError for fewer than two rows and for a dimension that never changes: nothing could be normalised by it.
    """
    N = len(z)
    if N < 2:
        raise UserError(f"the latents' standard deviation needs at least 2 images, not {N}")
    mean = torch.stack([part.double().sum(0) for part in z.split(ROWS)]).sum(0) / N
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in z.split(ROWS)]).sum(0)
    std = (squares / (N - 1)).sqrt().float()
    if not bool((std > 0).all()):
        still = int((std <= 0).sum())
        raise UserError(f"{still} of {z.shape[1]} dimensions of z are the same for all {N} images; are they all alike?")
    return mean.float(), std


def encode_all(
    encode: Callable[[Tensor], Tensor],
    dataset: Any,
    batch_size: int,
    on_error: str,
    quiet: bool,
    encoder: str,
    images: str,
) -> Latents:
    """``encode`` of every image of ``dataset``, [B, C, H, W] -> [B, D]; fingerprints and errors as `encode_dataset`."""
    parts: list[Tensor] = []
    names: list[str] = []
    labels: list[int | None] = []
    broken: list[tuple[str, str]] = []
    with tqdm(total=len(dataset), unit="image", unit_scale=True, desc="encode", disable=quiet or None) as bar:
        for batch in stream(dataset, batch_size, on_error, broken):
            z = encode(batch.images)
            if not bool(torch.isfinite(z).all()):
                bad = int((~torch.isfinite(z)).any(dim=1).nonzero()[0])
                raise UserError(f"{batch.names[bad]}: its latent holds NaN or infinite values")
            parts.append(z)
            names += batch.names
            labels += batch.labels
            bar.update(len(z))
    if not parts:
        raise none_read(broken)
    z = torch.cat(parts)
    return Latents(z, names, labels, *statistics(z), encoder, images, broken)


def _read(path: Path, encoder: str, images: str) -> Latents | None:
    """The latents in ``path``; None when they are damaged, or are others: they are then made again."""
    try:
        # Mapped, not read: a large data set's codes need not fit the memory, and loader workers share them.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        own, digest = found.pop("format"), found.pop("digest")
        latents = Latents(**found)
        whole = own == FORMAT and (latents.encoder, latents.images) == (encoder, images)
        return latents if whole and _digest(latents) == digest else None
    except MemoryError:
        raise
    except Exception:  # damaged bytes make the readers of zip files and pickles raise almost anything
        return None


def _digest(latents: Latents) -> str:
    """40 hexadecimal digits of all that ``latents`` are."""
    tensors = {"z": latents.z, "mean": latents.mean, "std": latents.std}
    about = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    about |= {"names": latents.names, "labels": latents.labels, "broken": [list(pair) for pair in latents.broken]}
    digest = hashlib.sha256(json.dumps([about, latents.encoder, latents.images]).encode())
    for tensor in tensors.values():
        for part in tensor.split(ROWS):
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()[:40]


class LatentSet(Dataset):
    """Normalised latents (z - mean) / std, with labels [K, n] where given, as a map-style data set.

    indices: which rows of z; by default all. It hands out whole batches (``__getitems__``): z [B, D] float32, or
    (z, labels) where there are labels.
    """

    def __init__(
        self,
        z: Tensor,
        mean: Tensor,
        std: Tensor,
        indices: Sequence[int] | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self.z, self.mean, self.std, self.labels = z, mean, std, labels
        self.indices = torch.arange(len(z)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if labels is not None and len(labels) != len(self.indices):
            raise ValueError(f"{len(labels)} rows of labels for {len(self.indices)} latents")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, places: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
        places = torch.as_tensor(places, dtype=torch.int64)
        z = (self.z[self.indices[places]] - self.mean) / self.std
        return z if self.labels is None else (z, self.labels[places])


def split(count: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places 0 ... count - 1 as (training, held out), ascending; a function of its arguments alone.

    holdout: the fraction that is held out, in [0, 1); at least one image of each part where it is not 0.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be a fraction in [0, 1), not {holdout}")
    held = min(max(1, round(holdout * count)), count - 1) if holdout else 0
    order = np.random.default_rng((seed, 4)).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
