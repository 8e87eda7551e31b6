"""Which block of a network, and which t: what linear read-outs find in its features, for all that is known of images.

Every block's maps are averaged over areas (grid 1: one vector; grid 4: 4 x 4 of them), standardised by the training
images, and read by a logistic regression (classes, attributes) or a ridge regression (landmarks) as in `linear`; parts
are read from the maps themselves, pixel by pixel (`pixelwise`). The images are told one time after the other, and
nothing of one time is kept when the next one begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.avatar_truth import read_landmarks, read_parts
from ..data.avatars import is_avatars
from ..data.bundled import PREFIX, bundled_path
from ..engine.device import available_memory
from ..engine.features import Maps, level_shapes
from ..errors import UserError
from . import common
from .estimates import Score, accuracy, bootstrap_auroc, iou_score, mean_of, mean_score
from .linear import (
    FeatureSet,
    compact,
    distances,
    effective_rank,
    fit,
    principal_components,
    ridge,
    scale,
    small_pixels,
)
from .parts import Side
from .pixelwise import Discriminant, confusion, patches
from .targets import Targets

TARGETS = ("classes", "attributes", "landmarks", "parts")
MEASURES = {
    "classes": "accuracy",
    "attributes": "mean AUROC",
    "landmarks": "mean distance, px",
    "parts": "mean IoU",
}
TOGETHER = "together"
PART_IMAGES = 20  # labelled images that parts are learned from, unless asked otherwise
MOST_PIXELS = 4096  # dimensions of the finest pixel baseline
RANKED = 1000  # training images that the effective rank is of


class Block(NamedTuple):
    """A block of the network: its name, its place in `Maps.levels`, and the channels and side of its maps."""

    name: str
    level: int
    channels: int
    side: int


class Sets(NamedTuple):
    """The feature sets of one time: ``blocks``, each alone and all of them together, at every one of ``grids``."""

    blocks: list[Block]
    grids: list[int]

    @property
    def outputs(self) -> int:
        """How many output blocks have to run."""
        return max(block.level for block in self.blocks)

    def groups(self) -> Iterator[tuple[str, list[int]]]:
        """The name of every block, and of all of them together, with their places among ``blocks``."""
        for i, block in enumerate(self.blocks):
            yield block.name, [i]
        if len(self.blocks) > 1:
            yield TOGETHER, list(range(len(self.blocks)))

    @property
    def width(self) -> int:
        """Numbers of one image."""
        return sum(block.channels for block in self.blocks) * sum(grid**2 for grid in self.grids)


def find_sets(unet: Any, image_size: int, words: Sequence[str], grids: Sequence[int]) -> Sets:
    """The blocks that ``words`` name, in the network's order; UserError naming those that there are."""
    shapes = level_shapes(unet, image_size)
    last = len(shapes) - 1
    levels: set[int] = set()
    for word in words:
        found = re.fullmatch(r"decoder([1-9][0-9]{0,3})", word)
        if word == "middle":
            levels.add(0)
        elif word == "decoder":
            levels.update(range(1, last + 1))
        elif found and int(found[1]) <= last:
            levels.add(int(found[1]))
        else:
            raise UserError(f"--features {word}: no such block; this network has middle, and decoder1 to decoder{last}")
    blocks = [
        Block(f"decoder{level}" if level else "middle", level, shapes[level][0], shapes[level][1])
        for level in sorted(levels)
    ]
    least = min(blocks, key=lambda block: block.side)
    for grid in grids:
        if not 1 <= grid <= least.side:
            raise UserError(f"--grid {grid}: the maps of {least.name} are {least.side} x {least.side}")
    return Sets(blocks, sorted(set(grids)))


def check_times(times: Sequence[int], T: int) -> list[int]:
    for t in times:
        if not 0 <= t < T:
            raise UserError(f"--times {t}: this model has times from 0 to {T - 1}")
    return sorted(set(times))


# -- what is known of the images -----------------------------------------------------------------------------------


