"""IDX files and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod

import numpy as np

from pdae_fast.data.preprocess import check_target, to_tensor
from pdae_fast.data.sample import Sample
from pdae_fast.errors import UserError

# Where the Debian package dataset-fashion-mnist puts it.
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_PREFIX = {"train": "train", "test": "t10k"}
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class FashionMNIST:
    """Fashion-MNIST (or any data set in its files, such as MNIST) as a map-style dataset.

    root: the folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, each with or without `.gz`; by default where Debian installs it.
    train: the 60,000 training images, else the 10,000 test images.
    size: at least that of the images, 28, which are centred on a black (-1) square and never resized; an odd
    remainder goes to the bottom and right.
    channels: 1, or 3 for the grey value repeated.

    `dataset[i]` is a Sample named like "test-00012" with the class number (see FASHION_CLASSES), or label
    None when the folder has no label file. The arrays stay uint8 in memory: `images` [N, H, W] and
    `labels` [N] or None.
    Raises UserError for missing or damaged files and for a smaller size.
    """

    def __init__(
        self, root: str | os.PathLike | None = None, train: bool = False, size: int = 32, channels: int = 1
    ) -> None:
        check_target(size, channels)
        root = FASHION_ROOT if root is None else os.fspath(root)
        split = "train" if train else "test"
        path = find_idx(root, split, "images")
        if path is None:
            raise UserError(
                f"no Fashion-MNIST in {root}: expected {_PREFIX[split]}-images-idx3-ubyte[.gz] "
                "(Debian package dataset-fashion-mnist)"
            )
        self.images = read_idx(path)
        if self.images.ndim != 3 or self.images.dtype != np.uint8 or 0 in self.images.shape:
            raise UserError(f"{path}: expected bytes [N, H, W], not {_describe(self.images)}")
        height, width = self.images.shape[1:]
        if size < max(height, width):
            raise UserError(f"size must be at least {max(height, width)} for the images in {root}, not {size}")
        self.labels = None
        labels_path = find_idx(root, split, "labels")
        if labels_path is not None:
            self.labels = read_idx(labels_path)
            if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.uint8:
                raise UserError(
                    f"{labels_path}: expected {len(self.images)} bytes, one label an image, "
                    f"not {_describe(self.labels)}"
                )
        self.size = size
        self.channels = channels
        top, left = (size - height) // 2, (size - width) // 2
        self._window = np.s_[top : top + height, left : left + width]
        self.names = [f"{split}-{i:05d}" for i in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        canvas = np.zeros((self.size, self.size), np.uint8)  # 0 becomes -1
        canvas[self._window] = self.images[index]
        image = to_tensor(canvas)
        if self.channels == 3:
            image = image.repeat(3, 1, 1)
        label = None if self.labels is None else int(self.labels[index])
        return Sample(image, self.names[index], label)


def find_idx(root: str | os.PathLike, split: str, what: str) -> str | None:
    """The path of the IDX file for split "train" or "test" and what "images" or "labels", or None."""
    stem = f"{_PREFIX[split]}-{what}-idx{3 if what == 'images' else 1}-ubyte"
    candidates = (os.path.join(root, stem + end) for end in ("", ".gz"))
    return next(filter(os.path.isfile, candidates), None)


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read an IDX file, gzip-compressed or not, as an array in the machine's byte order.

    Raises UserError naming the file when it is missing, is not IDX, or holds less or more than its header
    says.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            return _parse_idx(path, file)
    except EOFError as error:
        raise UserError(f"{path}: the gzip stream is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip stream is damaged ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _parse_idx(path: str, file) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] == 0:
        raise UserError(f"{path}: not an IDX file (starts with {magic.hex(' ') or 'nothing'})")
    dtype, ndim = np.dtype(_IDX_TYPES[magic[2]]), magic[3]
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise UserError(f"{path}: truncated in the header")
    shape = struct.unpack(f">{ndim}I", header)
    expected = prod(shape) * dtype.itemsize
    # In pieces: a damaged header may promise more than memory holds.
    content = bytearray()
    while len(content) <= expected and (piece := file.read(min(1 << 20, expected + 1 - len(content)))):
        content += piece
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise UserError(f"{path}: {problem}, expected {expected} bytes for shape {list(shape)}")
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
