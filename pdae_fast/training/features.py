"""What a frozen teacher says of a whole data set: computed once, kept on disk, found again only for the same weights,
images and settings. The files are mapped, so that neither writing nor reading them needs memory for all images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from ..cli import write_json
from ..data import stream
from ..data.latents import data_fingerprint, encoder_fingerprint
from ..engine.features import level_shapes
from ..errors import UserError
from ..files import claim_place, clear_unfinished, make_folder, unfinished_name
from ..models import PDAE, Autoencoder, Prior
from ..models.unet import UNet
from ..pipeline import Pipeline
from ..tensors import weights_fingerprint

FORMAT = "pdae_fast-features-1"
ABOUT = "about.json"
TARGETS = ("middle", "decoder", "z", "pixels")
TIMELESS = ("z", "pixels")
BLOCK = 2**24  # bytes of a file that are hashed at a time


@dataclass(frozen=True)
class Target:
    """What of the teacher is learned, at which times. ``kind``: the middle block; that and the last output block of
    each finer side in ``sides`` (decoder); the code z of an autoencoder; or pixels, no teacher but a control, the
    image itself, its blocks of pixels as channels at each of ``sides``. The last two know no time."""

    kind: str
    times: tuple[int, ...]
    sides: tuple[int, ...] = ()
    noised: bool = False
    label: int | None = None
    seed: int = 0

    def check(self, model: Prior | Autoencoder) -> None:
        """UserError where ``model`` does not have it."""
        if self.kind not in TARGETS:
            raise UserError(f"--target {self.kind} is not known; expected {', '.join(TARGETS)}")
        if self.kind == "z" and not isinstance(model, Autoencoder):
            raise UserError("--target z needs an autoencoder (PDAE or Diff-AE), not a prior alone")
        T = model.config.schedule.timesteps
        wrong = [t for t in self.times if not 0 <= t < T]
        if wrong:
            raise UserError(f"the teacher has no time {wrong[0]}; expected whole numbers from 0 to {T - 1}")
        classes = model.config.unet.num_classes
        needed = classes is not None and self.kind not in TIMELESS
        if needed != (self.label is not None) or (needed and not 0 <= self.label < classes):
            expected = f"a class-conditional teacher needs --label K from 0 to {classes - 1}" if needed else (
                "--label is for a class-conditional teacher"
            )  # fmt: skip
            raise UserError(f"{expected}, not {self.label}")

    def shapes(self, model: Prior | Autoencoder) -> list[tuple[int, int, int]]:
        """[C, h, w] of the levels, the deepest first."""
        if self.kind == "z":
            return [(model.config.latent_dim, 1, 1)]
        if self.kind == "pixels":
            channels, size, _ = model.image_shape
            return [(channels * (size // side) ** 2, side, side) for side in sorted(self.sides)]
        every = level_shapes(_unet(model), model.config.image_size)
        return [every[0], *(every[i + 1] for i in self.blocks(model))]

    def blocks(self, model: Prior | Autoencoder) -> list[int]:
        """Places of the output blocks that are read."""
        if self.kind != "decoder":
            return []
        middle, *every = level_shapes(_unet(model), model.config.image_size)
        last = {side: i for i, (_, side, _) in enumerate(every)}
        finer = sorted(side for side in self.sides if side > middle[1] and side in last)
        if not finer:
            sides = ", ".join(map(str, sorted(last)))
            raise UserError(f"the teacher's output blocks have sides {sides}; the student has none of these beyond one")
        return [last[side] for side in finer]


def _unet(model: Prior | Autoencoder) -> UNet:
    return model.decoder if isinstance(model, PDAE) else model.unet


class Features(NamedTuple):
    """``levels``: float16 [N, K, C, h, w] of N images at K times, the deepest first. ``statistics``: of each level mean
    and standard deviation float32 [K, C] over images and places. teacher, images: fingerprints."""

    levels: list[np.ndarray]
    statistics: list[tuple[Tensor, Tensor]]
    teacher: str
    images: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [level.shape[2:] for level in self.levels]

    def of(self, index: int) -> tuple[Tensor, ...]:
        """The levels of one image, each float16 [K, C, h, w]."""
        return tuple(torch.from_numpy(np.array(level[index])) for level in self.levels)


def teacher_fingerprint(model: Prior | Autoencoder, target: Target) -> str:
    """40 hexadecimal digits of the weights that decide the features, and of what is read from them."""
    unet = _unet(model)
    weights = [weights_fingerprint(unet)]
    if target.kind == "z" or unet.z_width:
        weights += [encoder_fingerprint(model)]
    return hashlib.sha256(json.dumps([FORMAT, dataclasses.asdict(target), weights]).encode()).hexdigest()[:40]


def teacher_features(
    model: Prior | Autoencoder,
    dataset: Any,
    target: Target,
    cache: str | os.PathLike,
    *,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    require: bool = False,
    quiet: bool = False,
) -> Features:
    """The levels of ``target`` of every image of ``dataset``, in float32 arithmetic, or from the folder ``cache``.

    A broken image raises BrokenImage. require: UserError instead of computing them. They are written beside their
    place and then renamed; a damaged cache is made again. Raises UserError also for values that are not finite.
    """
    target.check(model)
    shapes = target.shapes(model)
    teacher, images = teacher_fingerprint(model, target), data_fingerprint(dataset)
    path = features_path(cache, teacher, images)
    found = _read(path, teacher, images)
    if found is not None:
        return found
    if require:
        raise UserError(f"{path}: no features of these {len(dataset)} images by this teacher")
    if path.exists():
        print(f"note: {path}: damaged or of an earlier version; made again", file=sys.stderr)
        shutil.rmtree(path, ignore_errors=True)
    make_folder(path.parent)
    clear_unfinished(path.parent)
    claim_place(path)
    pipe = Pipeline(model, device=device, dtype="float32", batch_size=batch_size, label=target.label)
    staging = path.parent / unfinished_name(path.name)
    make_folder(staging)
    try:
        statistics = _compute(pipe, dataset, target, shapes, staging, quiet)
        about = {"format": FORMAT, "teacher": teacher, "images": images, "statistics": statistics}
        write_json(staging / ABOUT, {**about, "digest": _digest(staging, len(shapes), about)})
        os.rename(staging, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _read(path, teacher, images)


def features_path(cache: str | os.PathLike, teacher: str, images: str) -> Path:
    """Where in the folder ``cache`` the features of these two fingerprints are."""
    return Path(cache) / f"features-{hashlib.sha256(f'{teacher} {images}'.encode()).hexdigest()[:20]}"


def _compute(
    pipe: Pipeline, dataset: Any, target: Target, shapes: Sequence[Sequence[int]], folder: Path, quiet: bool
) -> list[list[list[list[float]]]]:
    """Write the levels into ``folder``; returns their statistics."""
    N, K = len(dataset), len(target.times)
    files = [
        np.lib.format.open_memmap(folder / f"{i}.npy", "w+", np.float16, (N, K, *shape))
        for i, shape in enumerate(shapes)
    ]
    sums = [np.zeros((2, K, shape[0])) for shape in shapes]
    first = 0
    with tqdm(total=N * K, unit="image", unit_scale=True, desc="features", disable=quiet or None) as bar:
        for batch in stream(dataset, pipe.batch_size, "fail"):
            rows = slice(first, first + len(batch.images))
            for k, levels in enumerate(_levels(pipe, batch.images, target, range(rows.start, rows.stop))):
                for file, total, level in zip(files, sums, levels, strict=True):
                    half = level.half()
                    if not bool(torch.isfinite(half).all()):
                        raise UserError(f"{batch.names[0]}: features hold NaN or values beyond float16")
                    file[rows, k] = half.numpy()
                    wide = level.double()
                    total[:, k] += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]).numpy()
                bar.update(len(batch.images))
            first = rows.stop
    found = []
    for file, total, shape in zip(files, sums, shapes, strict=True):
        file.flush()
        mean, square = total / (N * shape[1] * shape[2])
        found.append([mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()])
    return found


def _levels(pipe: Pipeline, images: Tensor, target: Target, indices: range) -> Iterator[list[Tensor]]:
    """The levels of one batch at each time."""
    if target.kind == "z":
        yield [pipe.encode(images)[:, :, None, None]]
        return
    if target.kind == "pixels":
        yield [F.pixel_unshuffle(images, images.shape[-1] // side) for side in sorted(target.sides)]
        return
    blocks = target.blocks(pipe.model)
    for t in target.times:
        maps = pipe.features(
            images, t, outputs=max(blocks, default=-1) + 1, noised=target.noised, seed=target.seed, indices=indices
        )
        yield [maps.middle, *(maps.outputs[i] for i in blocks)]


def _read(path: Path, teacher: str, images: str) -> Features | None:
    """The features in ``path``; None where there are none, or damaged or other ones."""
    try:
        about = json.loads((path / ABOUT).read_bytes())
        digest = about.pop("digest")
        known = (about["format"], about["teacher"], about["images"]) == (FORMAT, teacher, images)
        if not known or digest != _digest(path, len(about["statistics"]), about):
            return None
        levels = [np.load(path / f"{i}.npy", mmap_mode="r") for i in range(len(about["statistics"]))]
        statistics = [tuple(torch.tensor(v, dtype=torch.float32) for v in pair) for pair in about["statistics"]]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Features(levels, statistics, teacher, images)


def _digest(folder: Path, levels: int, about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for i in range(levels):
        with open(folder / f"{i}.npy", "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


class FeatureSet(Dataset):
    """Images with their teacher's levels, and for a policy with a labelled image, its levels and its truth.

    Item i is (image, levels) or (image, levels, labelled image, its levels, its truth): image i itself where it has a
    label, else one of those that have. ``truth``: as `recognition.TaskTruth`.
    """

    def __init__(self, dataset: Any, features: Features, truth: Any = None) -> None:
        self.dataset, self.features, self.truth = dataset, features, truth
        self.row = {} if truth is None else {int(index): row for row, index in enumerate(truth.indices)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        seen = self.dataset[index].image, self.features.of(index)
        if self.truth is None:
            return seen
        row = self.row.get(index, index % len(self.truth.indices))
        labelled = int(self.truth.indices[row])
        return *seen, self.dataset[labelled].image, self.features.of(labelled), self.truth.values[row]
