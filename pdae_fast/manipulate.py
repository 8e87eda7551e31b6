"""Edit attributes of images: `python -m pdae_fast.manipulate --attribute smiling --scales -0.3 0.3`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import cli
from .data import save_grid, save_images, stream
from .errors import UserError
from .experiments import common, timing
from .experiments.common import Cost
from .experiments.manipulate import (
    SCALES,
    Edit,
    Manipulation,
    Truth,
    against_truth,
    average,
    compare,
    default_attributes,
    find_edits,
    load_pairs,
    manipulate,
    measure,
    pairs_folder,
    stands_out,
)
from .files import make_folder

DEFAULT_IMAGES = 6
DEFAULT_PAIRS = 32
SHOWN_IMAGES = SHOWN_PAIRS = 10


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("manipulate", "Move attributes of images along the classifier's directions; the rest keeps its x_T.")
    common.add_options(p, out="manipulation")
    add = p.add_argument
    add("--attribute", nargs="+", metavar="NAME", help="attributes of the classifier (default: a few of them)")
    add("--scales", nargs="+", type=float, default=list(SCALES), help="how far, in sqrt(latent_dim) units of z")
    add("--pairs", metavar="DIR", help="pairs with the true edit (default: those of the avatars in --input), or 'none'")
    add("--pair-limit", type=int, default=DEFAULT_PAIRS, help="use only so many pairs")
    add("--compare", action="store_true", help="time the batched run against one call for every edit")
    args = common.parse(p, argv)
    scales = sorted(dict.fromkeys(scale for scale in args.scales if scale))
    if not scales:
        raise UserError("--scales needs a number other than 0, which changes nothing")
    if args.pair_limit < 1:
        raise UserError(f"--pair-limit must be at least 1, not {args.pair_limit}")
    run = common.open_run(args, default_limit=DEFAULT_IMAGES)
    pipe, names = run.pipe, list(run.model.config.attributes)
    attributes = list(dict.fromkeys(args.attribute or default_attributes(names)))
    for name in attributes or [""]:  # without a classifier there is none: this says so
        pipe.direction(name)
    edits, ends = _pairs(run, names)
    sizes = sorted({abs(scale) for scale in scales})
    make_folder(run.out)
    up = common.evaluations(pipe, "inferred", run.encode_steps) - common.evaluations(pipe, "random", None)
    down = common.evaluations(pipe, "random", None)
    each = len(attributes) * len(scales)
    total = len(run.dataset) * (up + down + each * down) + len(edits) * (up + (2 + len(sizes)) * down)
    cost, truth, shown = Cost(), None, None
    parts: list[tuple[int, list[dict]]] = []
    broken: list[tuple[str, str]] = []
    with common.progress(pipe, total, "manipulate", args.quiet):
        for batch in stream(run.dataset, pipe.batch_size, args.on_error, broken):
            with cost.of(pipe):
                found = manipulate(pipe, batch.images, attributes, scales, run.encode_steps)
            _save(run.out / "images", found, batch.names, attributes, scales)
            parts.append((len(batch.images), measure(pipe, found, attributes, scales)))
            shown = shown or found
        if shown is None:
            raise UserError(f"none of the {len(broken)} images could be read; the first: {': '.join(broken[0])}")
        if edits:
            truth = against_truth(pipe, *ends, edits, sizes, run.encode_steps)
    images, rows = sum(count for count, _ in parts), average(parts)
    values: dict[str, Any] = {}
    if args.compare:
        values["compare"] = compare(pipe, shown.images[:2], attributes, scales)
    if truth:
        values["pairs"] = {"count": len(edits), "rows": truth.rows, "per_pair": truth.per_pair}
    report = common.report(
        run,
        images=images,
        broken=[{"name": name, "reason": reason} for name, reason in broken],
        attributes=attributes,
        scales=scales,
        rows=rows,
        stands_out=stands_out(rows),
        **cost.report(images * each),
        **values,
    )
    _grid(run.out / "grid.png", shown, attributes, scales)
    if truth:
        _write_pairs(run.out / "pairs.png", truth, edits)
    cli.write_json(run.out / "metrics.json", report)
    if not args.quiet:
        print(_summary(report, run.out))


def _pairs(run: common.Run, names: list[str]) -> tuple[list[Edit], tuple]:
    folder = pairs_folder(run.args.pairs, run.spec)
    if folder is None:
        return [], ()
    try:
        edits = find_edits(folder, names)[: run.args.pair_limit]
    except UserError:
        if run.args.pairs:
            raise
        return [], ()  # nobody asked for them, and this classifier knows other attributes
    return edits, load_pairs(folder, edits, run.model.image_shape)


def _save(folder: Path, found: Manipulation, names: list[str], attributes: list[str], scales: list[float]) -> None:
    for a, attribute in enumerate(attributes):
        below = attribute.replace("/", "-").replace("..", "-")
        for s, scale in enumerate(scales):
            save_images(found.edited[a, s], folder / below, [f"{name}_{scale:+g}" for name in names])


def _grid(path: Path, found: Manipulation, attributes: list[str], scales: list[float]) -> None:
    rows, labels = [found.images, found.reconstructions], ["input", "reconstruction"]
    for a, attribute in enumerate(attributes):
        rows += list(found.edited[a])
        labels += [f"{attribute} {scale:+g}" for scale in scales]
    save_grid([row[:SHOWN_IMAGES] for row in rows], path, labels)


def _write_pairs(path: Path, truth: Truth, edits: list[Edit]) -> None:
    """Both images of some pairs of different attributes, and what was made of the first."""
    chosen: list[int] = []
    for _, i in sorted((sum(e.attribute == edits[j].attribute for j in range(i)), i) for i, e in enumerate(edits)):
        if len(chosen) < SHOWN_PAIRS:
            chosen.append(i)
    images = truth.images
    rows = [images["first"], images["reconstruction"], *images["edited"], images["swapped"], images["second"]]
    labels = ["first", *(row["name"] for row in truth.rows), "true edit"]
    save_grid([row[chosen] for row in rows], path, labels)


def _summary(report: dict[str, Any], out: Path) -> str:
    def cell(value: float | None, form: str = "+.2f") -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [
            f"{row['attribute']} {row['scale']:+g}",
            f"{cell(row['target'])} ({cell(row['target_asked'])})",
            f"{cell(row['others'], '.2f')} ({cell(row['others_asked'], '.2f')})",
            cell(row["target_probability"]),
            cell(row["others_probability"], ".2f"),
            f"{row['positive_before']:.2f} > {row['positive']:.2f}",
            f"{100 * row['changed_pixels']:.0f}%",
        ]
        for row in report["rows"]
    ]
    header = ["edit", "target (asked)", "others (asked)", "target p", "others p", "positive", "pixels"]
    text = [
        cli.table(header, lines),
        "change of the classifier's logit and probability p after decoding and encoding again, mean over images; "
        "others: mean absolute change of all other attributes; asked: what the edit of z says; pixels that changed",
        "the target moves as asked and by more than the others: "
        + ", ".join(f"{name} in {k} of {n} rows" for name, (k, n) in report["stands_out"].items() if n),
    ]
    if "pairs" in report:
        rows = [
            [
                row["name"],
                f"{row['ssim']:.4f}",
                f"{row['mse']:.2e}",
                f"{row['mse_inside']:.2e}",
                f"{row['mse_outside']:.2e}",
                f"{100 * row['closer_inside']:.0f}%",
            ]
            for row in report["pairs"]["rows"]
        ]
        header = ["against the true edit", "SSIM", "MSE", "MSE inside", "MSE outside", "closer inside"]
        text += [cli.table(header, rows), f"{report['pairs']['count']} pairs that differ in one attribute; inside and "
                 "outside the region that truly changes; closer: than no edit"]  # fmt: skip
    if "compare" in report:
        compared = report["compare"]
        text.append(f"{compared['edits']} edits, {compared['rounds']} alternating rounds of {compared['steps']} steps "
                    f"up and down, largest difference {compared['largest_difference']:.0e}:")  # fmt: skip
        text += timing.lines(compared)
    text += [
        f"{report['images']} images, {report['network_evaluations_per_image']['trunk']:.1f} passes of the trunk an "
        f"edit, model {report['model']}, {report['plan']} plan, {report['dtype']}, {report['device']}",
        *(f"assumed about the model: {note}" for note in report["assumed"]),
    ]
    pictures = f"{out / 'grid.png'}, " + (f"{out / 'pairs.png'}, " if "pairs" in report else "")
    text.append(f"wrote {pictures}{out / 'images'} and {out / 'metrics.json'}")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
