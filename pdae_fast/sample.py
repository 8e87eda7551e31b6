"""Sample new images: `python -m pdae_fast.sample --count 64`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cli
from .data import save_grid, save_images, stream
from .errors import UserError
from .experiments import common
from .experiments.common import Cost
from .experiments.frechet import FeatureNetwork, FrechetDistance
from .experiments.sample import Reference, Samples, figures, find_reference, nearest, sample, sample_prior
from .files import make_folder

COLUMNS = 10  # of the grid
SHOWN = 40
KEPT = 1000  # samples that the figures are computed from
LABELS = {"latent": "latent DPM", "prior": "prior alone"}


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(
        "sample", "New images: z from the latent DPM, decoded from random x_T; --input is what they are compared with."
    )
    common.add_options(p, out="samples")
    add = p.add_argument
    add("--count", type=int, default=40, help="images to sample")
    add("--stop-percent", type=float, default=0.3, help="last part of the trajectory that G is left out of, 0 to 1")
    add("--latent-steps", type=int, help="steps of the latent DPM (default: --steps)")
    add("--no-latent-clamp", action="store_true", help="do not clamp z_T and every estimate of z_0 to +-1")
    add("--prior-only", action="store_true", help="also sample the prior alone from the same x_T, for comparison")
    add("--fid", metavar="DATA", help="images to compare the samples with as a set; needs --fid-network")
    add("--fid-network", metavar="FILE", help="TorchScript network: uint8 [B, 3, H, W] to features [B, F]")
    args = common.parse(p, argv)
    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    if (args.fid is None) != (args.fid_network is None):
        raise UserError("--fid and --fid-network go together: images to compare with, and the network that compares")
    run = common.open_run(args)
    pipe = run.pipe
    pipe.sample_latents(1, 1)  # without a latent DPM this says so
    pipe.schedule.decoding(args.steps, args.stop_percent)
    pipe.schedule.timesteps(args.latent_steps or args.steps)
    reference = find_reference(run)
    features = _fid(run) if args.fid else None
    make_folder(run.out)
    ways: dict[str, Callable[[], Iterator[Samples]]] = {
        "latent": lambda: sample(
            pipe,
            args.count,
            stop_percent=args.stop_percent,
            latent_steps=args.latent_steps,
            latent_clamp=not args.no_latent_clamp,
            seed=args.seed,
        )
    }
    if args.prior_only:
        ways["prior"] = lambda: sample_prior(pipe, args.count, args.seed)
    total = len(ways) * args.count * common.evaluations(pipe, "random", None)
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    classifier = run.model.classifier is not None and run.model.config.latent_statistics
    control = pipe.logits(pipe.encode(reference.control)) if classifier else None
    with common.progress(pipe, total, "sample", args.quiet):
        for name, way in ways.items():
            images, cost, pieces = _draw(run, name, way, features)
            logits = (pipe.logits(pipe.encode(images)), control) if classifier else None
            row = {"name": name, "images": args.count, **figures(images, reference, logits), **cost.report(args.count)}
            if features:
                row["fid"] = features[1](iter(pieces))
            rows.append(row)
            shown[name] = images
    data = figures(reference.control, reference, (control, control) if classifier else None)
    rows.append({"name": "data", "images": len(reference.control), **data})
    report = common.report(
        run,
        images=args.count,
        stop_percent=args.stop_percent,
        latent_steps=args.latent_steps or args.steps,
        latent_clamp=not args.no_latent_clamp,
        reference={"images": len(reference.images), "control": len(reference.control), "how": reference.how},
        rows=rows,
    )
    if features:
        report["fid"] = {"reference": args.fid, "network": args.fid_network, "images": features[1].images}
        report["fid"]["network_digest"] = common.file_digest(Path(args.fid_network))
    _grid(run.out / "grid.png", shown, reference)
    cli.write_json(run.out / "metrics.json", report)
    if not args.quiet:
        print(_summary(report, run.out))


def _fid(run: common.Run) -> tuple[FeatureNetwork, FrechetDistance]:
    """The network of --fid-network, and the distance from the images of --fid."""
    network = FeatureNetwork(run.args.fid_network, run.pipe.device)
    images = common.open_data(run.args, run.model, [run.args.fid], "test")
    batches = stream(images, run.pipe.batch_size, run.args.on_error, [])
    return network, FrechetDistance(network(batch.images).numpy() for batch in batches)


def _draw(
    run: common.Run, name: str, way: Callable[[], Iterator[Samples]], features: tuple | None
) -> tuple[Tensor, Cost, list[np.ndarray]]:
    """Every image written to OUT/images/NAME; the first KEPT of them, the cost, and all features."""
    kept, cost, pieces = [], Cost(), []
    with cost.of(run.pipe):
        for block in way():
            numbers = range(block.first, block.first + len(block.images))
            save_images(block.images, run.out / "images" / name, [f"{i:06d}" for i in numbers])
            if block.first < KEPT:
                kept.append(block.images)
            if features:
                pieces.append(features[0](block.images).numpy())
    return torch.cat(kept)[:KEPT], cost, pieces


def _grid(path: Path, shown: dict[str, Tensor], reference: Reference) -> None:
    rows, labels = [], []
    for name, images in shown.items():
        parts = images[:SHOWN].split(COLUMNS)
        rows += parts
        labels += [LABELS[name], *[""] * (len(parts) - 1)]
    first = shown["latent"][:COLUMNS]
    rows.append(reference.images[nearest(first, reference.images)[1]])
    labels.append("nearest data to the first row")
    save_grid(rows, path, labels)


def _summary(report: dict[str, Any], out: Path) -> str:
    fields = {"nearest": ".4f", "nearest_smallest": ".4f", "diversity": ".4f"}
    titles = ["nearest data", "smallest", "diversity"]
    if "entropy" in report["rows"][0]:
        fields |= {"entropy": ".4f", "rates_differ": ".4f"}
        titles += ["entropy", "rates differ"]
    if "fid" in report:
        fields["fid"] = ".3f"
        titles.append("FID")

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = []
    for row in report["rows"]:
        cost = row.get("network_evaluations_per_image", {})
        passes = [f"{cost[k]:g}" if k in cost else "-" for k in ("trunk", "gradient")]
        label = LABELS.get(row["name"], f"data ({row['images']})")
        lines.append([label, *(cell(row.get(k), form) for k, form in fields.items()), *passes])
    used = report["reference"]
    text = [
        cli.table(["images", *titles, "evaluations", "of G"], lines),
        "distances: root mean square of pixels on [0, 1], to the nearest of "
        f"{used['images']} {used['how'].split(',')[0]} and between samples"
        + ("; entropy in bits of the classifier's answers" if "entropy" in fields else ""),
        f"{report['images']} samples, {report['steps']} steps, no G in the last {100 * report['stop_percent']:g}%, "
        f"{report['latent_steps']} latent steps {'with' if report['latent_clamp'] else 'without'} the clamp, "
        f"model {report['model']}, {report['plan']} plan, {report['dtype']}, {report['device']}",
        *(f"assumed about the model: {note}" for note in report["assumed"]),
        f"wrote {out / 'grid.png'}, {out / 'images'} and {out / 'metrics.json'}",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
