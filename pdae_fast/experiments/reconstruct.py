"""Images encoded and decoded again, and how close they come."""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import torch

from .. import cli
from ..data import load_image, none_read, save_grid, save_images
from ..data.bundled import SAMPLES
from ..files import claim_folder
from ..metrics import METRICS
from ..processes import processes
from ..samplers import Recipe
from . import common
from .common import MODES, Cost
from .journal import Block, Journal

GRID_IMAGES = 16


class _Record:
    """Per-image quality and the cost of one mode."""

    def __init__(self) -> None:
        self.quality: dict[str, list[float]] = {name: [] for name in METRICS}
        self.cost = Cost()

    def add(self, values: dict[str, Any]) -> None:
        for name, list_ in values["quality"].items():
            self.quality[name] += list_
        self.cost.add(values["cost"])

    def report(self, count: int) -> dict[str, Any]:
        return {"mean": {name: fmean(values) for name, values in self.quality.items()}, **self.cost.report(count)}


def reconstruct(run: common.Run, modes: list[str], block: Block) -> dict[str, Any]:
    """Decode the images of ``block`` in every mode and write them; returns each mode's quality and cost."""
    values = {}
    for mode in modes:
        cost = Cost()
        with cost.of(run.pipe):
            x = common.autoencode(run.pipe, mode, block.images, block.indices, run.args.seed)
        save_images(x, run.out / "images" / mode, block.names)
        quality = {name: function(block.images, x).tolist() for name, function in METRICS.items()}
        values[mode] = {"quality": quality, "cost": cost.values()}
    return values


def _grid(run: common.Run, modes: list[str], shown: list[tuple[str, int]]) -> None:
    """The first images over what was decoded from them; these are read again, as other processes wrote them."""
    rows = [common.load(run.dataset, [index for _, index in shown]).images]
    channels, size, _ = run.model.image_shape
    for mode in modes:
        paths = [run.out / "images" / mode / f"{name}.png" for name, _ in shown]
        rows.append(torch.stack([load_image(path, size, channels) for path in paths]))
    save_grid(rows, run.out / "grid.png", ["input", *(MODES[mode] for mode in modes)])


# -- the command ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("reconstruct", "Encode images to (z, x_T) and decode them again; report how close they come.")
    common.add_options(p, out="reconstruction")
    p.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=["inferred", "random"], help="what to decode from"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    modes = args.modes
    with processes() as group:
        args.device = group.device(args.device)
        run = common.open_run(args, default_input=[SAMPLES], infers="inferred" in modes)
        modes = common.possible(run.model, "--modes", modes, ())
        settings = common.job_settings(run, modes=modes)
        if group.first:
            claim_folder(run.out)
        journal = Journal(run.out, settings, len(run.dataset), run.pipe.batch_size, group)
        total = journal.left() * sum(common.evaluations(run.pipe, mode) for mode in modes)
        with common.progress(run.pipe, total, "reconstruct", args.quiet or not group.first):
            journal.run(run.dataset, lambda block: (reconstruct(run, modes, block), {}), args.on_error)
        if group.first:
            report, broken = _merge(run, modes, journal, group.size)
            common.say(run, _summary(report, run.pipe.recipe), ["grid.png", "images", "metrics.json"], broken)


def _merge(run: common.Run, modes: list[str], journal: Journal, size: int) -> tuple[dict[str, Any], common.Broken]:
    """Everything that all processes found, in the order of the images: metrics.json and the grid."""
    records = {mode: _Record() for mode in modes}
    places: list[tuple[str, int]] = []
    broken: list[tuple[str, str]] = []
    for entry in journal.entries():
        places += zip(entry.names, entry.indices, strict=True)
        broken += entry.broken
        for mode, values in entry.values.items():
            records[mode].add(values)
    if not places:
        journal.remove()
        raise none_read(broken)
    _grid(run, modes, places[:GRID_IMAGES])
    report = common.report(
        run,
        broken,
        images=len(places),
        processes=size,
        modes={
            mode: {
                **record.report(len(places)),
                "whole_evaluations_per_image": common.whole_evaluations(run.pipe, record.cost.evaluations, len(places)),
            }
            for mode, record in records.items()
        },
        per_image=[
            {"name": name, **{m: {k: v[i] for k, v in r.quality.items()} for m, r in records.items()}}
            for i, (name, _) in enumerate(places)
        ],
    )
    cli.write_json(run.out / "metrics.json", report)
    journal.remove()
    return report, broken


def _summary(report: dict[str, Any], recipe: Recipe) -> list[str]:
    def evaluations(values: dict[str, Any]) -> float:
        if report["reuse"] == "none":
            return values["network_evaluations_per_image"]["trunk"]
        return round(values["whole_evaluations_per_image"], 1)  # of parts, in whole ones

    rows = []
    for mode, values in report["modes"].items():
        mean = values["mean"]
        rows.append(
            [
                MODES[mode],
                f"{mean['ssim']:.4f}",
                f"{mean['psnr']:.2f}",
                f"{mean['mse']:.3e}",
                f"{evaluations(values):g}",
                f"{values['seconds']:.1f}",
                f"{values['images_per_second']:.3g}",
            ]
        )
    return [
        cli.table(["decoded from", "SSIM", "PSNR", "MSE", "evaluations", "seconds", "images/s"], rows),
        f"{report['images']} images, model {report['model']}, {recipe}, {report['plan']} plan, "
        f"{report['dtype']}, {report['device']}",
    ]
