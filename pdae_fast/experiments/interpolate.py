"""Between two images: frames of both kinds of interpolation in one batched run, and how even their path is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cli, metrics
from ..data import save_grid, save_images
from ..errors import UserError
from ..files import claim_folder
from ..pipeline import INTERPOLATIONS, Pipeline
from ..samplers.noise import slerp
from . import animation, common, timing
from .common import Cost
from .timing import ROUNDS, alternate

DEFAULT_PAIRS = 3
COMPARED_STEPS = 4  # of a decoding; every step costs the same, so more would only take longer


def find_pairs(names: Sequence[str], given: Sequence[Sequence[str]] | None) -> list[tuple[int, int]]:
    """Places in ``names`` of the images to interpolate between.

    given: pairs of names or places; None: the first images two by two, at most DEFAULT_PAIRS. Raises UserError for
    fewer than two images, and for names and places that there are not.
    """
    if len(names) < 2:
        raise UserError(f"interpolation needs two images; the input has {len(names)} ({', '.join(names)})")
    if given is None:
        return [(i, i + 1) for i in range(0, min(len(names) - 1, 2 * DEFAULT_PAIRS), 2)]
    pairs = [(find_image(names, a), find_image(names, b)) for a, b in given]
    for a, b in pairs:
        if a == b:
            raise UserError(f"a pair needs two different images, not {names[a]} twice")
    return pairs


def find_image(names: Sequence[str], word: str) -> int:
    """The place of the image called ``word``, or number ``word``; UserError naming the choices."""
    if word in names:
        return list(names).index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    raise UserError(f"no image {word!r} in the input; there are numbers 0 to {len(names) - 1}, called {shown}")


@dataclass
class Interpolation:
    """``ends``: x0 [2, P, C, H, W] of the pairs, and ``reconstructions`` of the same shape; ``frames``: [P, n, C, H, W]
    of each kind. z [2, P, latent_dim] and x_T are the ends'."""

    ends: Tensor
    reconstructions: Tensor
    frames: dict[str, Tensor]
    z: Tensor
    x_T: Tensor


def interpolate(
    pipe: Pipeline,
    dataset: Any,
    pairs: Sequence[tuple[int, int]],
    weights: Tensor,
    kinds: Sequence[str],
) -> Interpolation:
    """Frames at ``weights`` (0: the first image, 1: the second) between the images of each pair of ``dataset``.

    Each image is encoded and its x_T inferred once; all frames of a kind are one batched run.
    """
    places = sorted({place for pair in pairs for place in pair})
    images = common.load(dataset, places).images
    z = pipe.encode(images)
    x_T = pipe.invert(images, z)
    reconstructions = pipe.decode(z, x_T)
    rows = torch.tensor([[places.index(pair[side]) for pair in pairs] for side in (0, 1)])
    frames = {kind: pipe.blend(z[rows], x_T[rows], weights, kind) for kind in kinds}
    for x in frames.values():
        common.check_finite(x, "the interpolated images hold")
    return Interpolation(images[rows], reconstructions[rows], frames, z[rows], x_T[rows])


# -- how even ------------------------------------------------------------------------------------------------------


def smoothness(frames: Tensor) -> dict[str, Any]:
    """How even the path through ``frames`` [n, C, H, W] is, by root mean square distances of pixels on [0, 1].

    "steps": distances of neighbouring frames; "distance": of the last frame from the first. "length": the sum of the
    steps over that distance, 1 for a straight line, which a cross-fade of pixels is. "largest_step": the largest step
    over the step of a straight, even path (distance / (n - 1)): a jump would show as a number near n - 1. Both None
    where the ends are the same.
    """

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return metrics.mse(a, b).sqrt()

    steps = apart(frames[:-1], frames[1:])
    distance = float(apart(frames[:1], frames[-1:]))
    return {
        "steps": steps.tolist(),
        "distance": distance,
        "length": float(steps.sum()) / distance if distance else None,
        "largest_step": float(steps.max()) * len(steps) / distance if distance else None,
    }


def measure(found: Interpolation, weights: Tensor) -> list[dict[str, Any]]:
    """For each pair and kind: `smoothness`; and where the weights have both ends, "ends_differ", the largest
    difference of a pixel (on [0, 1]) of the first and last frame from the reconstructions, and "ends_mse", their error
    against the images themselves."""
    ended = float(weights[0]) == 0 and float(weights[-1]) == 1
    rows = []
    for pair in range(found.ends.shape[1]):
        for kind, frames in found.frames.items():
            row = {"pair": pair, "kind": kind, **smoothness(frames[pair])}
            if ended:
                outer = frames[pair][[0, -1]]
                row["ends_differ"] = float((outer - found.reconstructions[:, pair]).abs().max()) / 2
                row["ends_mse"] = float(metrics.mse(outer, found.ends[:, pair]).mean())
            rows.append(row)
    return rows


