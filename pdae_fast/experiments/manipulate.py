"""Moving an attribute: many edits of many images in one batched run, and what they change and leave alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cli
from ..data import none_read, save_grid, save_images, stream
from ..errors import UserError
from ..files import claim_folder
from ..pipeline import Pipeline
from . import common, timing
from .common import Cost
from .timing import ROUNDS, alternate
from .true_edits import CHANGED, Edit, Truth, against_truth, find_edits, load_pairs, pairs_folder

SCALES = (-0.3, -0.15, 0.15, 0.3)
# Shown when nothing was asked for, as far as a classifier has them (CelebA's and the avatars' names).
FAVOURITES = (
    "mouth=smile+tongue", "smiling", "eyeglasses", "beard", "male", "young", "blond_hair", "dark_skin", "hat",
)  # fmt: skip
DEFAULT_ATTRIBUTES = 4
COMPARED_STEPS = 4


def default_attributes(names: Sequence[str]) -> list[str]:
    """A few of a classifier's attributes, the ones that are easily seen first."""
    known = [name for word in FAVOURITES for name in names if name.lower() == word]
    return [*known, *(name for name in names if name not in known)][:DEFAULT_ATTRIBUTES]


@dataclass
class Manipulation:
    """x0 and ``reconstructions`` [B, C, H, W], ``edited`` [A, S, B, C, H, W] by attribute and scale; logits of the
    classifier, encoded again: [B, n] of the reconstructions, [A, S, B, n] of the edited images."""

    images: Tensor
    reconstructions: Tensor
    edited: Tensor
    logits: Tensor
    edited_logits: Tensor


def manipulate(pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float]) -> Manipulation:
    """Every image of x0 [B, C, H, W] with every attribute moved by every scale, decoded from its inferred x_T.

    x_T is inferred once an image, and everything is decoded in one batched run. The trunk is not shared: the edits of
    an image start from one x_T, but after the first step each has an x of its own.
    """
    for name in attributes:
        pipe.direction(name)  # a mistake shows before the work
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    codes = torch.cat([z, *(pipe.edit(z, name, scale) for name in attributes for scale in scales)])
    x = common.check_finite(common.decode_edits(pipe, codes, x_T), "the edited images hold")
    logits = pipe.logits(pipe.encode(x))
    B, shape = len(z), (len(attributes), len(scales), len(z))
    return Manipulation(x0, x[:B], x[B:].unflatten(0, shape), logits[:B], logits[B:].unflatten(0, shape))


# -- what changed --------------------------------------------------------------------------------------------------


def asked(pipe: Pipeline, attribute: str, scale: float) -> Tensor:
    """How far z + edit moves every logit [n] before it is decoded: scale sqrt(latent_dim) (w_j . w) / ||w||."""
    return scale * pipe.model.classifier.weight.detach().cpu().float() @ pipe.direction(attribute)


def measure(pipe: Pipeline, found: Manipulation, attributes: Sequence[str], scales: Sequence[float]) -> list[dict]:
    """A row for each attribute and scale, everything against the reconstruction of the same image, mean over images.

    "target", "others": change of the attribute's own logit, and mean absolute change of all other attributes' logits;
    "target_probability", "others_probability": the same of the probabilities; "positive": the share of images that the
    classifier finds positive, "positive_before" of the reconstructions. "target_asked", "others_asked": what the edit
    of z alone would do to the logits, before decoding and encoding again. "changed_pixels": the share of pixels that
    move by more than CHANGED in any channel; "mean_change": mean absolute difference on [0, 1].
    """
    names = list(pipe.model.config.attributes)
    rows = []
    before = found.logits
    for a, name in enumerate(attributes):
        own = names.index(name)
        rest = [j for j in range(len(names)) if j != own]
        for s, scale in enumerate(scales):
            after, wanted = found.edited_logits[a, s], asked(pipe, name, scale)
            change, shift = after - before, after.sigmoid() - before.sigmoid()
            difference = (found.edited[a, s] - found.reconstructions).abs() / 2
            rows.append(
                {
                    "attribute": name,
                    "scale": float(scale),
                    "target": float(change[:, own].mean()),
                    "others": _mean_absolute(change[:, rest]),
                    "target_probability": float(shift[:, own].mean()),
                    "others_probability": _mean_absolute(shift[:, rest]),
                    "target_asked": float(wanted[own]),
                    "others_asked": _mean_absolute(wanted[rest]),
                    "positive_before": float((before[:, own] > 0).float().mean()),
                    "positive": float((after[:, own] > 0).float().mean()),
                    "changed_pixels": float((difference.amax(dim=1) > CHANGED).float().mean()),
                    "mean_change": float(difference.mean()),
                }
            )
    return rows


