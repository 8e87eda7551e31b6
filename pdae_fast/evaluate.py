"""Evaluate an autoencoder: `python -m pdae_fast.evaluate --steps 10 100`."""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cli
from .errors import UserError
from .experiments import common, perceptual
from .experiments.common import MODES
from .experiments.evaluate import METRICS, Metric, Setting, evaluate, frechet, merge
from .experiments.frechet import FeatureNetwork
from .experiments.journal import Journal
from .files import atomic_write
from .pipeline import PRESETS
from .processes import Group, processes

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
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="what to decode from")
    add("--steps", nargs="+", type=int, help=f"rows of so many steps (default: {STEPS}, or none beside --preset)")
    add("--preset", nargs="+", choices=list(PRESETS), help="rows with the settings of these presets")
    add("--alexnet", metavar="FILE", help="torchvision's AlexNet weights, for LPIPS (default: where torch keeps them)")
    add("--fid", metavar="DATA", help="images to compare the reconstructions with as a set; needs --fid-network")
    add("--fid-network", metavar="FILE", help="TorchScript network: uint8 [B, 3, H, W] to features [B, F]")
    return p


def _settings(args: argparse.Namespace) -> list[Setting]:
    """The rows: every mode for each number of steps, then for each preset."""
    steps = args.steps if args.steps is not None else ([] if args.preset else STEPS)
    shared = {"spacing": args.spacing, "iterations": args.iterations, "solver": args.solver}
    rows = [({**shared, "steps": n}, None) for n in steps]
    rows += [({**shared, **PRESETS[name]}, name) for name in args.preset or ()]
    settings = []
    for values, preset in rows:
        solved = values["iterations"] or values["solver"] == "belm"
        if args.encode_steps is not None and solved and args.encode_steps != values["steps"]:
            raise UserError("--iterations, belm and such presets infer x_T by the steps that decode; "
                            "leave out --encode-steps")  # fmt: skip
        up = args.encode_steps if args.encode_steps is not None else values["steps"]
        settings += [
            Setting(mode=mode, encode_steps=up if mode == "inferred" else None, preset=preset, **values)
            for mode in args.modes
        ]
    return list(dict.fromkeys(settings))


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
    settings = {"images": run.args.fid, "network": _digest(run.args.fid_network), "names": common.names_digest(images)}
    journal = Journal(run.out / "fid", settings, len(images), run.pipe.batch_size, group)
    journal.run(images, lambda block: ({}, {"features": network(block.images)}), run.args.on_error)
    return journal


def _digest(path: str) -> str:
    return common.file_digest(Path(path))


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if (args.fid is None) != (args.fid_network is None):
        raise UserError("--fid and --fid-network go together: images to compare with, and the network that compares")
    settings = _settings(args)
    # The pipeline is built for the first row, and the others are variants of it.
    args.steps, preset, args.preset = settings[0].steps, args.preset, None
    encode_steps, args.encode_steps = args.encode_steps, None
    with processes() as group:
        args.device = group.device(args.device)
        run = common.open_run(args, default_limit=DEFAULT_IMAGES)
        rows = [setting.pipeline(run.pipe) for setting in settings]  # every mistake shows before anything is written
        for own, setting in zip(rows, settings, strict=True):
            own.schedule.timesteps(setting.encode_steps or own.steps, own.spacing)
        quality, absent = _quality(run)
        real = common.open_data(args, run.model, [args.fid], "test") if args.fid else None
        network = FeatureNetwork(args.fid_network, run.pipe.device) if args.fid else None
        job = common.job_settings(run, rows=[asdict(s) for s in settings], quality=list(quality))
        if network:
            job["fid"] = [args.fid, _digest(args.fid_network)]
        journal = Journal(run.out, job, len(run.dataset), run.pipe.batch_size, group)
        one = sum(common.evaluations(p, s.mode, s.encode_steps) for p, s in zip(rows, settings, strict=True))
        with common.progress(run.pipe, journal.left() * one, "evaluate", args.quiet or not group.first):
            journal.run(
                run.dataset,
                lambda block: evaluate(run.pipe, settings, block, quality, args.seed, network),
                args.on_error,
            )
        reference = _reference(run, real, network, group) if network else None
        if not group.first:
            return
        results = merge(journal, settings, run.dataset, run.out)
        values: dict[str, Any] = {}
        if reference:
            values["fid"] = {"reference": args.fid, "images": frechet(journal, reference, results.rows)}
            values["fid"] |= {"network": args.fid_network, "network_digest": _digest(args.fid_network)}
        report = common.report(
            run,
            images=results.images,
            processes=group.size,
            steps=list(dict.fromkeys(s.steps for s in settings)),
            encode_steps=encode_steps,
            preset=preset,
            not_available=absent,
            broken=[{"name": name, "reason": reason} for name, reason in results.broken],
            rows=[row.report(results.images, reference is not None) for row in results.rows],
            **values,
        )
        _write(run.out, report)
        journal.remove()
        if reference:
            reference.remove(with_folder=True)
        if not args.quiet:
            print(_summary(report, run.out))


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


def _summary(report: dict[str, Any], out: Path) -> str:
    names = _columns(report)
    lines = []
    for row in report["rows"]:
        values = {**row["mean"], "fid": row.get("fid")}
        cells = ["-" if values[n] is None else format(values[n], FORMATS.get(n, ".4f")) for n in names]
        cost = [f"{row['network_evaluations_per_image']['trunk']:g}", f"{row['seconds']:.1f}"]
        lines.append([row["label"], *cells, *cost])
    text = [cli.table(["decoded from", *(TITLES[n] for n in names), "evaluations", "seconds"], lines)]
    text += [f"{TITLES[name]}: not available ({reason})" for name, reason in report["not_available"].items()]
    text.append(
        f"{report['images']} images of {' '.join(report['input'])}, model {report['model']}, {report['plan']} plan, "
        f"{report['dtype']}, {report['device']}"
    )
    if report["broken"]:
        named = ", ".join(b["name"] for b in report["broken"][:5])
        text.append(f"{len(report['broken'])} broken images skipped: {named}")
    text += [f"assumed about the model: {note}" for note in report["assumed"]]
    text.append(f"wrote {', '.join(str(out / name) for name in ('grid.png', 'table.csv', 'per_image.csv'))} "
                f"and {out / 'metrics.json'}")  # fmt: skip
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
