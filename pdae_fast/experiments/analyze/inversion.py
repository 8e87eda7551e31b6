"""Is a low reconstruction error bought with a useless x_T? Every way to infer it, by its noise, its interpolations and,
where there are pairs that differ in one attribute, its edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import metrics
from ...errors import UserError
from ...pipeline import PRESETS, Pipeline
from ...plots import COLOURS, chart
from .. import common
from ..evaluate import Setting
from ..manipulate import Edit, against_truth, find_edits, load_pairs, pairs_folder
from .latents import STATISTICS, interpolations, mean_and_error, noise_statistics, smoothness

QUALITY = {"ssim": metrics.ssim, "mse": metrics.mse}
SMOOTHNESS = {
    "length": "length of the path",
    "largest_step": "largest step",
    "code": "middle's z off the middle",
    "roughness": "roughness of the middle",
}


def ways() -> dict[str, Setting]:
    """What can be compared, by name: random x_T, the presets, and the published way with 999 evaluations up."""
    plain = {"spacing": "uniform", "iterations": 0, "solver": "ddim"}
    found = {"random": Setting("random", 100, None, **plain)}
    for name, values in PRESETS.items():
        settings = {**plain, **values}
        found[name] = Setting("inferred", encode_steps=settings["steps"], preset=name, **settings)
    found["published-1000"] = Setting("inferred", 100, 1000, **plain)
    return found


def choose(names: Sequence[str] | None) -> dict[str, Setting]:
    """The ways called ``names``, or all but the dear published-1000; UserError naming those that there are."""
    known = ways()
    if names is None:
        return {name: setting for name, setting in known.items() if name != "published-1000"}
    for name in names:
        if name not in known:
            raise UserError(f"--ways: {name!r} is not known; expected some of {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(names)}


def evaluations(pipe: Pipeline, setting: Setting, images: int, points: int, pairs: Pairs | str = "") -> int:
    """Network evaluations (in images) of `compare`, and of `edit` where there are ``pairs``."""
    own = setting.pipeline(pipe)
    down = common.evaluations(own, "random", None)
    whole = common.evaluations(own, setting.mode, setting.encode_steps)
    edits = len(pairs.edits) * (whole + 2 * down) if isinstance(pairs, Pairs) and setting.mode == "inferred" else 0
    return images * whole + (images // 2) * points * down + edits


def compare(
    pipe: Pipeline, setting: Setting, x0: Tensor, points: int, seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One row of the table for images x0 [N, C, H, W], with the decoded images [N, C, H, W] and the interpolations
    [N // 2, points, C, H, W] between neighbours.

    The row: "noise" (`noise_statistics`), "quality" (mean SSIM and MSE), "smoothness" (means with standard errors).
    """
    own, indices = setting.pipeline(pipe), range(len(x0))
    z = own.encode(x0)
    if setting.mode == "inferred":
        latent = own.invert(x0, z, setting.encode_steps)
    else:
        latent = own.random_x_T(seed, indices)
    x = own.decode(z, latent)
    paths = interpolations(own, z, latent, points)
    for what, values in (("reconstruction", x), ("interpolation", paths)):
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"the {what} by {setting.label} holds NaN or infinite values; try --dtype float32")
    noise = latent[:, 0] if latent.ndim == 5 else latent
    row = {
        "noise": {**noise_statistics(noise), "correlation_with_image": _correlation(noise, x0)},
        "quality": {name: float(function(x0, x).mean()) for name, function in QUALITY.items()},
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


def edit(pipe: Pipeline, setting: Setting, pairs: Pairs, scale: float) -> dict[str, float]:
    """The edits of ``pairs`` against the truth (see `manipulate.against_truth`), means over pairs.

    edit_inside, edit_outside: MSE of the edited image in the region that truly changes and elsewhere;
    kept_outside: MSE elsewhere without an edit; edit_closer: share of pairs that the edit brought nearer inside;
    swap: MSE with the second image's own z and the first one's x_T, which shows what x_T holds on to.
    """
    found = against_truth(setting.pipeline(pipe), pairs.first, pairs.second, pairs.edits, [scale], setting.encode_steps)
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
