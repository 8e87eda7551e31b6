"""From what a user types to a dataset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import cache

from pdae_fast.config import CROPS, PDAEConfig, PriorConfig
from pdae_fast.data.avatars import is_avatars
from pdae_fast.data.bundled import PREFIX, bundled_path
from pdae_fast.data.folder import ImageFiles
from pdae_fast.data.idx import FashionMNIST, find_idx
from pdae_fast.data.lmdb_images import LMDBImages
from pdae_fast.data.preprocess import ALIGNED, EXTENSIONS, WHITE
from pdae_fast.errors import UserError

CHOICES = (
    f"expected image files or folders ({' '.join(EXTENSIONS)}), a folder of MNIST-style IDX files, "
    "'fashion-mnist', 'fashion-mnist:DIR', 'bundled:fashion', 'bundled:avatars', or an LMDB of "
    "images ('lmdb:DIR' or 'lmdb:DIR:SIZE')"
)


def open_dataset(
    spec: str | os.PathLike | Sequence[str | os.PathLike],
    size: int,
    channels: int = 3,
    split: str = "train",
    *,
    background: Sequence[int] = WHITE,
    recursive: bool = True,
    crop: str | None = None,
    without: str | os.PathLike | None = None,
) -> ImageFiles | FashionMNIST | LMDBImages:
    """Open the data that `spec` names, as [channels, size, size] images in [-1, 1].

    spec: "fashion-mnist" (the installed Debian package), "fashion-mnist:DIR", "bundled:NAME" (see `bundled_path`), a
    folder that holds MNIST-style IDX files, an LMDB as "lmdb:DIR" or "lmdb:DIR:SIZE" (SIZE as in Diff-AE's keys) or
    a folder that holds `data.mdb`, or an image file, a folder, or a list of both. Of a folder of avatars the images
    are read, not the masks and pairs. The words win over a folder of the same name, which can be given as
    "./fashion-mnist".
    split: "train" or "test"; a data set without splits (image files) is used whole either way.
    background, recursive, crop, without: for image files, see `ImageFiles`. Where no crop is given and the first image
    has the size of CelebA's aligned ones, a line on stderr says what is read of them.
    Raises UserError for anything else, naming what was not understood and the choices.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}; expected 'train' or 'test'")
    specs = [os.fspath(path) for path in ([spec] if isinstance(spec, (str, os.PathLike)) else spec)]
    specs = [bundled_path(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path for path in specs]
    if not specs or "" in specs:
        raise UserError(f"no input was given; {CHOICES}")
    for path in specs:
        name, _, folder = path.partition(":")
        is_named = name == "fashion-mnist"
        if is_named or _holds_idx(path):
            if len(specs) > 1:
                raise UserError(f"{path} cannot be combined with other inputs")
            root = (folder or None) if is_named else path
            return FashionMNIST(root, split == "train", size, channels)
        if name == "lmdb" or _is_lmdb(path):
            if len(specs) > 1:
                raise UserError(f"{path} cannot be combined with other inputs")
            root, stored = _split_stored(folder) if name == "lmdb" else (path, None)
            if not root:
                raise UserError(f"no folder in {path!r}; expected 'lmdb:DIR' or 'lmdb:DIR:SIZE'")
            return _noted(LMDBImages(root, size, channels, background, stored, crop or "centre"), crop)
        if not os.path.exists(path):
            raise UserError(f"no such input: {path}; {CHOICES}")
    specs = [os.path.join(path, "images") if is_avatars(path) else path for path in specs]
    return _noted(ImageFiles(specs, size, channels, background, recursive, crop or "centre", without), crop)


def crop_for(asked: str | None, config: PriorConfig | PDAEConfig) -> str | None:
    """What --crop says, else the configuration of the model; None where neither says more than the default."""
    return asked or (config.crop if config.crop != CROPS[0] else None)


def add_crop(p: argparse.ArgumentParser) -> None:
    """The option --crop, of every command that reads images (see `crop_for`)."""
    p.add_argument(
        "--crop",
        choices=CROPS,
        help="of images: the centre square, or that of aligned CelebA (default: the model's, else centre)",
    )


def _noted(dataset: ImageFiles | LMDBImages, crop: str | None) -> ImageFiles | LMDBImages:
    if crop is None and dataset.first_size() == ALIGNED:
        _note()
    return dataset


@cache
def _note() -> None:
    """Once in a process, which may open its data several times."""
    print(
        "note: images of 178 x 218 pixels, as CelebA's aligned ones: their centre square is read. Published CelebA-64 "
        "models take --crop celeba; --crop centre leaves out this note",
        file=sys.stderr,
    )


def _is_lmdb(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "data.mdb"))


def _split_stored(folder: str) -> tuple[str, str | None]:
    """DIR and SIZE of "DIR:SIZE"; a colon before anything else belongs to DIR."""
    root, _, stored = folder.rpartition(":")
    return (root, stored) if root and (stored.isdigit() or stored == "None") else (folder, None)


def _holds_idx(path: str) -> bool:
    return any(find_idx(path, split, "images") for split in ("train", "test"))