def average(parts: Sequence[tuple[int, list[dict]]]) -> list[dict]:
    """Rows of `measure` for all images together: ``parts`` are numbers of images with the rows found for them."""
    images = sum(count for count, _ in parts)
    rows = []
    for same in zip(*(rows for _, rows in parts), strict=True):
        row = dict(same[0])
        for key, value in row.items():
            if isinstance(value, float) and key != "scale":
                row[key] = sum(count * part[key] for (count, _), part in zip(parts, same, strict=True)) / images
        rows.append(row)
    return rows


def stands_out(rows: Sequence[dict]) -> dict[str, tuple[int, int]]:
    """In how many of how many rows of `measure` the target's logit moves the way it was asked to, and by more than
    the others do: "raised" of those with a positive scale, "lowered" of those with a negative one."""
    found = {}
    for name, sign in (("raised", 1), ("lowered", -1)):
        some = [row for row in rows if sign * row["scale"] > 0]
        found[name] = (sum(sign * row["target"] > (row["others"] or 0) for row in some), len(some))
    return found


def _mean_absolute(values: Tensor) -> float | None:
    return float(values.abs().mean()) if values.numel() else None


def compare(
    pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Time all edits of x0 in one run against one call of `Pipeline.manipulate` for each (see `alternate`), with
    COMPARED_STEPS steps up and down, encoding and inference of x_T included."""
    short = pipe.with_recipe(steps=min(COMPARED_STEPS, pipe.recipe.steps), encode_steps=None)
    short.progress = None
    ways = {
        "one by one": lambda: torch.cat(
            [
                short.manipulate(x0[i : i + 1], name, scale)
                for name in attributes
                for scale in scales
                for i in range(len(x0))
            ]
        ),
        "one run": lambda: _edited(short, x0, attributes, scales),
    }
    return {"edits": len(attributes) * len(scales) * len(x0), "steps": short.recipe.steps, **alternate(ways, rounds)}


def _edited(pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float]) -> Tensor:
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    codes = torch.cat([pipe.edit(z, name, scale) for name in attributes for scale in scales])
    return common.decode_edits(pipe, codes, x_T)


# -- the command ---------------------------------------------------------------------------------------------------

DEFAULT_IMAGES = 6
DEFAULT_PAIRS = 32
SHOWN_IMAGES = SHOWN_PAIRS = 10


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("manipulate", "Move attributes of images along the classifier's directions; the rest keeps its x_T.")
    common.add_options(p, out="manipulation")
    add = p.add_argument
    add("--attribute", nargs="+", metavar="NAME", help="attributes of the classifier (default: a few of them)")
    add("--scales", nargs="+", type=float, default=list(SCALES), help="how far, in sqrt(latent_dim) units of z")
    add("--pairs", metavar="DIR", help="pairs with the true edit (default: those of the avatars in --input), or 'none'")
    add("--pair-limit", type=int, default=DEFAULT_PAIRS, help="use only so many pairs")
    add("--compare", action="store_true", help="time the batched run against one call for every edit")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
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
    claim_folder(run.out)
    up = pipe.recipe.evaluations_up(pipe.schedule)
    down = common.evaluations(pipe, "random")
    each = len(attributes) * len(scales)
    total = len(run.dataset) * (up + down + each * down) + len(edits) * (up + (2 + len(sizes)) * down)
    cost, truth, shown = Cost(), None, None
    parts: list[tuple[int, list[dict]]] = []
    broken: list[tuple[str, str]] = []
    with common.progress(pipe, total, "manipulate", args.quiet):
        for batch in stream(run.dataset, pipe.batch_size, args.on_error, broken):
            with cost.of(pipe):
                found = manipulate(pipe, batch.images, attributes, scales)
            _save(run.out / "images", found, batch.names, attributes, scales)
            parts.append((len(batch.images), measure(pipe, found, attributes, scales)))
            shown = shown or found
        if shown is None:
            raise none_read(broken)
        if edits:
            truth = against_truth(pipe, *ends, edits, sizes)
    images, rows = sum(count for count, _ in parts), average(parts)
    values: dict[str, Any] = {}
    if args.compare:
        values["compare"] = compare(pipe, shown.images[:2], attributes, scales)
    if truth:
        values["pairs"] = {"count": len(edits), "rows": truth.rows, "per_pair": truth.per_pair}
    report = common.report(
        run,
        broken,
        images=images,
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
    pictures = ["grid.png", "pairs.png"] if truth else ["grid.png"]
    common.say(run, _summary(report), [*pictures, "images", "metrics.json"], broken)


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


def _summary(report: dict[str, Any]) -> list[str]:
    def cell(value: float | None, form: str = "+.2f") -> str:
        return common.cell(value, form)

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
    passes = f"{report['network_evaluations_per_image']['trunk']:.1f} passes of the trunk an edit"
    return [*text, f"{report['images']} images, {passes}, {common.where(report)}"]
