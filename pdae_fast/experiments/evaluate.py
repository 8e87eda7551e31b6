"""How close an autoencoder comes: one table over what is decoded, numbers of steps, and ways to infer x_T."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data import none_read, save_grid
from ..errors import UserError
from ..files import atomic_write, claim_folder
from ..metrics import METRICS
from ..pipeline import Pipeline
from ..processes import Group, processes
from ..samplers import RECIPES, Recipe
from . import common, frechet, perceptual
from .common import MODES, Case, Cost
from .frechet import FeatureNetwork, FrechetDistance
from .journal import Block, Entry, Journal
from .perceptual import Metric

GRID_IMAGES = 8


def evaluate(
    pipe: Pipeline,
    cases: list[Case],
    block: Block,
    quality: dict[str, Metric],
    seed: int = 0,
    network: FeatureNetwork | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every case on the images of ``block``: values and arrays for a journal.

    values: for each case {"quality": {metric: one number an image}, "cost": ...}. arrays: "shown" [cases, n, C,
    H, W] for the first images of the data set, and with a ``network`` "features" [cases, B, F].
    """
    values, shown, features = [], [], []
    keep = [k for k, index in enumerate(block.indices) if index < GRID_IMAGES]
    for case in cases:
        own, cost = case.pipeline(pipe), Cost()
        with cost.of(own):
            x = common.autoencode(own, case.mode, block.images, block.indices, seed)
        found = {name: metric(block.images, x).tolist() for name, metric in quality.items()}
        values.append({"quality": found, "cost": cost.values()})
        shown.append(x[keep])
        if network:
            features.append(network(x))
    arrays = {"shown": torch.stack(shown)} if keep else {}
    if network:
        arrays["features"] = torch.stack(features)
    return {"cases": values}, arrays


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
    """A case with what was found for it."""

    case: Case
    cost: Cost = field(default_factory=Cost)
    quality: dict[str, _Mean] = field(default_factory=dict)
    fid: float | None = None

    def report(self, images: int, fid: bool) -> dict[str, Any]:
        values = {
            **self.case.describe(),
            "label": self.case.label,
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


def merge(journal: Journal, cases: list[Case], dataset: Any, out: Path) -> Results:
    """Everything the processes found, in the order of the images: per_image.csv and grid.png in ``out``.

    Memory does not grow with the number of images. Raises UserError when none could be read.
    """
    results = Results([Row(case) for case in cases])
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
            raise none_read(results.broken)
    if shown:
        rows = [common.load(dataset, places).images, *torch.from_numpy(np.concatenate(shown, axis=1))]
        save_grid(rows, out / "grid.png", ["input", *(case.label for case in cases)])
    return results


def _add(results: Results, entry: Entry, writer: Any) -> None:
    found = entry.values["cases"]
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
            writer.writerow([name, row.case.label, *(repr(values["quality"][n][i]) for n in names)])
    results.images += len(entry.names)


def add_fid(journal: Journal, reference: Journal, rows: list[Row]) -> int:
    """Set ``fid`` of every row from the features in both journals; returns the number of reference images."""
    distance = FrechetDistance(entry.arrays["features"] for entry in reference.entries() if entry.names)
    for k, row in enumerate(rows):
        row.fid = distance(_features(journal, k))
    return distance.images


def _features(journal: Journal, k: int) -> Iterator[np.ndarray]:
    return (entry.arrays["features"][k] for entry in journal.entries() if entry.names)


# -- the command ---------------------------------------------------------------------------------------------------

STEPS = (10, 100)
DEFAULT_IMAGES = 64
TITLES = {"ssim": "SSIM", "psnr": "PSNR", "mse": "MSE", "lpips": "LPIPS", "st_lpips": "ST-LPIPS", "fid": "FID"}
FORMATS = {"psnr": ".2f", "mse": ".3e", "fid": ".3f"}


def _parser() -> argparse.ArgumentParser:
    # --steps and --preset take several values here.
    about = "How close reconstructions come, for numbers of steps and ways to infer x_T."
    p = cli.parser("evaluate", about, conflict_handler="resolve")
    common.add_options(p, out="evaluation")
    add = p.add_argument
    add("--modes", nargs="+", choices=list(MODES), help="what to decode from (default: all)")
    add("--steps", nargs="+", type=int, help=f"rows of so many steps (default: {STEPS}, or none beside --preset)")
    add("--preset", nargs="+", choices=list(RECIPES), help="rows with the settings of these presets")
    add("--alexnet", metavar="FILE", help="torchvision's AlexNet weights, for LPIPS (default: where torch keeps them)")
    frechet.add_options(p)
    return p


def _recipes(args: argparse.Namespace) -> list[tuple[Recipe, str | None]]:
    """For the rows, one for each number of steps, then the presets, whose own values the options leave alone."""
    steps = args.steps if args.steps is not None else ([] if args.preset else STEPS)
    given = Recipe.given(args)
    recipes = [(Recipe(**{**given, "steps": n}), None) for n in steps]
    decided = ("steps", "spacing", "iterations", "solver")
    others = {name: value for name, value in given.items() if name not in decided}
    return recipes + [(Recipe.of(name, **others), name) for name in args.preset or ()]


def _quality(run: common.Run) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be computed here, and why the others cannot."""
    quality, absent = dict(METRICS), {}
    for name, build in (
        ("lpips", lambda: perceptual.lpips(run.pipe.device, run.args.alexnet)),
        ("st_lpips", lambda: perceptual.st_lpips(run.pipe.device)),
    ):
        try:
            quality[name] = build()
        except perceptual.NotAvailable as error:
            if name == "lpips" and run.args.alexnet:
                raise UserError(f"--alexnet was given, but {error}") from None
            absent[name] = str(error)
    return quality, absent


def _reference(run: common.Run, images: Any, network: FeatureNetwork, group: Group) -> Journal:
    """Features of the images of --fid, in a journal of their own: they are shared and continued as everything is."""
    settings = {
        "images": run.args.fid,
        "network": common.file_digest(run.args.fid_network),
        "names": common.names_digest(images),
    }
    journal = Journal(run.out / "fid", settings, len(images), run.pipe.batch_size, group)
    journal.run(images, lambda block: ({}, {"features": network(block.images)}), run.args.on_error)
    return journal


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    frechet.check_options(args)
    recipes = _recipes(args)
    with processes() as group:
        args.device = group.device(args.device)
        run = common.open_run(args, default_limit=DEFAULT_IMAGES, recipe=recipes[0][0], infers=False)
        modes = common.possible(run.model, "--modes", args.modes, list(MODES))
        cases = list(dict.fromkeys(Case(mode, recipe, name) for recipe, name in recipes for mode in modes))
        # Every mistake shows before anything is written.
        one = sum(common.evaluations(case.pipeline(run.pipe), case.mode) for case in cases)
        quality, absent = _quality(run)
        real = common.open_data(args, run.model, [args.fid], "test") if args.fid else None
        network = FeatureNetwork(args.fid_network, run.pipe.device) if args.fid else None
        job = common.job_settings(run, rows=[case.describe() for case in cases], quality=list(quality))
        if network:
            job["fid"] = [args.fid, common.file_digest(args.fid_network)]
        if group.first:
            claim_folder(run.out)
        journal = Journal(run.out, job, len(run.dataset), run.pipe.batch_size, group)
        with common.progress(run.pipe, journal.left() * one, "evaluate", args.quiet or not group.first):
            journal.run(
                run.dataset,
                lambda block: evaluate(run.pipe, cases, block, quality, args.seed, network),
                args.on_error,
            )
        reference = _reference(run, real, network, group) if network else None
        if not group.first:
            return
        results = merge(journal, cases, run.dataset, run.out)
        values: dict[str, Any] = {}
        if reference:
            values["fid"] = {"reference": args.fid, "images": add_fid(journal, reference, results.rows)}
            values["fid"] |= {"network": args.fid_network, "network_digest": common.file_digest(args.fid_network)}
        report = common.report(
            run,
            results.broken,
            recipe=False,
            preset=args.preset,
            images=results.images,
            processes=group.size,
            not_available=absent,
            rows=[row.report(results.images, reference is not None) for row in results.rows],
            **values,
        )
        _write(run.out, report)
        journal.remove()
        if reference:
            reference.remove(with_folder=True)
        files = ["grid.png", "table.csv", "per_image.csv", "metrics.json"]
        common.say(run, _summary(report), files, results.broken)


def _columns(report: dict[str, Any]) -> list[str]:
    return [*report["rows"][0]["mean"], *(["fid"] if "fid" in report else [])]


def _write(out: Path, report: dict[str, Any]) -> None:
    names = _columns(report)
    keys = ["mode", "preset", "steps", "encode_steps", "spacing", "iterations", "solver"]
    with atomic_write(out / "table.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, *names, "network_evaluations", "seconds"])
        for row in report["rows"]:
            values = {**row["mean"], "fid": row.get("fid")}
            evaluations = row["network_evaluations_per_image"]["trunk"]
            writer.writerow([*(row[key] for key in keys), *(values[n] for n in names), evaluations, row["seconds"]])
    cli.write_json(out / "metrics.json", report)


def _summary(report: dict[str, Any]) -> list[str]:
    names = _columns(report)
    lines = []
    for row in report["rows"]:
        values = {**row["mean"], "fid": row.get("fid")}
        cells = [common.cell(values[n], FORMATS.get(n, ".4f")) for n in names]
        cost = [f"{row['network_evaluations_per_image']['trunk']:g}", f"{row['seconds']:.1f}"]
        lines.append([row["label"], *cells, *cost])
    text = [cli.table(["decoded from", *(TITLES[n] for n in names), "evaluations", "seconds"], lines)]
    text += [f"{TITLES[name]}: not available ({reason})" for name, reason in report["not_available"].items()]
    return [*text, f"{report['images']} images of {' '.join(report['input'])}, {common.where(report)}"]
