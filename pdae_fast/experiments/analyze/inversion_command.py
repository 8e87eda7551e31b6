"""`analyze inversion`: the table over ways to infer x_T, its pictures, and true noise beside them."""

from __future__ import annotations

import argparse
from typing import Any

from ... import cli
from ...data import save_grid
from ...errors import UserError
from ...files import make_folder
from .. import common
from ..common import Cost
from . import inversion, latents
from .times import write_csv

SHOWN = 8  # images in a picture


def options(p: argparse.ArgumentParser) -> None:
    known = inversion.ways()
    p.add_argument("--ways", nargs="+", metavar="WAY", help=f"of {', '.join(known)} (default: without published-1000)")
    p.add_argument("--points", type=int, default=5, help="images of an interpolation, both ends included")
    p.add_argument("--pairs", metavar="DIR", help="pairs with the true edit (default: those of the avatars in --input)")
    p.add_argument("--pair-limit", type=int, default=16, help="use only so many pairs")
    p.add_argument("--scale", type=float, default=0.3, help="of the edits, in sqrt(latent_dim) units of z")


def run_command(args: argparse.Namespace) -> None:
    chosen = inversion.choose(args.ways)
    if args.points < 3:
        raise UserError(f"--points must be at least 3, not {args.points}")
    if args.pair_limit < 1 or not args.scale > 0:
        raise UserError("--pair-limit must be at least 1, and --scale more than 0")
    run = common.open_run(args, default_limit=12)
    pipe, out = run.pipe, run.out
    if len(run.dataset) < 2:
        raise UserError("interpolation needs at least two images; give more --input or a larger --limit")
    own = {name: setting.pipeline(pipe) for name, setting in chosen.items()}
    pairs = inversion.find_pairs(run, args.pairs, args.pair_limit)
    x0 = common.load(run.dataset, range(len(run.dataset))).images
    make_folder(out)
    rows: dict[str, dict[str, Any]] = {}
    pictures, paths = [x0[:SHOWN]], []
    total = sum(inversion.evaluations(pipe, s, len(x0), args.points, pairs) for s in chosen.values())
    with common.progress(pipe, total, "inversion", args.quiet):
        for name, setting in chosen.items():
            cost = Cost()
            with cost.of(pipe):
                row, x, between = inversion.compare(pipe, setting, x0, args.points, args.seed)
                if isinstance(pairs, inversion.Pairs) and setting.mode == "inferred":
                    row["edit"] = inversion.edit(pipe, setting, pairs, args.scale)
            rows[name] = {
                **row,
                "evaluations": common.evaluations(own[name], setting.mode, setting.encode_steps),
                "settings": {k: getattr(own[name], k) for k in ("steps", "spacing", "iterations", "solver")},
                "seconds": cost.seconds,
            }
            pictures.append(x[:SHOWN])
            paths.append(between[0])
    reference = latents.noise_reference(x0.shape, seed=args.seed)
    names = list(rows)
    save_grid(pictures, out / "grid.png", ["input", *names])
    save_grid(paths, out / "interpolations.png", names)
    write_csv(out / "inversion.csv", [inversion.flat(name, row) for name, row in rows.items()])
    inversion.picture(out / "inversion.png", rows, reference)
    about = pairs if isinstance(pairs, str) else f"{len(pairs.edits)} pairs, edited by {args.scale:g}"
    report = common.report(run, images=len(x0), points=args.points, edits=about, reference=reference, ways=rows)
    for unused in ("steps", "encode_steps", "preset", "spacing", "iterations", "solver"):
        report.pop(unused)
    cli.write_json(out / "metrics.json", report)
    if not args.quiet:
        print(_table(rows, reference))
        if isinstance(pairs, inversion.Pairs):
            print(_edit_table(rows))
        print(f"edits: {about}")
        print(f"{len(x0)} images, {len(x0) // 2} interpolations, model {args.model}\nwrote {out}")


def _table(rows: dict[str, dict[str, Any]], reference: dict[str, dict[str, float]]) -> str:
    ordered = list(latents.STATISTICS)
    header = ["x_T", "evaluations", "MSE", "mean", "std", "kurtosis", "neighbours", "norm", ">3", "shared", "image",
              "length", "step", "code", "rough"]  # fmt: skip
    lines = []
    for name, row in rows.items():
        noise = [f"{row['noise'][key]:.4f}" for key in [*ordered, "correlation_with_image"]]
        smooth = [f"{row['smoothness'][key]['mean']:.3f}" for key in inversion.SMOOTHNESS]
        lines.append([name, str(row["evaluations"]), f"{row['quality']['mse']:.2e}", *noise, *smooth])
    true = [f"{reference[key]['mean']:.4f}" for key in ordered]
    spread = [f"{reference[key]['standard_deviation']:.4f}" for key in ordered]
    blank = ["", *([""] * len(inversion.SMOOTHNESS))]
    lines += [["true noise", "", "", *true, *blank], ["  its spread", "", "", *spread, *blank]]
    return cli.table(header, lines)


def _edit_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["edits by x_T", "MSE inside", "MSE outside", "unedited outside", "closer", "z swapped", "swapped inside"]
    lines = []
    for name, row in rows.items():
        if "edit" in row:
            found = row["edit"]
            keys = ("edit_inside", "edit_outside", "kept_outside", "edit_closer", "swap", "swap_inside")
            lines.append([name, *(f"{found[k]:.2f}" if k == "edit_closer" else f"{found[k]:.2e}" for k in keys)])
    return cli.table(header, lines)
