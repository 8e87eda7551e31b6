"""How close an autoencoder comes: one table over what is decoded, numbers of steps, and ways to infer x_T."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..data import save_grid
from ..errors import UserError
from ..files import atomic_write
from ..pipeline import Pipeline
from . import common
from .common import MODES, Cost
from .frechet import FeatureNetwork, FrechetDistance
from .journal import Block, Entry, Journal

Metric = Callable[[Tensor, Tensor], Tensor]
METRICS: dict[str, Metric] = {"ssim": metrics.ssim, "psnr": metrics.psnr, "mse": metrics.mse}
GRID_IMAGES = 8


@dataclass(frozen=True)
class Setting:
    """One row of the table: what is decoded and how; ``encode_steps`` is None where x_T is not inferred."""

    mode: str
    steps: int
    encode_steps: int | None
    spacing: str
    iterations: int
    solver: str
    preset: str | None = None

    @property
    def label(self) -> str:
        if self.preset:
            return f"{MODES[self.mode]}, {self.preset}"
        if self.mode != "inferred":
            return f"{MODES[self.mode]}, {self.steps}"
        return f"{MODES[self.mode]}, {self.encode_steps}+{self.steps}"

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        return common.variant(
            pipe, steps=self.steps, spacing=self.spacing, iterations=self.iterations, solver=self.solver
        )


def evaluate(
    pipe: Pipeline,
    settings: list[Setting],
    block: Block,
    quality: dict[str, Metric],
    seed: int = 0,
    network: FeatureNetwork | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every setting on the images of ``block``: values and arrays for a journal.

    values: for each setting {"quality": {metric: one number an image}, "cost": ...}. arrays: "shown" [settings, n, C,
    H, W] for the first images of the data set, and with a ``network`` "features" [settings, B, F].
    """
    values, shown, features = [], [], []
    keep = [k for k, index in enumerate(block.indices) if index < GRID_IMAGES]
    for setting in settings:
        own, cost = setting.pipeline(pipe), Cost()
        with cost.of(own):
            x = common.autoencode(own, setting.mode, block.images, block.indices, setting.encode_steps, seed)
        found = {name: metric(block.images, x).tolist() for name, metric in quality.items()}
        values.append({"quality": found, "cost": cost.values()})
        shown.append(x[keep])
        if network:
            features.append(network(x))
    arrays = {"shown": torch.stack(shown)} if keep else {}
    if network:
        arrays["features"] = torch.stack(features)
    return {"settings": values}, arrays


@dataclass
class _Mean:
    """Mean and standard error of numbers that come one after another; an infinity makes both infinite."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean (Welford)

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def error(self) -> float:
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else math.nan


@dataclass
class Row:
    """A setting with what was found for it."""

    setting: Setting
    cost: Cost = field(default_factory=Cost)
    quality: dict[str, _Mean] = field(default_factory=dict)
    fid: float | None = None

    def report(self, images: int, fid: bool) -> dict[str, Any]:
        values = {
            **asdict(self.setting),
            "label": self.setting.label,
            "mean": {name: mean.mean for name, mean in self.quality.items()},
            "standard_error": {name: mean.error for name, mean in self.quality.items()},
            **self.cost.report(images),
        }
        return values | ({"fid": self.fid} if fid else {})


@dataclass
class Results:
    """What `merge` gathers: the rows, the images that were read, and those that could not be."""

    rows: list[Row]
    images: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def merge(journal: Journal, settings: list[Setting], dataset: Any, out: Path) -> Results:
    """Everything the processes found, in the order of the images: per_image.csv and grid.png in ``out``.

    Memory does not grow with the number of images. Raises UserError when none could be read.
    """
    results = Results([Row(setting) for setting in settings])
    places: list[int] = []
    shown: list[np.ndarray] = []
    with atomic_write(out / "per_image.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        for entry in journal.entries():
            results.broken += entry.broken
            if "shown" in entry.arrays:
                places += [index for index in entry.indices if index < GRID_IMAGES]
                shown.append(entry.arrays["shown"])
            if entry.names:
                _add(results, entry, writer)
        if not results.images:
            first = ": ".join(results.broken[0])
            raise UserError(f"none of the {len(results.broken)} images could be read; the first: {first}")
    if shown:
        rows = [common.load(dataset, places).images, *torch.from_numpy(np.concatenate(shown, axis=1))]
        save_grid(rows, out / "grid.png", ["input", *(setting.label for setting in settings)])
    return results


def _add(results: Results, entry: Entry, writer: Any) -> None:
    found = entry.values["settings"]
    names = list(found[0]["quality"])
    if not results.images:
        writer.writerow(["image", "decoded from", *names])
    for row, values in zip(results.rows, found, strict=True):
        row.cost.add(values["cost"])
        for name in names:
            mean = row.quality.setdefault(name, _Mean())
            for value in values["quality"][name]:
                mean.add(value)
    for i, name in enumerate(entry.names):
        for row, values in zip(results.rows, found, strict=True):
            writer.writerow([name, row.setting.label, *(repr(values["quality"][n][i]) for n in names)])
    results.images += len(entry.names)


def frechet(journal: Journal, reference: Journal, rows: list[Row]) -> int:
    """Set ``fid`` of every row from the features in both journals; returns the number of reference images."""
    distance = FrechetDistance(entry.arrays["features"] for entry in reference.entries() if entry.names)
    for k, row in enumerate(rows):
        row.fid = distance(_features(journal, k))
    return distance.images


def _features(journal: Journal, k: int) -> Iterator[np.ndarray]:
    return (entry.arrays["features"][k] for entry in journal.entries() if entry.names)
