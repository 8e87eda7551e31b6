"""Nearest neighbours of images by their features, and how much they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..plots import chart
from .linear import FeatureSet
from .targets import Targets

GOOD, BAD = "#007a4d", "#b3261e"


def check(k: int, count: int) -> None:
    """UserError unless ``count`` training images have ``k`` that are nearest."""
    if not 1 <= k <= count:
        raise UserError(f"the number of neighbours must be from 1 to {count}, not {k}")


def neighbours(features: FeatureSet, k: int) -> np.ndarray:
    """Places [M, k] of the ``k`` training images nearest to each test image (Euclidean), nearest first."""
    from sklearn.neighbors import NearestNeighbors

    check(k, len(features.train))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features.train)
    return search.kneighbors(features.test, return_distance=False)


def agreement(found: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """How much the neighbours [M, k] agree with their query, float64 [M]: the share of them in its class (precision at
    k), or for attributes [., A] the mean share of attributes that are equal."""
    same = train[found] == (test[:, None] if test.ndim == 1 else test[:, None, :])
    return same.reshape(len(found), -1).mean(axis=1)


def chance(train: np.ndarray, test: np.ndarray) -> float:
    """`agreement` of neighbours drawn at random."""
    if train.ndim == 1:
        count = max(train.max(), test.max()) + 1
        return float((np.bincount(train, minlength=count) / len(train))[test].mean())
    rate = (train > 0).mean(axis=0)
    return float(np.where(test > 0, rate, 1 - rate).mean())


def picture(
    path: Path,
    queries: np.ndarray,
    rows: list[tuple[str, np.ndarray]],
    train: np.ndarray,
    test: np.ndarray,
    targets: tuple[Targets, Targets],
) -> None:
    """Queries at the left of their neighbours, a line of images for each of ``rows`` = (name, places [M, k]).

    queries: places in test. train, test: images [., C, H, W] in [-1, 1]. targets: of both, row for row. Classes are
    written above the images, green where they agree; for attributes, how many of them agree.
    """
    k = rows[0][1].shape[1]
    known, asked = targets
    lines = [(query, name, found[query]) for query in queries for name, found in rows]
    with chart(path, 0.85 * (k + 1) + 1.1, 0.98 * len(lines), len(lines), k + 1, squeeze=False) as axes:
        for line, (query, name, found) in enumerate(lines):
            shown = [(test[query], _name(asked, query) if line % len(rows) == 0 else "", "black")]
            shown += [(train[place], *_verdict(known, place, asked, query)) for place in found]
            if line % len(rows):
                shown[0] = (np.ones_like(test[query]), "", "black")  # the query stands once
            for column, (image, words, colour) in enumerate(shown):
                _tile(axes[line, column], image, words, colour)
            axes[line, 1].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)


def _name(targets: Targets, row: int) -> str:
    return targets.names[int(targets.values[row])] if targets.kind == "classes" else "query"


def _verdict(known: Targets, place: int, asked: Targets, query: int) -> tuple[str, str]:
    if known.kind == "classes":
        same = known.values[place] == asked.values[query]
        return _name(known, place), GOOD if same else BAD
    equal = int((known.values[place] == asked.values[query]).sum())
    return f"{equal}/{len(known.names)}", GOOD if equal == len(known.names) else "black"


def _tile(axes: Any, image: np.ndarray, words: str, colour: str) -> None:
    pixels = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
    axes.imshow(
        pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_title(words, color=colour, fontsize=7, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
