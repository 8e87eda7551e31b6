"""The labelled images of a data set with their z, divided into those to learn from and those to test on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.latents import encode_dataset, split
from ..data.stream import readable
from ..errors import UserError
from ..models import Prior
from . import common
from .targets import Targets, find_targets

FEWEST = 8  # labelled images

Check = Callable[[Targets], object]


class Side(NamedTuple):
    """The labelled images of one side: K names, z [K, D] (D is 0 of a prior alone), images [K, C, H, W], and the
    targets of the same K rows."""

    names: list[str]
    z: np.ndarray
    images: np.ndarray
    targets: Targets


def find_parts(
    run: common.Run, cache: Path, holdout: float, test: Sequence[str] = (), check: Check | None = None
) -> tuple[Side, Side, str]:
    """Training and test images of ``run``, and how they were divided, in words: ``test`` (data as --input names it) is
    tested on, else the data set's own test files, else ``holdout`` of the images, drawn by the seed. z comes from
    ``cache`` (see `encode_dataset`).

    All that can be wrong with the labels is said before an image is encoded. ``check`` may add to that: it is given the
    targets of the images to learn from (with those of ``holdout`` among them) and raises UserError.
    """
    sides, how = _sides(run, holdout, test)
    known = [_targets(run.args, *side) for side in sides]
    if test:
        words, other = (f"{targets.kind} {', '.join(targets.names)}" for targets in known)
        if words != other:
            raise UserError(f"--input has {words}; --test has {other}; expected the same of both")
    if check is not None:
        check(known[0])
    parts = [_part(run, dataset, targets, cache) for (dataset, _), targets in zip(sides, known, strict=True)]
    if len(parts) == 1:
        places = split(len(parts[0].z), holdout, run.args.seed)
        parts = [_rows(parts[0], rows) for rows in places]
    learned, tested = parts
    return learned, tested, how


def _sides(run: common.Run, holdout: float, test: Sequence[str]) -> tuple[list[tuple[Any, Sequence[str]]], str]:
    """The data sets to learn from and to test on, or the one to divide, each with its name; and that in words."""
    args = run.args
    if test:
        held = common.limited(common.open_data(args, run.model, test, "test"), args.limit)
        return [(run.dataset, run.spec), (held, test)], f"the test images are those of {' '.join(test)}"
    # Only data with a training split of its own opens differently for it.
    training = common.open_data(args, run.model, run.spec, "train")
    if training.names[:1] != getattr(run.dataset, "names", [])[:1]:
        training = common.limited(training, args.limit)
        return [(training, run.spec), (run.dataset, run.spec)], "the data set's own training and test files"
    if not 0 < holdout < 1:
        raise UserError(f"--holdout must be a fraction between 0 and 1, not {holdout}")
    how = f"every image once: {holdout:g} of them drawn for testing by seed {args.seed}"
    return [(run.dataset, run.spec)], how


def _targets(args: argparse.Namespace, dataset: Any, spec: Sequence[str]) -> Targets:
    targets = find_targets(args, spec, dataset)
    count = len(targets.indices)
    if count < FEWEST:
        raise UserError(f"learning from z needs at least {FEWEST} labelled images, not {count}; give a larger --input")
    return targets


def _part(run: common.Run, dataset: Any, targets: Targets, cache: Path) -> Side:
    if isinstance(run.model, Prior):
        names = (readable(dataset, run.args.quiet)[0] if run.args.on_error == "skip" else dataset).names
        codes = np.empty((len(names), 0), np.float32)
    else:
        latents = encode_dataset(run.pipe, dataset, cache, on_error=run.args.on_error, quiet=run.args.quiet)
        names, codes = latents.names, latents.z.numpy()
    # Broken images have no latents, and images without a row have no labels: what is left has both.
    place = {name: i for i, name in enumerate(names)}
    rows = [r for r, index in enumerate(targets.indices) if dataset.names[index] in place]
    indices = targets.indices[rows]
    z = codes[[place[dataset.names[i]] for i in indices]]
    images = common.load(dataset, indices).images.numpy()
    targets = targets._replace(values=targets.values[rows], indices=np.arange(len(rows)))
    return Side([dataset.names[i] for i in indices], z, images, targets)


def _rows(part: Side, rows: np.ndarray) -> Side:
    targets = part.targets._replace(values=part.targets.values[rows], indices=np.arange(len(rows)))
    return Side([part.names[i] for i in rows], part.z[rows], part.images[rows], targets)