# -- what sharing the trunk is worth -------------------------------------------------------------------------------


def compare(pipe: Pipeline, found: Interpolation, weights: Tensor, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time the trajectory interpolation of the first pair in one batch against frame by frame (see `alternate`).

    "one by one, two passes": a frame at a time, and for each of the two G a pass of the whole network, as with a
    decoder that returns eps and G together. "one by one, shared trunk": a frame at a time, trunk and eps once.
    "one batch, shared trunk": what `Pipeline.blend` does. Decoding alone is timed, by COMPARED_STEPS steps.
    """
    short = pipe.with_recipe(steps=min(COMPARED_STEPS, pipe.recipe.steps), encode_steps=None)
    short.progress = None
    n = len(weights)
    z, mixed = found.z[:, :1].expand(-1, n, -1), torch.stack([1 - weights, weights])
    start = slerp(*found.x_T[:, :1].expand(-1, n, *found.x_T.shape[2:]), weights)
    parts = [slice(i, i + 1) for i in range(n)]
    ways = {
        "one by one, two passes": lambda: torch.cat([_two_passes(short, z[:, i], weights[i], start[i]) for i in parts]),
        "one by one, shared trunk": lambda: torch.cat(
            [short.decode_mixture(z[:, i], mixed[:, i], start[i]) for i in parts]
        ),
        "one batch, shared trunk": lambda: short.decode_mixture(z, mixed, start),
    }
    return {"frames": n, "steps": short.recipe.steps, **alternate(ways, rounds)}


def _two_passes(pipe: Pipeline, z: Tensor, weight: Tensor, x_T: Tensor) -> Tensor:
    """`Pipeline.decode_mixture` of one frame without sharing: the whole network for each end."""
    trajectory = pipe.recipe.down(pipe.schedule)
    pipe.plan.prepare(step.t for step in trajectory)
    field_a, field_b = pipe.field(z[0]), pipe.field(z[1])
    weight = weight.to(pipe.device)

    def field(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
        eps, gradient_a = field_a(x, t, use_gradient)
        _, gradient_b = field_b(x, t, use_gradient)
        return eps, None if gradient_a is None else (1 - weight) * gradient_a + weight * gradient_b

    return pipe.recipe.method.decode(field, x_T.to(pipe.device), trajectory).cpu()


# -- the command ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
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
    add("--kinds", nargs="+", choices=INTERPOLATIONS, help="what is interpolated (default: both)")
    add("--animate", metavar="FORMAT", help="also write films: gif, or mp4 where imageio and ffmpeg are installed")
    add("--compare", action="store_true", help="time the shared trunk of trajectories against one-by-one calls")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.points < 2:
        raise UserError(f"--points must be at least 2, not {args.points}")
    if args.animate:
        animation.check_format(args.animate)
    run = common.open_run(args)
    kinds = common.possible(run.model, "--kinds", args.kinds, INTERPOLATIONS)
    if args.compare:
        common.check_g(run.model, "--compare")
    pairs = find_pairs(run.dataset.names, args.pair)
    weights = torch.linspace(0, 1, args.points)
    claim_folder(run.out)
    ends, down = len({i for pair in pairs for i in pair}), common.evaluations(run.pipe, "random")
    total = ends * common.evaluations(run.pipe, "inferred")
    total += len(pairs) * args.points * len(kinds) * down
    cost = Cost()
    with common.progress(run.pipe, total, "interpolate", args.quiet), cost.of(run.pipe):
        found = interpolate(run.pipe, run.dataset, pairs, weights, kinds)
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
    films = [f"*.{args.animate}"] if args.animate else []
    common.say(run, _summary(report), ["grid.png", "images", *films, "metrics.json"])


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


def _summary(report: dict[str, Any]) -> list[str]:
    cell = common.cell
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
        f"frame, {common.where(report)}",
    ]
    if "compare" in report:
        compared = report["compare"]
        text.append(f"trajectories, {compared['frames']} frames, {compared['rounds']} alternating rounds of "
                    f"{compared['steps']} steps, largest difference {compared['largest_difference']:.0e}:")  # fmt: skip
        text += timing.lines(compared)
    return text
