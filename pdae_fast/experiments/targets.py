"""What is known about the images of a data set: classes or attributes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.attributes import class_names, file_labels
from ..data.avatars import is_avatars
from ..data.bundled import PREFIX, bundled_path
from ..errors import UserError


class Targets(NamedTuple):
    """Labels of a data set's images, of one of two kinds.

    "classes": ``values`` int64 [K], each a place in ``names``. "attributes": ``values`` uint8 [K, len(names)], 1 for
    positive. ``indices`` int64 [K]: the images of the data set that have labels, ascending.
    """

    kind: str
    names: list[str]
    values: np.ndarray
    indices: np.ndarray

    def of(self, row: int) -> str:
        """The labels of one image in words."""
        if self.kind == "classes":
            return self.names[int(self.values[row])]
        return ", ".join(name for name, v in zip(self.names, self.values[row], strict=True) if v) or "none"

    def positive(self, name: str) -> np.ndarray:
        """bool [K]: which images are of the class, or have the attribute, ``name``; UserError naming the choices."""
        if name not in self.names:
            what = "class" if self.kind == "classes" else "attribute"
            raise UserError(f"no {what} {name!r}; there are {', '.join(self.names)}")
        place = self.names.index(name)
        return self.values == place if self.kind == "classes" else self.values[:, place] > 0


def find_targets(args: argparse.Namespace, spec: Sequence[str], dataset: Any) -> Targets:
    """What is known about the images: --attributes, else the classes of the data set, else an avatar folder's table.

    Raises UserError, with the ways to give labels, where there are none.
    """
    table = args.attributes
    labels = getattr(dataset, "labels", None)
    if table is None and labels is not None:
        if args.columns:
            raise UserError("--columns names attributes; this data has classes")
        values = np.asarray(labels, dtype=np.int64)
        return Targets("classes", class_names(spec, int(values.max()) + 1), values, np.arange(len(values)))
    if table is None and len(spec) == 1:
        folder = bundled_path(spec[0].removeprefix(PREFIX)) if spec[0].startswith(PREFIX) else spec[0]
        if is_avatars(folder):
            table = os.path.join(folder, "attributes.csv")
    if table is None:
        raise UserError(
            "these images have no labels: give --attributes FILE (CelebA's list or a CSV file), or as --input "
            f"fashion-mnist, a folder of IDX files, a folder of avatars, {PREFIX}fashion or {PREFIX}avatars"
        )
    found = file_labels(dataset.names, table, args.columns)
    return Targets("attributes", found.columns, found.values.numpy(), np.asarray(found.indices, dtype=np.int64))
