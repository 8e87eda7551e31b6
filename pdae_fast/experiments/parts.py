"""The labelled images of a data set with their z, divided into those to learn from and those to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..training.labels import split
from ..training.latents import encode_dataset
from . import common
from .targets import Targets, find_targets

FEWEST = 8  # labelled images


class Part(NamedTuple):
    """The labelled images of one side: K names, z [K, D], images [K, C, H, W], and the targets of the same K rows."""

    names: list[str]
    z: np.ndarray
    images: np.ndarray
    targets: Targets


def find_parts(run: common.Run, cache: Path, holdout: float, test: Sequence[str] = ()) -> tuple[Part, Part, str]:
    """Training and test images of ``run``, and how they were divided, in words: ``test`` (data as --input names it) is
    tested on, else the data set's own test files, else ``holdout`` of the images, drawn by the seed. z comes from
    ``cache`` (see `encode_dataset`)."""
    args = run.args
    if test:
        held = common.limited(common.open_data(args, run.model, test, "test"), args.limit)
        tested, learned = _part(run, held, cache, test), _part(run, run.dataset, cache, run.spec)
        words, other = (f"{part.targets.kind} {', '.join(part.targets.names)}" for part in (learned, tested))
        if words != other:
            raise UserError(f"--input has {words}; --test has {other}; expected the same of both")
        return learned, tested, f"the test images are those of {' '.join(test)}"
    # Only data with a training split of its own opens differently for it.
    training = common.open_data(args, run.model, run.spec, "train")
    if training.names[:1] != getattr(run.dataset, "names", [])[:1]:
        training = common.limited(training, args.limit)
        learned, tested = (_part(run, side, cache, run.spec) for side in (training, run.dataset))
        return learned, tested, "the data set's own training and test files"
    if not 0 < holdout < 1:
        raise UserError(f"--holdout must be a fraction between 0 and 1, not {holdout}")
    whole = _part(run, run.dataset, cache, run.spec)
    places = split(len(whole.z), holdout, args.seed)
    learned, tested = (_rows(whole, part) for part in places)
    return learned, tested, f"every image once: {holdout:g} of them drawn for testing by seed {args.seed}"


def _part(run: common.Run, dataset: Any, cache: Path, spec: Sequence[str]) -> Part:
    targets = find_targets(run.args, spec, dataset)
    count = len(targets.indices)
    if count < FEWEST:
        raise UserError(f"learning from z needs at least {FEWEST} labelled images, not {count}; give a larger --input")
    latents = encode_dataset(run.pipe, dataset, cache, on_error=run.args.on_error, quiet=run.args.quiet)
    # Broken images have no latents, and images without a row have no labels: what is left has both.
    place = {name: i for i, name in enumerate(latents.names)}
    rows = [r for r, index in enumerate(targets.indices) if dataset.names[index] in place]
    indices = targets.indices[rows]
    z = latents.z.numpy()[[place[dataset.names[i]] for i in indices]]
    images = common.load(dataset, indices).images.numpy()
    targets = targets._replace(values=targets.values[rows], indices=np.arange(len(rows)))
    return Part([dataset.names[i] for i in indices], z, images, targets)


def _rows(part: Part, rows: np.ndarray) -> Part:
    targets = part.targets._replace(values=part.targets.values[rows], indices=np.arange(len(rows)))
    return Part([part.names[i] for i in rows], part.z[rows], part.images[rows], targets)
