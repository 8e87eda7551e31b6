"""Labels of the images that a class-conditional prior is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.attributes import file_labels
from ..errors import UserError

WAYS = (
    "a folder with one subfolder for each class, IDX files with labels, --attributes FILE with one column for each "
    "class, or --label K for all"
)


class ImageLabels(NamedTuple):
    """values: int64 [N], of every image of a data set. source: in words where they come from."""

    values: Tensor
    source: str

    @property
    def record(self) -> dict[str, str]:
        """What a resumed run must find the same."""
        return {"class labels": hashlib.sha256(self.values.numpy()).hexdigest()[:40]}


def image_labels(
    dataset: Any,
    classes: int,
    label: int | None = None,
    attributes: str | None = None,
    columns: Sequence[str] | None = None,
) -> ImageLabels:
    """Labels from 0 to ``classes`` - 1: ``label`` for all images; or the places of the ``columns`` that are positive in
    the file ``attributes``; or those that the data set has; or its first subfolders.

    Subfolders called by numbers are these classes; others are numbered in alphabetical order, as torchvision's
    ImageFolder does. Raises UserError for labels that are missing, out of range or not one for each image.
    """
    if label is not None:
        values, source = [label] * len(dataset), f"{label} for all images (--label)"
    elif attributes is not None:
        values, source = _of_file(dataset.names, classes, attributes, columns)
    elif getattr(dataset, "labels", None) is not None:
        values, source = dataset.labels.tolist(), "those of the data set"
    else:
        values, source = _of_subfolders(dataset.names, classes)
    for name, value in zip(dataset.names, values, strict=True):
        if not 0 <= value < classes:
            raise UserError(f"{name} has label {value}; this prior knows classes 0 to {classes - 1}")
    return ImageLabels(torch.tensor(values, dtype=torch.int64), source)


def _of_file(names: Sequence[str], classes: int, path: str, columns: Sequence[str] | None) -> tuple[list[int], str]:
    found = file_labels(names, path, columns)
    if len(found.columns) != classes:
        raise UserError(f"{path}: {len(found.columns)} columns for the {classes} classes of this prior; see --columns")
    if found.missing:
        raise UserError(f"{path}: {found.report()}; a class-conditional prior needs a label for every image")
    for row, index in zip(found.values, found.indices, strict=True):
        if int(row.sum()) != 1:
            raise UserError(
                f"{path}: {names[index]} has {int(row.sum())} of the {len(found.columns)} columns positive; expected "
                "one, its class"
            )
    return found.values.argmax(1).tolist(), f"the columns {', '.join(found.columns)} of {path}"


def _of_subfolders(names: Sequence[str], classes: int) -> tuple[list[int], str]:
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in folders:
        raise UserError(f"this prior knows {classes} classes and these images have no labels: give {WAYS}")
    known = sorted(set(folders))
    if all(folder.isdecimal() for folder in known):
        return [int(folder) for folder in folders], f"{len(known)} subfolders, called by their numbers"
    if len(known) != classes:
        raise UserError(
            f"{len(known)} subfolders ({known[0]} ...) for the {classes} classes of this prior: call them by the "
            "numbers of their classes"
        )
    place = {folder: i for i, folder in enumerate(known)}
    return [place[folder] for folder in folders], f"{len(known)} subfolders in alphabetical order"
