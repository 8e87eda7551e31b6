"""What a folder of avatars knows exactly about its images beside attributes: the part of every pixel, and landmarks."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pdae_fast.data.avatars import MANIFEST, read_manifest
from pdae_fast.data.bundled import PREFIX, bundled_path
from pdae_fast.errors import UserError


class Truth(NamedTuple):
    """``values`` of N images, row for row; ``names`` of what the values are (parts, or points), and ``size``, the
    pixels of an image's side that they are measured in."""

    values: np.ndarray
    names: tuple[str, ...]
    size: int


def read_parts(folder: str | os.PathLike, names: Sequence[str]) -> Truth:
    """The part that each pixel of the images ``names`` shows: uint8 [N, size, size], places in ``names`` of the result.

    folder: written by `make_avatars`, or "bundled:avatars". names: those of a data set of its images, with or without
    ".png". UserError for another folder, and for a mask that is missing, unreadable, of another size or of parts that
    the folder does not know.
    """
    folder, parts, _, size = _opened(folder)
    masks = np.empty((len(names), size, size), np.uint8)
    for mask, name in zip(masks, names, strict=True):
        path = os.path.join(folder, "masks", _file(name))
        try:
            with Image.open(path) as picture:
                if picture.mode not in ("P", "L") or picture.size != (size, size):
                    width, height = picture.size
                    raise UserError(f"{path}: {width} x {height} pixels of mode {picture.mode}, not a mask of {size}")
                mask[:] = np.asarray(picture)
        except FileNotFoundError:
            raise UserError(f"{path}: no such mask, though {name} is an image of {folder}") from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: not a readable mask ({error})") from None
        if mask.max() >= len(parts):
            raise UserError(f"{path}: part {mask.max()}; {MANIFEST} names 0 to {len(parts) - 1}")
    return Truth(masks, parts, size)


def read_landmarks(folder: str | os.PathLike, names: Sequence[str]) -> Truth:
    """The landmarks of the images ``names``: float32 [N, points, 2], x right and y down in pixels from the outer corner
    of the first pixel, hidden or not. folder, names: as in `read_parts`; UserError for what cannot be used."""
    folder, _, points, size = _opened(folder)
    path = os.path.join(folder, "landmarks.csv")
    columns = [f"{point}_{axis}" for point in points for axis in "xy"]
    wanted, found = {_file(name) for name in names}, {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["image"] in wanted:
                    found[row["image"]] = [float(row[column]) for column in columns]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be used: {error!r}") from None
    missing = [name for name in names if _file(name) not in found]
    if missing:
        raise UserError(f"{path}: no row for {missing[0]} ({len(missing)} of {len(names)} images have none)")
    values = np.array([found[_file(name)] for name in names], np.float32).reshape(len(names), len(points), 2)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: landmarks that are not finite numbers")
    return Truth(values, points, size)


def _file(name: str) -> str:
    return name if name.endswith(".png") else name + ".png"


def _opened(folder: str | os.PathLike) -> tuple[str, tuple[str, ...], tuple[str, ...], int]:
    """The folder, its parts, its landmarks and the side of its images, as its manifest has them."""
    folder = os.fspath(folder)
    folder = bundled_path(folder.removeprefix(PREFIX)) if folder.startswith(PREFIX) else folder
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: not a folder of avatars (no {MANIFEST} of theirs), so no parts and no landmarks")
    lists = [manifest.get("parts"), manifest.get("landmarks")]
    size = manifest.get("size")
    words = all(isinstance(v, list) and v and all(isinstance(word, str) for word in v) for v in lists)
    if not words or type(size) is not int or size < 1:
        raise UserError(f"{os.path.join(folder, MANIFEST)}: names no parts, landmarks or size")
    return folder, tuple(lists[0]), tuple(lists[1]), size
