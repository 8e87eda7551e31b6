"""What is known about images: attribute tables (CelebA's and CelebAMask-HQ's text files, CSV files) and class names."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdae_fast.data.bundled import PREFIX
from pdae_fast.data.idx import FASHION_CLASSES
from pdae_fast.data.preprocess import EXTENSIONS
from pdae_fast.errors import UserError

EXPECTED = "expected CelebA's text format (the number of images, the attributes, then rows) or a CSV file"
_LMDB_NAME = re.compile(r"(?:[0-9]+|None)-([0-9]{1,18})")
_COUNT = re.compile(r"[0-9]{1,18}")


class Attributes(NamedTuple):
    """An attribute table: images without their extension, attribute names, and uint8 [images, attributes]
    (1: positive)."""

    images: list[str]
    columns: list[str]
    values: np.ndarray


class Labels(NamedTuple):
    """Labels of a dataset's images.

    values: uint8 [K, attributes], 1 for positive. columns: names of the attributes.
    indices: the K places in the dataset that have a row, ascending; `Subset(dataset, labels.indices)` goes with
    `values`. missing: names of the dataset's images without a row. extra: images of the table that are not in
    the dataset.
    """

    values: Tensor
    columns: list[str]
    indices: list[int]
    missing: list[str]
    extra: list[str]

    def report(self) -> str:
        """One line about missing and extra images; empty when all fits."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} images have no attributes ({_some(self.missing)})")
        if self.extra:
            parts.append(f"{len(self.extra)} rows have no image ({_some(self.extra)})")
        return "; ".join(parts)


