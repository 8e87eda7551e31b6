"""Is a low reconstruction error bought with a useless x_T? Every way to infer it, by its noise, its interpolations and,
where there are pairs that differ in one attribute, its edits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ... import cli
from ...data import save_grid
from ...errors import UserError
from ...files import claim_folder
from ...metrics import METRICS
from ...pipeline import Pipeline
from ...plots import COLOURS, chart
from ...samplers import RECIPES, Recipe
from .. import common
from ..common import Case, Cost
from ..true_edits import Edit, against_truth, find_edits, load_pairs, pairs_folder
from .latents import STATISTICS, interpolations, mean_and_error, noise_reference, noise_statistics, smoothness
from .times import write_csv

QUALITY = ("ssim", "mse")
SMOOTHNESS = {
    "length": "length of the path",
    "largest_step": "largest step",
    "code": "middle's z off the middle",
    "roughness": "roughness of the middle",
}


def ways() -> dict[str, Case]:
    """What can be compared, by name: random x_T, the default, the presets, and the published 999 evaluations up."""
    found = {"random": Case("random", RECIPES["published"]), "default": Case("inferred", Recipe(), "default")}
    found |= {name: Case("inferred", recipe, name) for name, recipe in RECIPES.items()}
    return {**found, "published-1000": Case("inferred", Recipe(encode_steps=1000))}


def choose(names: Sequence[str] | None) -> dict[str, Case]:
    """The ways called ``names``, or all but the dear published-1000; UserError naming those that there are."""
    known = ways()
    if names is None:
        return {name: case for name, case in known.items() if name != "published-1000"}
    for name in names:
        if name not in known:
            raise UserError(f"--ways: {name!r} is not known; expected some of {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(names)}


def evaluations(pipe: Pipeline, case: Case, images: int, points: int, pairs: Pairs | str = "") -> int:
    """Network evaluations (in images) of `compare`, and of `edit` where there are ``pairs``."""
    own = case.pipeline(pipe)
    down = common.evaluations(own, "random")
    whole = common.evaluations(own, case.mode)
    edits = len(pairs.edits) * (whole + 2 * down) if isinstance(pairs, Pairs) and case.mode == "inferred" else 0
    return images * whole + (images // 2) * points * down + edits


def compare(pipe: Pipeline, case: Case, x0: Tensor, points: int, seed: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One row of the table for images x0 [N, C, H, W], with the decoded images [N, C, H, W] and the interpolations
    [N // 2, points, C, H, W] between neighbours.

    The row: "noise" (`noise_statistics`), "quality" (mean SSIM and MSE), "smoothness" (means with standard errors).
    """
    own, indices = case.pipeline(pipe), range(len(x0))
    z = own.encode(x0)
    if case.mode == "inferred":
        latent = own.invert(x0, z)
    else:
        latent = own.random_x_T(seed, indices)
    x = own.decode(z, latent)
    paths = interpolations(own, z, latent, points)
    for what, values in (("reconstruction", x), ("interpolation", paths)):
        common.check_finite(values, f"the {what} by {case.label} holds")
    noise = latent[:, 0] if latent.ndim == 5 else latent
    row = {
        "noise": {**noise_statistics(noise), "correlation_with_image": _correlation(noise, x0)},
        "quality": {name: float(METRICS[name](x0, x).mean()) for name in QUALITY},
        "smoothness": mean_and_error(smoothness(own, z, paths)),
    }
    return row, x, paths


class Pairs(NamedTuple):
    """Images [P, C, H, W] that differ in one attribute, and which: the first is to be edited toward the second."""

    first: Tensor
    second: Tensor
    edits: list[Edit]


