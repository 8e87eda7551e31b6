"""What the readers hand out: one image, or a batch of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdae_fast.errors import UserError


class Sample(NamedTuple):
    """One image: float32 [C, size, size] in [-1, 1], its name, its class (None where unknown)."""

    image: Tensor
    name: str
    label: int | None


class Batch(NamedTuple):
    """Several images: float32 [B, C, size, size] in [-1, 1], names, classes (None where unknown)."""

    images: Tensor
    names: list[str]
    labels: list[int | None]


class BrokenImage(UserError):
    """An image file that cannot be used. `reason` says why without the path; `str()` is "path: reason"."""

    def __init__(self, path: str | os.PathLike, reason: str = "") -> None:
        # `reason` may be absent: unpickling and data-loader workers rebuild an exception from its text.
        super().__init__(f"{os.fspath(path)}: {reason}" if reason else os.fspath(path))
        self.reason = reason


class Subset:
    """Some images of a data set, in the order of ``indices``; itself a data set."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self.names = [dataset.names[i] for i in indices]
        labels, files = (getattr(dataset, name, None) for name in ("labels", "_files"))
        self.labels = None if labels is None else labels[list(indices)]
        self._files = [] if files is None else [files[i] for i in indices]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a Batch; a `collate_fn` for torch's DataLoader, whose own refuses a None label."""
    images, names, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), list(names), list(labels))