def read_attributes(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Attributes:
    """Read `list_attr_celeba.txt`, `CelebAMask-HQ-attribute-anno.txt`, or a CSV file with a header whose first
    column names the image (the avatars' `attributes.csv`, Kaggle's `list_attr_celeba.csv`).

    A value above 0 is positive, anything else (-1, 0) negative.
    columns: attributes to read, in this order; by default every column of numbers. A column of words (a category)
    may be named as "hair_color=black" or "mouth=smile+tongue" (either of them), one attribute, or as "hair_color",
    one attribute for each of its values in alphabetical order.
    Raises UserError naming the file, and the line where there is one, for anything else: a wrong number of rows or
    values, an image twice, an unknown column; in a column that is read, an empty cell, and NaN or infinity among
    numbers.
    """
    path = os.fspath(path)
    header, _ = _header(path)
    values: list[dict[str, int]] = [{} for _ in header]  # the line where each first is
    images: list[str] = []
    seen: set[str] = set()
    for number, image, row in _rows(path):
        if image in seen:
            raise UserError(f"{path}, line {number}: the image {image} a second time")
        seen.add(image)
        images.append(image)
        for found, value in zip(values, row, strict=True):
            found.setdefault(value.strip(), number)
    if not images:
        raise UserError(f"{path}: no images; {EXPECTED}")
    names, chosen = _choose(path, header, values, columns)
    content = bytearray()
    for _, _, row in _rows(path):  # again: a million rows of words would not fit where their flags do
        content += bytes([flags[row[place].strip()] for place, flags in chosen])
    flags = np.frombuffer(content, np.uint8).reshape(len(images), len(names))
    return Attributes(images, names, flags)


def labels_for(
    names: Sequence[str], path: str | os.PathLike, columns: Sequence[str] | None = None, allow_missing: bool = True
) -> Labels:
    """The labels of images called `names` (a dataset's `names`) from the attribute file `path`.

    Names are compared without image extensions: a row "000001.jpg" belongs to an image read from 000001.png. A name
    with folders that has no row of its own is looked up by its last part.
    columns: see `read_attributes`. allow_missing: whether images without a row are left out, else an error.
    Raises UserError for an unusable file, when no image has a row, and when two images would share one.
    """
    table = read_attributes(path, columns)
    place = {image: i for i, image in enumerate(table.images)}
    rows: list[int] = []
    indices: list[int] = []
    missing: list[str] = []
    for i, name in enumerate(names):
        stem = _stem(name)
        row = place.get(stem)
        if row is None:
            row = place.get(stem.rpartition("/")[2])
        if row is None:
            missing.append(name)
        else:
            rows.append(row)
            indices.append(i)
    if not rows:
        first = names[0] if len(names) else "none"
        raise UserError(f"{os.fspath(path)} has no row for any image: they are called {first} ..., its rows "
                        f"{table.images[0]} ...")  # fmt: skip
    used = Counter(rows)
    if len(used) != len(rows):
        row = used.most_common(1)[0][0]
        twice = [names[indices[k]] for k, r in enumerate(rows) if r == row]
        raise UserError(f"{os.fspath(path)}: the row {table.images[row]} fits several images ({_some(twice)})")
    if missing and not allow_missing:
        raise UserError(f"{os.fspath(path)}: {len(missing)} images have no row ({_some(missing)})")
    extra = [image for i, image in enumerate(table.images) if i not in used]
    return Labels(torch.from_numpy(table.values[rows]), table.columns, indices, missing, extra)


def file_labels(names: Sequence[str], path: str | os.PathLike, columns: Sequence[str] | None = None) -> Labels:
    """Labels of the images ``names`` from an attribute file (see `labels_for`).

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


def class_names(spec: Sequence[str], count: int) -> list[str]:
    """Names of the classes: Fashion-MNIST's where the data says that it is that, else numbers."""
    word = os.path.basename(os.path.abspath(spec[0])) if spec else ""
    named = word.startswith("fashion") or (spec and spec[0].startswith(("fashion-mnist", f"{PREFIX}fashion")))
    if named and count <= len(FASHION_CLASSES):
        return list(FASHION_CLASSES)
    return [str(number) for number in range(count)]


def _stem(name: str) -> str:
    stem, end = os.path.splitext(name)
    return stem if end.lower() in EXTENSIONS else name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _header(path: str) -> tuple[list[str], int | None]:
    """Column names without the image's, and the announced number of images in CelebA's format (None: CSV)."""
    with _open(path) as file:
        lines = _lines(path, file)
        first = next(lines, "").strip()
        if _COUNT.fullmatch(first):
            header, count = next(lines, "").split(), int(first)
        elif "," in first:
            try:
                header, count = next(csv.reader([first.removeprefix("\ufeff")]))[1:], None
            except csv.Error as error:
                raise UserError(f"{path}, line 1: {error}; {EXPECTED}") from error
        else:
            raise UserError(f"{path}: starts with {first[:40]!r}; {EXPECTED}")
    twice = [name for name, times in Counter(header).items() if times > 1]
    if not header or twice:
        raise UserError(f"{path}: {f'two columns {twice[0]}' if twice else 'no attributes'}; {EXPECTED}")
    return header, count


def _rows(path: str) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, image without extension, and values of each row."""
    header, count = _header(path)
    done = 0
    with _open(path) as file:
        lines = _lines(path, file)
        split = csv.reader(lines, strict=True) if count is None else (line.split() for line in lines)
        start = 1 if count is None else 2
        try:
            for number, cells in enumerate(split, 1):
                if number <= start or not cells:
                    continue
                if len(cells) != len(header) + 1:
                    raise UserError(
                        f"{path}, line {number}: {len(cells) - 1} values, expected {len(header)} after the image's name"
                    )
                done += 1
                yield number, _stem(cells[0]), cells[1:]
        except csv.Error as error:
            raise UserError(f"{path}, line {number + 1}: {error}") from error
    if count is not None and done != count:
        raise UserError(f"{path}: {done} rows, but its first line says {count}")


def _choose(
    path: str, header: list[str], values: list[dict[str, int]], columns: Sequence[str] | None
) -> tuple[list[str], list[tuple[int, dict[str, int]]]]:
    """Names of the attributes and, for each, its place in a row and the flag of every value."""
    numbers = [_numeric(found) for found in values]
    if columns is None:
        columns = [name for name, numeric in zip(header, numbers, strict=True) if numeric]
        if not columns:
            raise UserError(f"{path}: no column holds numbers; name the columns to use: {_some(header)}")
    names, chosen = [], []
    for column in columns:
        name, _, value = column.partition("=")
        if column in header and numbers[header.index(column)]:
            place = header.index(column)
            names.append(column)
            chosen.append((place, _flags(path, column, values[place])))
            continue
        known = values[header.index(name)] if name in header else {}
        words = [value] if value in known else value.split("+")
        if name not in header or (value and not known.keys() >= set(words)):
            raise UserError(f"{path}: no attribute {column}; there are {', '.join(sorted(known) or header)}")
        if "" in known:
            raise UserError(f"{path}, line {known['']}: no {name}; expected a word in every row")
        place = header.index(name)
        for group in [words] if value else [[word] for word in sorted(known)]:
            names.append(f"{name}={'+'.join(group)}")
            chosen.append((place, {word: int(word in group) for word in known}))
    return names, chosen


def _numeric(values: Iterable[str]) -> bool:
    """Whether a column is one of numbers, if with gaps, and not one of words."""
    known = [_number(value) for value in values if value]
    return None not in known and any(map(math.isfinite, known))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _flags(path: str, name: str, values: dict[str, int]) -> dict[str, int]:
    """The flag of each value of a column of numbers."""
    for value, line in values.items():
        if not value or not math.isfinite(float(value)):
            found = f"is {value[:20]}" if value else "has no value"
            raise UserError(f"{path}, line {line}: {name} {found}; expected a number in every row")
    return {value: int(float(value) > 0) for value in values}


def _open(path: str):
    try:
        return open(path, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _lines(path: str, file) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; {EXPECTED}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
