"""Interpolate between images: `python -m pdae_fast.interpolate --input a.png b.png`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from . import cli
from .data import save_grid, save_images
from .errors import UserError
from .experiments import animation, common, timing
from .experiments.common import Cost
from .experiments.interpolate import Interpolation, compare, find_pairs, interpolate, measure
from .files import make_folder
from .pipeline import INTERPOLATIONS


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("interpolate", "Images between images: z and x_T interpolated, or the two G mixed at every step.")
    common.add_options(p, out="interpolation")
    add = p.add_argument
    add(
        "--pair",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="names or numbers of two images of the input; may be repeated (default: the first ones two by two)",
    )
    add("--points", type=int, default=9, help="frames from A to B, both ends included")
    add("--kinds", nargs="+", choices=INTERPOLATIONS, default=list(INTERPOLATIONS), help="what is interpolated")
    add("--animate", metavar="FORMAT", help="also write films: gif, or mp4 where imageio and ffmpeg are installed")
    add("--compare", action="store_true", help="time the shared trunk of trajectories against one-by-one calls")
    args = common.parse(p, argv)
    if args.points < 2:
        raise UserError(f"--points must be at least 2, not {args.points}")
    if args.animate:
        animation.check_format(args.animate)
    kinds = list(dict.fromkeys(args.kinds))
    run = common.open_run(args)
    pairs = find_pairs(run.dataset.names, args.pair)
    weights = torch.linspace(0, 1, args.points)
    make_folder(run.out)
    ends, down = len({i for pair in pairs for i in pair}), common.evaluations(run.pipe, "random", None)
    total = ends * common.evaluations(run.pipe, "inferred", run.encode_steps)
    total += len(pairs) * args.points * len(kinds) * down
    cost = Cost()
    with common.progress(run.pipe, total, "interpolate", args.quiet), cost.of(run.pipe):
        found = interpolate(run.pipe, run.dataset, pairs, weights, kinds, run.encode_steps)
    frames = len(pairs) * args.points * len(kinds)
    values: dict[str, Any] = {"compare": compare(run.pipe, found, weights)} if args.compare else {}
    report = common.report(
        run,
        points=args.points,
        pairs=[[run.dataset.names[i] for i in pair] for pair in pairs],
        rows=measure(found, weights),
        frames=frames,
        **cost.report(frames),
        **values,
    )
    _write(run.out, found, args.animate)
    cli.write_json(run.out / "metrics.json", report)
    if not args.quiet:
        print(_summary(report, run.out, args.animate))


def _write(out: Path, found: Interpolation, animate: str | None) -> None:
    rows, labels = [], []
    for pair in range(found.ends.shape[1]):
        first, second = found.ends[:, pair]
        for kind, frames in found.frames.items():
            rows.append(torch.cat([first[None], frames[pair], second[None]]))
            labels.append(f"{pair + 1}: {kind}")
            names = [f"{pair + 1:03d}-{kind}/{k:03d}" for k in range(len(frames[pair]))]
            save_images(frames[pair], out / "images", names)
    save_grid(rows, out / "grid.png", labels)
    if animate:
        for kind, frames in found.frames.items():
            animation.write(out / f"{kind}.{animate}", frames)


def _summary(report: dict[str, Any], out: Path, animate: str | None) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [
            f"{row['pair'] + 1}: {' - '.join(report['pairs'][row['pair']])}",
            row["kind"],
            cell(row["length"], ".3f"),
            cell(row["largest_step"], ".3f"),
            cell(row["ends_differ"], ".1e"),
            cell(row["ends_mse"], ".2e"),
        ]
        for row in report["rows"]
    ]
    header = ["pair", "kind", "length", "largest step", "ends differ", "MSE of ends"]
    text = [
        cli.table(header, lines, left=2),
        "length and largest step: 1 is a straight, even path from end to end (pixels); ends differ: from the "
        "reconstructions",
        f"{report['frames']} frames, {report['network_evaluations_per_image']['trunk']:.1f} passes of the trunk a "
        f"frame, model {report['model']}, {report['plan']} plan, {report['dtype']}, "
        f"{report['device']}",
    ]
    if "compare" in report:
        compared = report["compare"]
        text.append(f"trajectories, {compared['frames']} frames, {compared['rounds']} alternating rounds of "
                    f"{compared['steps']} steps, largest difference {compared['largest_difference']:.0e}:")  # fmt: skip
        text += timing.lines(compared)
    text += [f"assumed about the model: {note}" for note in report["assumed"]]
    films = f", {out / f'*.{animate}'}" if animate else ""
    text.append(f"wrote {out / 'grid.png'}, {out / 'images'}{films} and {out / 'metrics.json'}")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