def avatar_folder(spec: Sequence[str]) -> str | None:
    """The folder of avatars that ``spec`` names; None for other images."""
    if len(spec) != 1:
        return None
    folder = bundled_path(spec[0].removeprefix(PREFIX)) if spec[0].startswith(PREFIX) else spec[0]
    return folder if is_avatars(folder) else None


def choose_targets(asked: Sequence[str] | None, known: Targets, folders: Sequence[str | None], side: int) -> list[str]:
    """What is read out: all that there is, or what is ``asked`` for; UserError where that is not known, where labels
    are all of one kind, and where masks are of another size than the model's images."""
    there = [known.kind, *(("landmarks", "parts") if all(folders) else ())]
    for name in asked or ():
        if name not in there:
            more = " (those of avatars alone are)" if name in ("landmarks", "parts") else ""
            raise UserError(f"--targets {name}: not known of these images{more}; there are {', '.join(there)}")
    chosen = [name for name in TARGETS if name in (asked or there)]
    if known.kind in chosen:
        columns = known.values[:, None] if known.kind == "classes" else known.values
        if all(len(np.unique(column)) < 2 for column in columns.T):
            raise UserError(f"all images have the same {known.kind}: there is nothing to tell apart")
    for folder in folders if "parts" in chosen else ():
        found = read_parts(folder, ()).size
        if found != side:
            raise UserError(f"{folder}: masks of {found} x {found} pixels; the model's images are {side} x {side}")
    return chosen


@dataclass
class Vectors:
    """A target that is read from vectors: ``train`` and ``test`` are its values, row for row."""

    name: str
    train: np.ndarray
    test: np.ndarray
    classes: int
    seed: int

    def score(self, features: FeatureSet) -> Score:
        """Of a read-out of the scaled ``features``, on the test images."""
        if self.name == "landmarks":
            found, _ = ridge(features, self.train, self.seed)
            return mean_score(distances(found, self.test), self.seed)
        if self.name == "classes":
            scores = fit(features, self.train, max(3, self.classes), self.seed).scores
            return mean_score(accuracy(scores, self.test), self.seed)
        values, drawn = [], []
        for known, asked in zip(self.train.T, self.test.T, strict=True):
            estimate, resampled = bootstrap_auroc(fit(features, known, 2, self.seed).scores, asked, self.seed)
            values.append(estimate.value)
            drawn.append(resampled)
        return mean_of(values, drawn)


def usable_attributes(train: Targets, test: Targets) -> tuple[list[int], list[str]]:
    """Attributes of which both sides have images with and without, and a note for each of the others."""
    usable, notes = [], []
    for j, name in enumerate(train.names):
        few = [np.bincount(side.values[:, j] > 0, minlength=2).min() for side in (train, test)]
        if few[0] < 2 or few[1] < 1:
            notes.append(f"{name}: left out, too few images with or without it")
        else:
            usable.append(j)
    if not usable:
        raise UserError(f"no attribute can be probed: {'; '.join(notes)}")
    return usable, notes


