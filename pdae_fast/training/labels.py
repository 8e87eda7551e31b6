"""What the attribute classifier learns: labels for the images of a set of latents, and which of them are held out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
import torch

from ..data import Labels, labels_for
from ..errors import UserError
from .latents import Latents

_LMDB_NAME = re.compile(r"(?:\d+|None)-(\d+)")


def file_labels(names: Sequence[str], path: str | os.PathLike, columns: Sequence[str] | None = None) -> Labels:
    """Labels of the images ``names`` from an attribute file (see `pdae_fast.data.labels_for`).

    Images of a Diff-AE LMDB have numbers for names: number i is looked up as CelebA's image i + 1 in six digits, then
    as CelebA-HQ's image i, which is how Diff-AE's conversion scripts number them.
    """
    numbers = [_LMDB_NAME.fullmatch(name) for name in names]
    if not all(numbers):
        return labels_for(names, path, columns)
    indices = [int(number[1]) for number in numbers]
    for renamed in (names, [f"{i + 1:06d}" for i in indices], [str(i) for i in indices]):
        try:
            found = labels_for(renamed, path, columns)
        except UserError as error:
            if "has no row for any image" not in str(error):
                raise
            failure = error
        else:
            own = dict(zip(renamed, names, strict=True))
            return found._replace(missing=[own[name] for name in found.missing])
    raise failure


def class_labels(latents: Latents, class_names: Sequence[str]) -> Labels:
    """One attribute for each class of the data set, called ``class_names[class]``: one of them is 1 for each image."""
    indices = [i for i, label in enumerate(latents.labels) if label is not None]
    if not indices:
        raise UserError("these images have no classes: give --attributes FILE (CelebA's list or a CSV file)")
    classes = torch.tensor([latents.labels[i] for i in indices])
    present = classes.unique().tolist()
    values = (classes[:, None] == torch.tensor(present)).to(torch.uint8)
    missing = [name for name, label in zip(latents.names, latents.labels, strict=True) if label is None]
    return Labels(values, [class_names[c] for c in present], indices, missing, [])


def split(count: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places 0 ... count - 1 as (training, held out), ascending; a function of its arguments alone.

    holdout: the fraction that is held out, in [0, 1); at least one image of each part where it is not 0.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be a fraction in [0, 1), not {holdout}")
    held = min(max(1, round(holdout * count)), count - 1) if holdout else 0
    order = np.random.default_rng((seed, 4)).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
