"""From what a user types to a dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pdae_fast.data.folder import ImageFiles
from pdae_fast.data.idx import FashionMNIST, find_idx
from pdae_fast.data.preprocess import EXTENSIONS, WHITE
from pdae_fast.errors import UserError

CHOICES = (
    f"expected image files or folders ({' '.join(EXTENSIONS)}), a folder of MNIST-style IDX files, "
    "'fashion-mnist', or 'fashion-mnist:DIR'"
)


def open_dataset(
    spec: str | os.PathLike | Sequence[str | os.PathLike],
    size: int,
    channels: int = 3,
    split: str = "train",
    *,
    background: Sequence[int] = WHITE,
    recursive: bool = True,
) -> ImageFiles | FashionMNIST:
    """Open the data that `spec` names, as [channels, size, size] images in [-1, 1].

    spec: "fashion-mnist" (the installed Debian package), "fashion-mnist:DIR", a folder that holds MNIST-style
    IDX files, or an image file, a folder, or a list of both. The words win over a folder of the same name,
    which can be given as "./fashion-mnist".
    split: "train" or "test"; a data set without splits (image files) is used whole either way.
    background, recursive: for image files, see `ImageFiles`.
    Raises UserError for anything else, naming what was not understood and the choices.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}; expected 'train' or 'test'")
    specs = [os.fspath(path) for path in ([spec] if isinstance(spec, (str, os.PathLike)) else spec)]
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
        if not os.path.exists(path):
            raise UserError(f"no such input: {path}; {CHOICES}")
    return ImageFiles(specs, size, channels, background, recursive)


def _holds_idx(path: str) -> bool:
    return any(find_idx(path, split, "images") for split in ("train", "test"))