def find_pairs(run: common.Run, given: str | None, limit: int) -> Pairs | str:
    """At most ``limit`` pairs from the folder ``given``, or those of the avatars in the input; or why there are none.

    Raises UserError when ``given`` cannot be used.
    """
    names = list(run.model.config.attributes)
    folder = pairs_folder(given, run.spec)
    if folder is None:
        return "no pairs of images that differ in one attribute (--pairs)"
    if run.model.classifier is None or not run.model.config.latent_statistics:
        if given:
            raise UserError("--pairs needs an attribute classifier and the latents' statistics; this model has none")
        return "this model has no attribute classifier"
    try:
        edits = find_edits(folder, names)[:limit]
    except UserError:
        if given:
            raise
        edits = []
    if not edits:
        return "the classifier knows none of the attributes in which the pairs differ"
    return Pairs(*load_pairs(folder, edits, run.model.image_shape), edits)


def edit(pipe: Pipeline, case: Case, pairs: Pairs, scale: float) -> dict[str, float]:
    """The edits of ``pairs`` against the truth (see `true_edits.against_truth`), means over pairs.

    edit_inside, edit_outside: MSE of the edited image in the region that truly changes and elsewhere;
    kept_outside: MSE elsewhere without an edit; edit_closer: share of pairs that the edit brought nearer inside;
    swap: MSE with the second image's own z and the first one's x_T, which shows what x_T holds on to.
    """
    found = against_truth(case.pipeline(pipe), pairs.first, pairs.second, pairs.edits, [scale])
    plain, edited, swapped = found.rows
    return {
        "edit_inside": edited["mse_inside"],
        "edit_outside": edited["mse_outside"],
        "kept_outside": plain["mse_outside"],
        "edit_closer": edited["closer_inside"],
        "swap": swapped["mse"],
        "swap_inside": swapped["mse_inside"],
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    """Mean over images of Pearson's correlation between x_T and the image: what of it was copied, not encoded."""
    a, b = (v.double().flatten(1) for v in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)).mean())