# -- the sweep -----------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """Read-outs of ``sets`` for ``targets`` at any time; `baselines` and `at` give rows, and the scores behind them.

    ``train`` and ``test``: the images of both sides. ``masks``: the parts of the images ``learned`` (places in
    ``train``) and of all test images, with their names; None where parts are not asked for.
    """

    run: common.Run
    sets: Sets
    targets: list[Vectors]
    train: Side
    test: Side
    learned: np.ndarray
    masks: tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None

    def check_memory(self) -> None:
        """UserError where the numbers of one time do not fit: nothing else grows with the images."""
        images = len(self.train.names) + len(self.test.names)
        # Read-outs hold what they read twice more, in float64.
        widest = self.sets.width / max(1, len(self.sets.grids))
        needed = 4 * images * self.sets.width + 16 * images * widest if self.targets else 0
        free = available_memory(torch.device("cpu"))
        if needed > free / 2:
            raise UserError(
                f"the features of {images} images need about {int(needed) >> 20} MiB and {free >> 20} MiB are free; "
                "ask for a smaller --grid, fewer --features, or --limit the images"
            )

    def baselines(self) -> Iterator[tuple[str, str, Score]]:
        """(target, features, score) of z, of principal components and of pixels; patches of pixels for parts."""
        seed, dimension = self.run.args.seed, self.train.z.shape[1] or self.sets.blocks[0].channels
        train, test = self.train.images, self.test.images
        C, H = train.shape[1], train.shape[2]
        vectors = [FeatureSet(f"z ({dimension})", self.train.z, self.test.z)] if self.train.z.shape[1] else []
        if self.targets:
            # Components that few images hardly vary in would be noise once they are standardised.
            vectors.append(principal_components(train, test, max(1, min(dimension, len(train) // 2)), seed))
            vectors.append(small_pixels(train, test, dimension))
            if dimension < C * H * H:
                vectors.append(small_pixels(train, test, min(C * H * H, MOST_PIXELS)))
            for features in vectors:
                scaled = compact(scale(features, "standardise"))
                for target in self.targets:
                    yield target.name, features.name, target.score(scaled)
        if self.masks is not None:
            for _, score in self._parts(lambda side, rows: [patches(torch.from_numpy(side.images[rows]))], [("", [0])]):
                yield "parts", "7x7 pixels and place", score

    def at(self, t: int, noised: bool, advance: Any) -> Iterator[tuple[str, str, int | None, Score | float]]:
        """(target, features, grid, score) of every set at time ``t``; the target "rank" is the effective rank, a
        number. ``advance`` is called with the number of images that have been read."""
        collected = {}
        sides = (("train", self.train), ("test", self.test)) if self.targets else ()
        for name, side in sides:
            pooled = [[] for _ in self.sets.grids]
            for rows in self._batches(len(side.names)):
                maps = self._maps(side, rows, t, noised)
                for grid, parts in zip(self.sets.grids, pooled, strict=True):
                    parts.append(maps.pooled(grid).numpy())
                advance(len(rows))
            collected[name] = [np.concatenate(parts) for parts in pooled]
        for k, grid in enumerate(self.sets.grids if self.targets else ()):
            ends = np.cumsum([0, *(block.channels for block in self.sets.blocks)])
            for name, places in self.sets.groups():
                columns = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in places])
                pair = (collected[side][k][:, columns].reshape(len(collected[side][k]), -1) for side in collected)
                features = FeatureSet(name, *pair)
                yield "rank", name, grid, effective_rank(features.train[:RANKED])
                scaled = compact(scale(features, "standardise"))
                for target in self.targets:
                    yield target.name, name, grid, target.score(scaled)
        if self.masks is not None:

            def levels(side: Side, rows: np.ndarray) -> list[Tensor]:
                advance(len(rows))
                return list(self._maps(side, rows, t, noised).levels)

            for name, score in self._parts(levels, list(self.sets.groups())):
                yield "parts", name, None, score

    def _maps(self, side: Side, rows: np.ndarray, t: int, noised: bool) -> Maps:
        """Of the chosen blocks alone."""
        first = 0 if side is self.train else len(self.train.names)  # no image has another's noise
        images, indices = torch.from_numpy(side.images[rows]), [first + int(r) for r in rows]
        maps = self.run.pipe.features(images, t, self.sets.outputs, noised, self.run.args.seed, indices=indices)
        return Maps.of(maps.levels[block.level] for block in self.sets.blocks)

    def _batches(self, count: int) -> Iterator[np.ndarray]:
        size = self.run.pipe.batch_size
        return (np.arange(start, min(start + size, count)) for start in range(0, count, size))

    def _parts(self, levels: Any, groups: list[tuple[str, list[int]]]) -> Iterator[tuple[str, Score]]:
        known, asked, names = self.masks
        learner, H = Discriminant(len(names)), known.shape[1]
        for place, row in enumerate(self.learned):
            learner.learn(levels(self.train, np.array([row])), torch.from_numpy(known[place : place + 1]).long())
        readers = {name: learner.solve(which) for name, which in groups}
        found: dict[str, list[np.ndarray]] = {name: [] for name in readers}
        for rows in self._batches(len(self.test.names)):
            maps, truth = levels(self.test, rows), torch.from_numpy(asked[rows]).long()
            for name, read in readers.items():
                found[name].append(confusion(read(maps, H), truth, len(names)))
        for name, parts in found.items():
            yield name, iou_score(np.concatenate(parts), self.run.args.seed)

    def images_at_once(self) -> int:
        """Images that pass the network for one time."""
        images = len(self.train.names) + len(self.test.names) if self.targets else 0
        return images + (0 if self.masks is None else len(self.learned) + len(self.test.names))


def prepare(
    run: common.Run, sets: Sets, chosen: Sequence[str], sides: tuple[Side, Side], folders: Sequence[str], labelled: int
) -> tuple[Sweep, list[str]]:
    """The sweep over ``chosen`` targets, ``labelled`` training images of them at most (0: all, or PART_IMAGES for
    parts), and notes on what is left out."""
    train, test = sides
    notes: list[str] = []
    order = np.random.default_rng((run.args.seed, 13)).permutation(len(train.names))
    parts_of = np.sort(order[: labelled or PART_IMAGES])
    if labelled and labelled < len(order):
        rows = np.sort(order[:labelled])
        targets = train.targets._replace(values=train.targets.values[rows], indices=np.arange(len(rows)))
        train = Side([train.names[i] for i in rows], train.z[rows], train.images[rows], targets)
        parts_of = np.arange(len(rows))
    vectors, masks = [], None
    for name in chosen:
        if name == "classes":
            pair = (side.targets.values for side in (train, test))
            vectors.append(Vectors(name, *pair, len(train.targets.names), run.args.seed))
        elif name == "attributes":
            usable, notes = usable_attributes(train.targets, test.targets)
            pair = ((side.targets.values[:, usable] > 0).astype(np.int64) for side in (train, test))
            vectors.append(Vectors(name, *pair, 2, run.args.seed))
        elif name == "landmarks":
            truth = [read_landmarks(f, side.names) for f, side in zip(folders, (train, test), strict=True)]
            size = run.model.config.image_size  # pixels of the model's images
            vectors.append(Vectors(name, *(t.values * (size / t.size) for t in truth), 0, run.args.seed))
        else:
            known = read_parts(folders[0], [train.names[i] for i in parts_of])
            asked = read_parts(folders[1], test.names)
            masks = known.values, asked.values, known.names
    return Sweep(run, sets, vectors, train, test, parts_of, masks), notes


# -- results -------------------------------------------------------------------------------------------------------


def measure(
    sweep: Sweep, times: Sequence[int], kinds: Sequence[bool], quiet: bool, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Rows of every feature set, time and target; ``kinds``: whether the images are noised, each of them in turn.
    ``save`` gets what there is after every time.

    A row's value has its interval; "minus_baseline" compares it with the best baseline of its target, and
    "minus_first" with the same block, grid and kind of input at the first time, on the same images.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[str, Score]] = {}
    for target, name, score in sweep.baselines():
        rows.append(_row(target, name, None, None, None, score))
        sign = -1 if target == "landmarks" else 1
        if target not in best or sign * score.value > sign * best[target][1].value:
            best[target] = name, score
    total = sweep.images_at_once() * len(times) * len(kinds)
    with tqdm(total=total, unit="image", desc="features", disable=quiet or None) as bar:
        for noised in kinds:
            first: dict[tuple, Score] = {}
            for t in times:
                bar.set_postfix_str(f"t {t}{', noised' if noised else ''}")
                for target, name, grid, score in sweep.at(t, noised, bar.update):
                    row = _row(target, name, grid, t, noised, score)
                    if target != "rank":
                        at_first = first.setdefault((target, name, grid), score)
                        row["minus_baseline"] = (score - best[target][1]).estimate._asdict()
                        row["minus_first"] = (score - at_first).estimate._asdict()
                    rows.append(row)
                save(rows)
    return rows


def _row(
    target: str, name: str, grid: int | None, t: int | None, noised: bool | None, score: Score | float
) -> dict[str, Any]:
    value = {"value": score} if isinstance(score, float) else score.estimate._asdict()
    of = None if noised is None else "x_t" if noised else "x0"
    return {"target": target, "features": name, "grid": grid, "t": t, "input": of, **value}