def flat(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV file."""
    return {
        "way": name,
        "evaluations": row["evaluations"],
        **row["quality"],
        **row["noise"],
        **{key: value["mean"] for key, value in row["smoothness"].items()},
        **row.get("edit", {}),
    }


def picture(path: Path, rows: dict[str, dict[str, Any]], reference: dict[str, dict[str, float]]) -> None:
    """A panel for each statistic: a point for each way; grey is where 19 of 20 true noises fall."""
    panels = [(name, text, "noise") for name, text in STATISTICS.items()]
    panels += [(name, text, "smoothness") for name, text in SMOOTHNESS.items()]
    columns = 4
    lines = -(-len(panels) // columns)
    names = list(rows)
    with chart(path, 3.1 * columns, (0.9 + 0.26 * len(names)) * lines, lines, columns, sharey=True) as axes:
        for panel, (name, text, kind) in zip(axes.flat, panels, strict=False):
            values = [row[kind][name] for row in rows.values()]
            if kind == "noise":
                middle, error = values, None
                around = reference[name]
                low, high = (around["mean"] + side * 2 * around["standard_deviation"] for side in (-1, 1))
                panel.axvspan(low, high, color="#bbbbbb", alpha=0.6, linewidth=0)
            else:
                middle = [v["mean"] for v in values]
                error = [2 * (v["standard_error"] or 0) for v in values]
            places = range(len(names))
            colours = [COLOURS[0] if n != "random" else COLOURS[6] for n in names]
            panel.scatter(middle, places, color=colours, s=22, zorder=3)
            if error:
                panel.hlines(places, *zip(*((m - e, m + e) for m, e in zip(middle, error, strict=True)), strict=True),
                             color=COLOURS[0], linewidth=1)  # fmt: skip
            panel.set_title(text, fontsize=9, loc="left")
            panel.tick_params(labelsize=8)
            panel.locator_params(axis="x", nbins=4)
        axes.flat[0].set_yticks(range(len(names)), names)
        axes.flat[0].set_ylim(len(names) - 0.5, -0.5)
        for panel in axes.flat[len(panels) :]:
            panel.set_visible(False)


# -- the command ---------------------------------------------------------------------------------------------------

SHOWN = 8  # images in a picture


def add_arguments(p: argparse.ArgumentParser) -> None:
    known = ways()
    p.add_argument("--ways", nargs="+", metavar="WAY", help=f"of {', '.join(known)} (default: without published-1000)")
    p.add_argument("--points", type=int, default=5, help="images of an interpolation, both ends included")
    p.add_argument("--pairs", metavar="DIR", help="pairs with the true edit (default: those of the avatars in --input)")
    p.add_argument("--pair-limit", type=int, default=16, help="use only so many pairs")
    p.add_argument("--scale", type=float, default=0.3, help="of the edits, in sqrt(latent_dim) units of z")


def command(args: argparse.Namespace) -> None:
    chosen = choose(args.ways)
    if args.points < 3:
        raise UserError(f"--points must be at least 3, not {args.points}")
    if args.pair_limit < 1 or not args.scale > 0:
        raise UserError("--pair-limit must be at least 1, and --scale more than 0")
    run = common.open_run(args, default_limit=12, infers=False)
    pipe, out = run.pipe, run.out
    if len(run.dataset) < 2:
        raise UserError("interpolation needs at least two images; give more --input or a larger --limit")
    own = {name: case.pipeline(pipe) for name, case in chosen.items()}
    pairs = find_pairs(run, args.pairs, args.pair_limit)
    x0 = common.load(run.dataset, range(len(run.dataset))).images
    claim_folder(out)
    rows: dict[str, dict[str, Any]] = {}
    pictures, paths = [x0[:SHOWN]], []
    total = sum(evaluations(pipe, s, len(x0), args.points, pairs) for s in chosen.values())
    with common.progress(pipe, total, "inversion", args.quiet):
        for name, case in chosen.items():
            cost = Cost()
            with cost.of(pipe):
                row, x, between = compare(pipe, case, x0, args.points, args.seed)
                if isinstance(pairs, Pairs) and case.mode == "inferred":
                    row["edit"] = edit(pipe, case, pairs, args.scale)
            rows[name] = {
                **row,
                "evaluations": common.evaluations(own[name], case.mode),
                "settings": own[name].recipe.describe(),
                "seconds": cost.seconds,
            }
            pictures.append(x[:SHOWN])
            paths.append(between[0])
    reference = noise_reference(x0.shape, seed=args.seed)
    names = list(rows)
    save_grid(pictures, out / "grid.png", ["input", *names])
    save_grid(paths, out / "interpolations.png", names)
    write_csv(out / "inversion.csv", [flat(name, row) for name, row in rows.items()])
    picture(out / "inversion.png", rows, reference)
    about = pairs if isinstance(pairs, str) else f"{len(pairs.edits)} pairs, edited by {args.scale:g}"
    values = {"points": args.points, "edits": about, "reference": reference, "ways": rows}
    report = common.report(run, recipe=False, images=len(x0), **values)
    cli.write_json(out / "metrics.json", report)
    files = ["grid.png", "interpolations.png", "inversion.csv", "inversion.png", "metrics.json"]
    common.say(run, _summary(report), files)


def _summary(report: dict[str, Any]) -> list[str]:
    rows, images = report["ways"], report["images"]
    return [
        _table(rows, report["reference"]),
        *([_edit_table(rows)] if any("edit" in row for row in rows.values()) else []),
        f"edits: {report['edits']}",
        f"{images} images, {images // 2} interpolations, model {report['model']}",
    ]


def _table(rows: dict[str, dict[str, Any]], reference: dict[str, dict[str, float]]) -> str:
    ordered = list(STATISTICS)
    header = ["x_T", "evaluations", "MSE", "mean", "std", "kurtosis", "neighbours", "norm", ">3", "shared", "image",
              "length", "step", "code", "rough"]  # fmt: skip
    lines = []
    for name, row in rows.items():
        noise = [f"{row['noise'][key]:.4f}" for key in [*ordered, "correlation_with_image"]]
        smooth = [f"{row['smoothness'][key]['mean']:.3f}" for key in SMOOTHNESS]
        lines.append([name, str(row["evaluations"]), f"{row['quality']['mse']:.2e}", *noise, *smooth])
    true = [f"{reference[key]['mean']:.4f}" for key in ordered]
    spread = [f"{reference[key]['standard_deviation']:.4f}" for key in ordered]
    blank = ["", *([""] * len(SMOOTHNESS))]
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
